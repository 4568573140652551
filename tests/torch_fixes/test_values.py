"""What is overridden in forward mode keeps torch's values, dtypes, shapes and errors: in every dtype, under autocast too."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import autodiff as ad
from scenarios import assert_close

_generator = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_generator)


def signs(*shape: int) -> Tensor:
    return normal(*shape).sign()


# Operations, their arguments, and options.
CASES: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "cdist": (torch.cdist, (normal(3, 4), normal(2, 4)), {}),
    "cdist of batches": (torch.cdist, (normal(2, 1, 3, 4), normal(5, 6, 4)), {"p": 1.0}),
    "cdist of nothing": (torch.cdist, (normal(0, 4), normal(2, 4)), {}),
    "cdist of points without numbers": (torch.cdist, (normal(3, 0), normal(2, 0)), {}),
    "pdist": (functional.pdist, (normal(4, 3),), {}),
    "pdist of one": (functional.pdist, (normal(1, 3),), {}),
    "layer_norm": (functional.layer_norm, (300 * normal(3, 4), (4,), normal(4), normal(4)), {}),
    "layer_norm of nothing": (functional.layer_norm, (normal(0, 4), (4,)), {}),
    "batch_norm": (
        functional.batch_norm,
        (normal(5, 3, 2), None, None, normal(3), normal(3)),
        {"training": True},
    ),
    "batch_norm of one": (functional.batch_norm, (normal(1, 3), None, None), {"training": True}),
    "batch_norm by statistics": (functional.batch_norm, (normal(5, 3), normal(3), normal(3).exp()), {}),
    "instance_norm": (functional.instance_norm, (normal(5, 3, 2),), {}),
    "instance_norm of one": (functional.instance_norm, (normal(5, 3, 1),), {}),
    "instance_norm without places": (functional.instance_norm, (normal(5, 3),), {}),
    "hardsigmoid": (functional.hardsigmoid, (4 * normal(2, 3),), {}),
    "hardsigmoid of a number": (functional.hardsigmoid, (normal(),), {}),
    "glu": (functional.glu, (normal(3, 4),), {}),
    "glu of an odd size": (functional.glu, (normal(3, 4), 0), {}),
    "glu of a number": (functional.glu, (normal(),), {}),
    "mvlgamma": (torch.mvlgamma, (4 + normal(2, 3).exp(), 3), {}),
    "mvlgamma of a number": (torch.mvlgamma, (1 + normal().exp(), 1), {}),
    "mvlgamma of nothing": (torch.special.multigammaln, (normal(0), 2), {}),
    "cumprod": (torch.cumprod, (normal(3, 4), 1), {}),
    "cumprod of nothing": (torch.cumprod, (normal(0, 4), 0), {}),
    "cumprod in float64": (torch.cumprod, (normal(3), 0), {"dtype": torch.float64}),
    "cumprod of a number": (torch.cumprod, (normal(), 0), {}),
}
for _reduction in ("mean", "sum", "none"):
    for _name in ("mse_loss", "huber_loss", "soft_margin_loss", "hinge_embedding_loss"):
        _loss = getattr(functional, _name)
        CASES |= {
            f"{_name} {_reduction}": (_loss, (normal(3, 4), signs(3, 4)), {"reduction": _reduction}),
            f"{_name} of a number {_reduction}": (_loss, (normal(), signs()), {"reduction": _reduction}),
            f"{_name} of nothing {_reduction}": (_loss, (normal(0), signs(0)), {"reduction": _reduction}),
            f"{_name} broadcast {_reduction}": (_loss, (normal(3, 4), signs(4)), {"reduction": _reduction}),
            f"{_name} broadcast to {_reduction}": (
                _loss,
                (normal(3, 1), signs(4)),
                {"reduction": _reduction},
            ),
        }
CASES |= {
    "huber_loss far out": (functional.huber_loss, (100 * normal(5), normal(5)), {"delta": 0.3}),
    "huber_loss without bound": (functional.huber_loss, (normal(5), normal(5)), {"delta": float("inf")}),
    "huber_loss by weight": (functional.huber_loss, (normal(5), normal(5)), {"weight": normal(5).exp()}),
    "mse_loss by weight": (functional.mse_loss, (normal(5), normal(5)), {"weight": normal(5).exp()}),
    "mse_loss of large numbers": (functional.mse_loss, (100 + normal(50), normal(50)), {}),
}
SETTINGS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "float32": (torch.float32, None),
    "float64": (torch.float64, None),
    "float16": (torch.float16, None),
    "bfloat16": (torch.bfloat16, None),
    "complex64": (torch.complex64, None),
    "float32 in autocast": (torch.float32, torch.bfloat16),
    "float64 in autocast": (torch.float64, torch.bfloat16),
    "bfloat16 in autocast": (torch.bfloat16, torch.bfloat16),
}
CLOSE = {
    torch.float64: 1e-9,
    torch.float32: 1e-5,
    torch.float16: 3e-3,
    torch.bfloat16: 2e-2,
    torch.complex64: 1e-5,
}


def attempt(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | Exception:
    try:
        return func(*args, **kwargs)
    except (RuntimeError, ValueError) as error:
        return error


@pytest.mark.filterwarnings("ignore:Using a target size", "ignore:Casting complex values to real")
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", CASES)
def test_value_is_torchs(name: str, setting: str) -> None:
    func, args, kwargs = CASES[name]
    dtype, autocast = SETTINGS[setting]
    x, *rest = (one.to(dtype) if isinstance(one, Tensor) else one for one in args)
    kwargs = {key: one.to(dtype) if isinstance(one, Tensor) else one for key, one in kwargs.items()}

    def pushed(x: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        of_x = lambda x: func(x, *rest, **kwargs)
        # Inside another transform, and with a second forward mode around it.
        return ad.jvp(lambda x: ad.jvp(of_x, (x,), (x,))[0], (x,), (x,))[0]

    with torch.autocast("cpu", autocast) if autocast else nullcontext():
        expected = attempt(func, (x, *rest), kwargs)
        value = attempt(pushed, (x, *rest), kwargs)
    if isinstance(expected, Exception):
        # The formulas may know dtypes that torch's kernels do not.
        assert (
            isinstance(value, Exception) or "implemented" in str(expected) or "floating" in str(expected)
        ), expected
        return
    if dtype.is_complex and isinstance(value, Exception):
        return  # no rule, which is said
    assert isinstance(value, Tensor), value
    assert (value.dtype, value.shape) == (expected.dtype, expected.shape)
    close = CLOSE[torch.bfloat16 if autocast else dtype]
    torch.testing.assert_close(value, expected, rtol=close, atol=close, equal_nan=True)


def test_soft_margin_loss_has_the_dtype_of_its_input() -> None:
    x, target = normal(3).half(), signs(3)
    loss = lambda x: functional.soft_margin_loss(x, target, reduction="none")
    value, slope = ad.jvp(lambda x: ad.jvp(loss, (x,), (x,))[0], (x,), (x,))
    assert value.dtype == slope.dtype == loss(x).dtype == torch.float16


def test_soft_margin_loss_far_out_is_finite() -> None:
    """Where torch's own overflows."""
    loss = lambda x: functional.soft_margin_loss(x, -torch.ones(2), reduction="sum")
    x = torch.tensor([100.0, 1000.0])
    value, tangent = ad.jvp(lambda x: ad.jvp(loss, (x,), (torch.ones(2),))[0], (x,), (torch.ones(2),))
    assert_close((value, tangent), (torch.tensor(1100.0), torch.tensor(2.0)))


def test_pullbacks_after_autocast_was_left() -> None:
    """The operation runs again when it is pulled back, as it ran the first time."""
    x, t = normal(2, 3, 4).bfloat16().unbind(0)

    def func(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.cdist(x, t).float() + functional.huber_loss(x, t)

    slope = ad.grad(lambda x: ad.jvp(func, (x,), (t,))[1].sum())(x)
    expected = ad.grad(lambda x: ad.jvp(func, (x,), (t.double(),))[1].sum())(x.double())
    torch.testing.assert_close(slope, expected.bfloat16(), rtol=0.1, atol=0.1)
