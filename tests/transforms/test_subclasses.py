"""Subclasses of Tensor: plain inside levels, unless their package replaces torch.func's own names to keep them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch._functorch import eager_transforms
from torch._functorch import vmap as torch_vmap
from torch.autograd import forward_ad

import autodiff as ad

if TYPE_CHECKING:
    from collections.abc import Callable


class Tagged(Tensor):
    """A tensor with a factor, as PyPose's LieTensor has its group."""

    factor: float


def tagged(tensor: Tensor, factor: float) -> Tagged:
    result = tensor.as_subclass(Tagged)
    result.factor = factor
    return result


POINT = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)


def scaled(x: Tagged, y: Tensor) -> Tensor:
    return (x.as_subclass(Tensor) * x.factor * y).square().sum()


def keeping_class(func: Callable[..., Any]) -> Callable[..., Any]:
    def keeping(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        result = func(tensor, *args, **kwargs)
        return tagged(result, tensor.factor) if isinstance(tensor, Tagged) else result

    return keeping


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """As PyPose's retain_ltype."""
    for module, name in (
        (torch_vmap, "_add_batch_dim"),
        (eager_transforms, "_wrap_tensor_for_grad"),
        (forward_ad, "make_dual"),
    ):
        monkeypatch.setattr(module, name, keeping_class(getattr(module, name)))


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize(
    "transform",
    [
        ad.vmap,
        lambda f: ad.vmap(ad.grad(f)),
        lambda f: ad.vmap(ad.jacrev(f)),
        lambda f: ad.vmap(lambda x, y: ad.jvp(lambda x: f(x, y), (x,), (torch.ones_like(y),))[1]),
        lambda f: lambda x, y: ad.jvp(lambda x: f(x, y), (x,), (torch.ones_like(y),))[1],
    ],
    ids=["vmap", "vmap(grad)", "vmap(jacrev)", "vmap(jvp)", "jvp"],
)
def test_class_is_kept_where_its_package_asks_for_it(transform: Callable[..., Any]) -> None:
    def plain(x: Tensor, y: Tensor) -> Tensor:
        return (x * 5.0 * y).square().sum()

    result = transform(scaled)(tagged(POINT, 5.0), POINT.cos())
    assert torch.equal(result, transform(plain)(POINT, POINT.cos()))


@pytest.mark.parametrize("transform", [ad.grad, ad.jacrev, ad.value_and_grad])
def test_eager_reverse_mode_keeps_a_class_whose_detach_does(transform: Callable[..., Any]) -> None:
    class Detached(Tagged):
        def detach(self) -> Any:
            result = super().detach().as_subclass(Detached)
            result.factor = self.factor
            return result

    x = POINT.as_subclass(Detached)
    x.factor = 5.0
    result = transform(scaled)(x, POINT.cos())
    gradient = result[1] if isinstance(result, tuple) else result
    torch.testing.assert_close(gradient.as_subclass(Tensor), 50 * POINT * POINT.cos() ** 2)
