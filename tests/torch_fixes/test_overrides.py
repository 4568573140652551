"""Functions that torch has in Python: what they call is seen in forward mode, wherever it has an override."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor, overrides
from torch.nn import functional

import autodiff as ad
from autodiff.core import hooks
from autodiff.torch_fixes.overrides import body_in_forward_mode
from scenarios import assert_close

X = torch.tensor([[0.3, -1.2, 0.8], [1.5, 0.1, -0.4]], dtype=torch.float64)
T = X.flip(0).cos()


def functions_in_python() -> list[types.FunctionType]:
    """Those that hand themselves over to a torch function mode."""
    places = torch, torch.functional, functional, torch.linalg, torch.special, torch.fft, Tensor
    found = [f for group in overrides.get_overridable_functions().values() for f in group]
    found += [getattr(place, name) for place in places for name in dir(place)]
    functions = {f for f in found if isinstance(f, types.FunctionType)} - {overrides.handle_torch_function}
    return [f for f in functions if any(map(asks, parts_of(f)))]


def parts_of(func: types.FunctionType) -> list[types.FunctionType]:
    """The function and those in its closure, such as the function that a decorator wraps."""
    parts = [func]
    for part in parts:
        contents = [cell.cell_contents for cell in part.__closure__ or ()]
        parts += [one for one in contents if isinstance(one, types.FunctionType) and one not in parts]
    return parts


def asks(func: types.FunctionType) -> bool:
    return any("torch_function" in name for name in func.__code__.co_names)


OVERRIDDEN = {getattr(f, "__name__", "") for f in hooks.forward_overrides if f is not None}


def names_called(func: types.FunctionType, seen: set[Any]) -> set[str]:
    """All names in the code of the function and of the functions in Python that it names."""
    names: set[str] = set()
    for part in set(parts_of(func)) - seen:
        seen.add(part)
        codes = [part.__code__]
        for code in codes:
            codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
            names |= set(code.co_names)
        for name in names.copy():
            called = part.__globals__.get(name)
            if isinstance(called, types.FunctionType) and "torch_function" not in name:
                names |= names_called(called, seen)
    return names


def test_every_function_that_reaches_an_override_runs_its_body_in_forward_mode() -> None:
    functions = functions_in_python()
    assert len(functions) > 120
    without = []
    for func in functions:
        if func in hooks.forward_overrides:
            continue
        takes_functions = any("Callable" in str(kind) for kind in func.__annotations__.values())
        if takes_functions or OVERRIDDEN & names_called(func, set()) - {func.__name__}:
            without.append(func.__qualname__)
    assert without == []
    bodies = {
        f.__name__ for f, override in hooks.forward_overrides.items() if override is body_in_forward_mode
    }
    assert bodies == {"multi_head_attention_forward", "triplet_margin_with_distance_loss"}


def test_the_class_of_an_argument_is_still_asked() -> None:
    class Asked(Tensor):
        seen: list[Any] = []  # noqa: RUF012  of the class

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            cls.seen.append(func)
            return super().__torch_function__(func, types, args, kwargs)

    other = X.flip(0).as_subclass(Asked)
    loss = functional.triplet_margin_with_distance_loss
    ad.jvp(lambda x: loss(x, other, X).as_subclass(Tensor), (X,), (T,))
    assert loss in Asked.seen


def test_defaults_keywords_and_the_callers_modes() -> None:
    class Count(overrides.TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += func is torch.sin
            return func(*args, **(kwargs or {}))

    distance = lambda x, y: (x.cos() - torch.sin(y)).square().sum(-1)
    loss = lambda x: functional.triplet_margin_with_distance_loss(
        x, X.flip(0), 2 * X, distance_function=distance, margin=5.0, swap=True, reduction="sum"
    )
    with Count() as count:
        value, tangent = ad.jvp(loss, (X,), (T,))
    assert count.calls == 3
    assert_close((value, tangent), (loss(X), (torch.autograd.functional.jacobian(loss, X) * T).sum()))


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_modules_in_forward_mode(need_weights: bool) -> None:
    torch.manual_seed(0)
    module = torch.nn.MultiheadAttention(4, 2, batch_first=True).double()
    func = lambda x: module(x, x, x, need_weights=need_weights)[0]
    x, t = torch.randn(2, 1, 3, 4, dtype=torch.float64).unbind(0)
    expected = torch.tensordot(torch.autograd.functional.jacobian(func, x), t, 3)
    assert_close(ad.jvp(func, (x,), (t,))[1].detach(), expected)
