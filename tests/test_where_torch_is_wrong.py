"""Functions that torch.func differentiates wrongly without a word: the right number, or an error.

Closed forms from matrix calculus, B the inverse of A, so that no mode of differentiation checks another.
tests/test_table.py shows what torch.func makes of them.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import autodiff as ad
from scenarios import assert_close, difference

if TYPE_CHECKING:
    from collections.abc import Callable

MODES = [
    "auto",
    "reverse-over-reverse",
    "forward-over-reverse",
    "reverse-over-forward",
    "forward-over-forward",
]
MATRICES = torch.tensor(
    [
        [[3.0, 0.5, 0.1], [-0.4, 2.5, 0.3], [0.2, -0.7, 4.0]],
        [[2.0, -0.3, 0.6], [0.8, 3.5, -0.2], [-0.5, 0.4, 2.8]],
    ],
    dtype=torch.float64,
)
U, B_SIDE = (
    torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64),
    torch.tensor([0.3, 1.0, -1.5], dtype=torch.float64),
)


class Case(NamedTuple):
    func: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor], Tensor]
    hessian: Callable[[Tensor], Tensor]


def log_gradient(a: Tensor) -> Tensor:
    return a.inverse().T


def log_hessian(a: Tensor) -> Tensor:
    b = a.inverse()
    return -torch.einsum("jk,li->ijkl", b, b)


def det_hessian(a: Tensor) -> Tensor:
    b = a.inverse()
    return a.det() * (torch.einsum("ji,lk->ijkl", b, b) - torch.einsum("jk,li->ijkl", b, b))


def solve_hessian(a: Tensor) -> Tensor:
    b = a.inverse()
    left, right = b.T @ U, b @ B_SIDE
    one, other = torch.einsum("k,li,j->ijkl", left, b, right), torch.einsum("i,jk,l->ijkl", left, b, right)
    return one + other


CASES = {
    "slogdet": Case(lambda a: torch.linalg.slogdet(a)[1], log_gradient, log_hessian),
    "logdet": Case(torch.logdet, log_gradient, log_hessian),
    "det": Case(torch.linalg.det, lambda a: a.det() * a.inverse().T, det_hessian),
    "solve": Case(
        lambda a: U @ torch.linalg.solve(a, B_SIDE),
        lambda a: -torch.outer(a.inverse().T @ U, a.inverse() @ B_SIDE),
        solve_hessian,
    ),
    "inverse": Case(
        lambda a: U @ torch.linalg.inv(a) @ B_SIDE,
        lambda a: -torch.outer(a.inverse().T @ U, a.inverse() @ B_SIDE),
        solve_hessian,
    ),
}
# torch announces that it loops over what has no batching rule; slow is not wrong.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@each_case
@pytest.mark.parametrize("transform", [ad.grad, ad.jacrev, ad.jacfwd], ids=lambda f: f.__name__)
def test_gradients_of_matrix_functions(case: Case, transform: Any) -> None:
    expected = torch.stack([case.gradient(a) for a in MATRICES])
    assert_close(torch.stack([transform(case.func)(a) for a in MATRICES]), expected)


@each_case
@pytest.mark.parametrize("name", ["grad", "jacrev", "jacfwd"])
def test_gradients_of_matrix_functions_per_sample(case: Case, name: str) -> None:
    expected = torch.stack([case.gradient(a) for a in MATRICES])
    assert_close(ad.vmap(getattr(ad, name)(case.func))(MATRICES), expected)


@each_case
@pytest.mark.parametrize("chunk_size", [None, 1, 4])
def test_default_hessians_of_matrix_functions(case: Case, chunk_size: int | None) -> None:
    """The default must be right, alone and per sample: it is the main job."""
    expected = torch.stack([case.hessian(a) for a in MATRICES])
    hessian = ad.hessian(case.func, chunk_size=chunk_size)
    assert_close(torch.stack([hessian(a) for a in MATRICES]), expected)
    assert_close(ad.vmap(hessian)(MATRICES), expected)


@each_case
@pytest.mark.parametrize("mode", MODES[1:])
def test_hessians_of_matrix_functions_by_mode(case: Case, mode: Any) -> None:
    assert_close(ad.hessian(case.func, mode=mode)(MATRICES[0]), case.hessian(MATRICES[0]))


@each_case
@pytest.mark.parametrize("mode", MODES[1:])
def test_hessians_of_matrix_functions_by_mode_per_sample(case: Case, mode: Any) -> None:
    hessian = ad.vmap(ad.hessian(case.func, mode=mode))
    assert_close(hessian(MATRICES), torch.stack([case.hessian(a) for a in MATRICES]))


@each_case
def test_jvp_of_jvp_of_matrix_functions(case: Case) -> None:
    a, t = MATRICES
    expected = torch.einsum("ijkl,ij,kl->", case.hessian(a), t, t)
    assert_close(ad.jvp(lambda x: ad.jvp(case.func, (x,), (t,))[1], (a,), (t,))[1], expected)


class Cube(torch.autograd.Function):
    """x^3 with rules for both modes; its own jvp is not seen by an outer jvp in torch."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * cotangent

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * tangent


