"""functional_call on modules that keep a way of their own to themselves or to a submodule."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import autodiff as ad
from scenarios import assert_close

if TYPE_CHECKING:
    from collections.abc import Callable

X = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.25, -0.75]])


class InAList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.steps = [self.inner]

    def forward(self, x: Tensor) -> Tensor:
        return self.steps[0](x)


class Bound(nn.Module):
    def __init__(self, bind: Callable[[Bound], Any]) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.apply_it = bind(self)

    def through(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_it(x)


class Slotted(nn.Module):
    __slots__ = ("scale",)

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = nn.Linear(3, 3), 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.inner(x)


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.inner.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.kept = output

    def forward(self, x: Tensor) -> Tensor:
        self.inner(x)
        return self.kept


MODULES = {
    "in a list": InAList,
    "bound method": lambda: Bound(lambda m: m.through),
    "closure": lambda: Bound(lambda m: lambda x: m.inner(x)),  # noqa: PLW0108  a closure is the case
    "partial": lambda: Bound(lambda m: functools.partial(m.through)),
    "slots": Slotted,
    "hook": Hooked,
    "traced by fx": lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3))),
    "plain": lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh()),
    "recurrent": lambda: nn.GRU(3, 2),
}


@pytest.mark.parametrize("name", MODULES)
def test_gradients_are_those_of_the_parameters_given(name: str) -> None:
    module = MODULES[name]()
    params = {key: 1.5 * value.detach() for key, value in module.named_parameters()}
    before = {key: value.clone() for key, value in module.state_dict().items()}

    def energy(library: Any) -> Callable[[Any], Tensor]:
        def of_params(params: dict[str, Tensor]) -> Tensor:
            output = library.functional_call(module, params, (X,))
            return (output[0] if isinstance(output, tuple) else output).square().sum()

        return of_params

    expected = torch.func.grad(energy(torch.func))(params)
    assert_close(ad.grad(energy(ad))(params), expected, loose=True)
    assert all(value.abs().sum() > 0 for value in expected.values())
    assert_close(dict(module.state_dict()), before)
