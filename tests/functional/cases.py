"""Functions and inputs on which autodiff.functional and torch.autograd.functional are compared."""

from __future__ import annotations

import torch
from torch import Tensor

_generator = torch.Generator().manual_seed(7)
_weight = torch.randn(3, 2, generator=_generator).requires_grad_()


class _OddGradient(torch.autograd.Function):
    """An old-style Function whose gradient is the gradient of nothing: its Hessian is not symmetric."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.round()

    @staticmethod
    def backward(ctx, cotangent):
        (x,) = ctx.saved_tensors
        return cotangent * x.sin() * x.flip(0)


def region_without_grad(x):
    with torch.no_grad():
        constant = x**2
    return (x**3 - constant * x).sum()


def gradient_inside(x):
    return torch.autograd.grad((x**3).sum(), x, create_graph=True)[0].sum()


def hook_on_intermediate(x):
    y = x**2
    if y.requires_grad:
        y.register_hook(lambda cotangent: 2 * cotangent)
    return (y * y.detach()).sum()


def hook_that_bends(x):
    y = x.sin()
    if y.requires_grad:
        y.register_hook(lambda cotangent: cotangent.clamp(-0.5, 0.5) * torch.tensor([1.0, 2.0]))
    return (y.prod() * y).sum()


@torch.library.custom_op("autodiff_tests::square", mutates_args=())
def square(x: Tensor) -> Tensor:
    return x * x


square.register_autograd(
    lambda ctx, cotangent: 2 * ctx.saved_tensors[0] * cotangent,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def in_place_on_intermediate(x):
    y = x * 2
    y.mul_(x)
    y[0] = y[0] ** 2
    return y.sum()


def checkpointed(x):
    return torch.utils.checkpoint.checkpoint(lambda z: (z.sin() * z).sum(), x, use_reentrant=False)


def complex_inside(x):
    return torch.view_as_complex(torch.stack([x, x**2], -1)).abs().sum()


# One tensor of shape (2,) in.
OF_ONE = {
    "cubes": lambda x: (x**3).sum(),
    "tuple of one": lambda x: ((x**3).sum(),),
    "vector": lambda x: x.sin() * x.flip(0),
    "shape (1, 1, 1)": lambda x: (x**2).sum().reshape(1, 1, 1),
    "linear": lambda x: (2 * x).sum(),
    "clone": lambda x: x.clone(),
    "identity": lambda x: x,
    "constant": lambda x: torch.ones(()),
    "constant vector": lambda x: torch.ones(2),
    "captured parameter": lambda x: (_weight @ x).tanh().sum(),
    "only captured": lambda x: _weight.sum(),
    "old-style Function": lambda x: _OddGradient.apply(x * 1.3).sum(),
    "no_grad inside": region_without_grad,
    "grad inside": gradient_inside,
    "hook": hook_on_intermediate,
    "in place": in_place_on_intermediate,
    "checkpoint": checkpointed,
    "two outputs": lambda x: (x.exp(), (x**2).sum()),
    "one output unrelated": lambda x: ((x**2).sum(), torch.ones(3)),
    "wider dtype out": lambda x: x.double().pow(2).sum(),
    "requires_grad_ inside": lambda x: (x.requires_grad_() ** 2).sum(),
    "detach inside": lambda x: (x.detach() * x * x).sum(),
    "number out": lambda x: 1.0,
    "element": lambda x: x[0] ** 2,
    "times zero": lambda x: (x * 0).sum(),
    "complex inside": complex_inside,
    "product by scatter": lambda x: (
        torch.ones(1).scatter_reduce(0, torch.zeros(2, dtype=int), x, "prod").sum()
    ),
    "integer beside": lambda x: ((x**2).sum(), (x > 0).long()),
    "asks for grad mode": lambda x: (x**2 if torch.is_grad_enabled() else x**3).sum(),
    "hook that bends": hook_that_bends,
    "custom operator": lambda x: torch.ops.autodiff_tests.square(x).sum(),
    "raises": lambda x: x @ torch.ones(5),
}

# Tensors of shapes (2,) and (3,) in.
OF_TWO = {
    "both": lambda x, y: (x**2).sum() * y.sum(),
    "first only": lambda x, y: (x**2).sum(),
    "two vectors": lambda x, y: (x * y.sum(), y.exp()),
    "linear in both": lambda x, y: 2 * x.sum() + 3 * y.sum(),
    "linear in one": lambda x, y: (x**2).sum() + 3 * y.sum(),
    "mixed dtypes": lambda x, y: (x * y[:2].double()).sum(),
}


def _numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3), dtype=dtype) + 0.2


def one_tensor() -> dict[str, object]:
    tracked = _numbers(2).requires_grad_()
    return {
        "plain": _numbers(2),
        "requires grad": tracked,
        "tuple": (_numbers(2),),
        "not a leaf": tracked * 2,
    }


def two_tensors() -> dict[str, object]:
    return {
        "plain": (_numbers(2), _numbers(3)),
        "one requires grad": (_numbers(2).requires_grad_(), _numbers(3)),
        "two dtypes": (_numbers(2), _numbers(3, dtype=torch.float64)),
    }


CASES = [(f"{name} of one, {kind}", name, kind) for name in OF_ONE for kind in one_tensor()] + [
    (f"{name} of two, {kind}", name, kind) for name in OF_TWO for kind in two_tensors()
]


def build(name: str, kind: str) -> tuple[object, object]:
    """The function, and fresh inputs for it."""
    if name in OF_ONE:
        return OF_ONE[name], one_tensor()[kind]
    return OF_TWO[name], two_tensors()[kind]