@pytest.mark.parametrize(("outer", "inner"), list(itertools.product(["jacfwd", "jacrev", "grad"], repeat=2)))
def test_second_derivative_of_a_function_with_its_own_jvp(outer: str, inner: str) -> None:
    x = torch.tensor(2.0, dtype=torch.float64)
    second = getattr(ad, outer)(getattr(ad, inner)(Cube.apply))
    assert_close(second(x), torch.tensor(12.0, dtype=torch.float64))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", ["layer_norm", "batch_norm", "instance_norm"])
def test_hessians_of_normalisations_by_mode(norm: str, mode: Any) -> None:
    x, t = torch.randn(2, 2, 3, 4, dtype=torch.float64).unbind(0)
    options = {"layer_norm": ((4,),), "batch_norm": (None, None, None, None, True), "instance_norm": ()}[norm]

    def func(x: Tensor) -> Tensor:
        return (getattr(functional, norm)(x, *options) ** 3).sum()

    expected = difference(ad.grad(func), x, t, 1e-4)
    result = torch.tensordot(ad.hessian(func, mode=mode)(x), t, t.dim())
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_forward_over_reverse_of_mse_loss() -> None:
    x, y, t = torch.randn(3, 4, 2, dtype=torch.float64).unbind(0)
    _, product = ad.jvp(ad.grad(lambda x: functional.mse_loss(x, y)), (x,), (t,))
    assert_close(product, 2 * t / x.numel())


def test_jacobian_of_cdist_with_many_rows() -> None:
    x = torch.randn(4, 2, dtype=torch.float64)
    y = torch.randn(3, 2, dtype=torch.float64)
    expected = torch.zeros(4, 3, 4, 2, dtype=torch.float64)
    for i in range(4):
        for j in range(3):
            expected[i, j, i] = (x[i] - y[j]) / (x[i] - y[j]).norm()
    assert_close(ad.jacrev(lambda x: torch.cdist(x, y))(x), expected)


def test_jvp_of_scatter_reduce_prod() -> None:
    x, t = torch.randn(2, 3, dtype=torch.float64).unbind(0)
    index = torch.tensor([0, 0, 1])

    def func(x: Tensor) -> Tensor:
        return torch.ones(2, dtype=x.dtype).scatter_reduce(0, index, x, "prod")

    assert_close(ad.jvp(func, (x,), (t,))[1], torch.stack([x[0] * t[1] + x[1] * t[0], t[2]]))


@pytest.mark.parametrize("name", ["huber_loss", "smooth_l1_loss", "soft_margin_loss"])
@pytest.mark.parametrize("transform", ["hessian", "hvp"])
def test_losses_without_forward_mode_have_hessians(name: str, transform: str) -> None:
    x, t = torch.randn(2, 5, dtype=torch.float64).unbind(0)
    y = torch.tensor([1.0, -1, 1, 1, -1], dtype=torch.float64)
    loss = getattr(functional, name)
    slopes = ad.grad(lambda x: loss(x, y))
    expected = difference(slopes, x, t, 1e-4)
    result = (
        ad.hessian(lambda x: loss(x, y))(x) @ t
        if transform == "hessian"
        else ad.hvp(lambda x: loss(x, y), (x,), (t,))[1]
    )
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["grad", "jacrev", "jvp", "hessian"])
def test_batch_norm_in_training_mode_with_its_own_buffers(name: str) -> None:
    """The running statistics are written in place into the module, as backward() has it."""
    x = torch.randn(5, 2, dtype=torch.float64)
    module, model = nn.BatchNorm1d(2).double(), nn.BatchNorm1d(2).double()
    model(x)
    if name == "jvp":
        ad.jvp(lambda x: (module(x) ** 3).sum(), (x,), (x,))
    else:
        getattr(ad, name)(lambda x: (module(x) ** 3).sum())(x)
    assert_close(dict(module.named_buffers()), dict(model.named_buffers()))
