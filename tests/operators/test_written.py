"""Operators whose arguments are written in place after they were made, as by an optimizer's step."""

import pytest
import torch
from torch.nn.functional import mse_loss

from autodiff import operators
from autodiff.errors import InPlaceError

F64 = torch.float64


def model(w, x):
    return torch.tanh(x @ w.mT)


def loss(w, x, y):
    return mse_loss(model(w, x), y)


MAKERS = {
    "jacobian": lambda: operators.jacobian(lambda w, x, y: model(w, x)),
    "a linear function": lambda: operators.jacobian(lambda w, x, y: w.sum(0) + x[0] + y.sum()),
    "hessian": lambda: operators.hessian(loss),
    "gauss_newton": lambda: operators.gauss_newton(model, mse_loss),
    "fisher": lambda: operators.fisher(model, mse_loss),
    "sampled fisher": lambda: operators.fisher(model, mse_loss, samples=3),
    "empirical_fisher": lambda: operators.empirical_fisher(loss),
}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("which", MAKERS)
def test_a_product_after_a_write_to_an_argument_is_refused(which, requires_grad):
    # Torch gives zero, the old product, or a mixture, as the graph saved it.
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(2, 3, generator=generator, dtype=F64).requires_grad_(requires_grad)
    x = torch.randn(5, 3, generator=generator, dtype=F64)
    y = torch.randn(5, 2, generator=generator, dtype=F64)
    A = MAKERS[which]()(w, x, y)
    u, v = (torch.ones(size, dtype=F64) for size in A.shape)
    A @ v, A.H @ u
    with torch.no_grad():
        w.mul_(2)
    for act in (
        lambda: A @ v,
        lambda: A.H @ u,
        A.to_matrix,
        lambda: operators.solve(A.H @ A + 1, v),
        lambda: (2 * A["*", "*"]) @ v,
    ):
        with pytest.raises(InPlaceError, match="Make the operator anew"):
            act()


def test_values_at_the_point_stay_after_a_write():
    w = torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True)
    A = operators.hessian(lambda w: (w**3).sum())(w)
    with torch.no_grad():
        w.mul_(2)
    assert A.value.item() == 9.0
    assert A.gradient.tolist() == [3.0, 12.0]


def test_a_tensor_that_the_function_itself_writes_is_as_it_left_it():
    count = torch.zeros((), dtype=F64)

    def counting(w, count):
        count.add_(1)
        return (w**3).sum()

    A = operators.hessian(counting)(torch.tensor([1.0, 2.0], dtype=F64), count)
    assert (A @ torch.ones(2, dtype=F64)).tolist() == [6.0, 12.0]
    assert count.item() == 1.0
