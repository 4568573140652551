"""Hessians of functions whose backward is the user's: symmetric where it is a gradient, refused where it is not."""

import pytest
import torch

import autodiff as ad
from autodiff import operators
from autodiff.errors import RuleError

W = torch.tensor([[0.3, -0.7], [0.2, 0.5], [1.0, 0.1]], dtype=torch.float64)
V = torch.tensor([0.4, -1.1], dtype=torch.float64)


class Sine(torch.autograd.Function):
    """Its backward is right."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.cos()


class Clipped(torch.autograd.Function):
    """Its backward clips the gradient, as some do on purpose."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g.clamp(-0.5, 0.5)


def test_right_backward():
    loss = lambda x: (Sine.apply(W @ x) ** 2).sum()
    plain = lambda x: ((W @ x).sin() ** 2).sum()
    A = operators.hessian(loss)(V)
    torch.testing.assert_close(A.to_matrix(), torch.autograd.functional.hessian(plain, V))
    assert A.symmetric


def test_backward_that_is_no_gradient():
    # The two numbers are clipped at different places, and mixed before and after.
    loss = lambda x: (Clipped.apply(W @ x) ** 2).sum() * x[0] + (W @ x)[0] ** 3 * Clipped.apply(x)[1]
    H = ad.jacrev(ad.grad(loss))(V)
    assert not torch.allclose(H, H.T)
    with pytest.raises(
        RuleError, match=r"operators\.hessian: expected a symmetric Hessian.*by autodiff\.hessian"
    ):
        operators.hessian(loss)(V)


def test_hook_that_changes_a_gradient():
    def loss(x):
        y = W @ x
        y.register_hook(lambda g: g.clamp(-0.5, 0.5))
        return (y**2).sum() * x[0] + y[0] ** 3 * x[1]

    with pytest.raises(RuleError, match="expected a symmetric Hessian"):
        operators.hessian(loss)(V)
