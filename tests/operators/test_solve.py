"""`operators.solve`: compared with dense solutions, SciPy's solvers of the same names, and closed forms."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.torch_version import TorchVersion

import autodiff as ad
from autodiff import _torch, operators
from autodiff.errors import (
    ConvergenceWarning,
    DtypeError,
    LeafError,
    OptionError,
    ShapeError,
    SolverError,
    StructureError,
)
from operators.systems import METHODS, Counted, matrix, second_differences

SINGLE, DOUBLE = (torch.float32, torch.complex64), (torch.float64, torch.complex128)


@pytest.mark.parametrize("columns", [None, 1, 3])
@pytest.mark.parametrize("dtype", [*SINGLE, *DOUBLE], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_solution_is_that_of_the_matrix(method: Any, dtype: torch.dtype, columns: int | None) -> None:
    M, rtol = matrix(method, 23, dtype), 1e-5 if dtype in SINGLE else 1e-11
    b = torch.randn(23, dtype=dtype) if columns is None else torch.randn(23, columns, dtype=dtype)
    given = M.clone(), b.clone()
    x, info = operators.solve(operators.from_matrix(M), b, method, rtol=rtol, info=True)
    assert x.dtype == dtype
    assert x.shape == b.shape == torch.Size([23, *info.residual_norm.shape])
    assert_close(x, torch.linalg.solve(M, b), rtol=100 * rtol, atol=100 * rtol)
    left = torch.linalg.vector_norm(b - M @ x, dim=0) / torch.linalg.vector_norm(b, dim=0)
    assert_close(info.residual_norm, left, rtol=0.5, atol=1e-6 if dtype in SINGLE else 1e-14)
    assert (left <= 1.2 * rtol).all()
    assert info.converged.all()
    assert info.reason == "converged"
    assert torch.equal(M, given[0])
    assert torch.equal(b, given[1])


def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
    return ((x @ params["w"]).tanh() + params["b"]).pow(2).sum() + params["w"].pow(4).sum()


def params_and_data() -> tuple[dict[str, Tensor], Tensor]:
    params = {"w": torch.randn(3, 2), "b": torch.randn(2)}
    return {key: value.double() for key, value in params.items()}, torch.randn(5, 3, dtype=torch.float64)


@pytest.mark.parametrize("method", METHODS)
def test_trees_in_and_out(method: Any) -> None:
    params, data = params_and_data()
    A = operators.hessian(loss)(params, data) + 60.0
    flat = torch.cat([params["w"].reshape(-1), params["b"]])
    H = torch.func.hessian(lambda v: loss({"w": v[:6].reshape(3, 2), "b": v[6:]}, data))(flat)
    right = {"w": torch.randn(3, 2, dtype=torch.float64), "b": torch.randn(2, dtype=torch.float64)}
    b = torch.cat([right["w"].reshape(-1), right["b"]])
    expected = torch.linalg.solve(H + 60 * torch.eye(8, dtype=torch.float64), b)
    x = operators.solve(A, right, method, rtol=1e-12)
    assert set(x) == {"w", "b"}
    assert_close(x["b"], expected[6:], rtol=1e-9, atol=1e-11)
    assert_close(x["w"], expected[:6].reshape(3, 2), rtol=1e-9, atol=1e-11)
    assert_close(operators.solve(A, b, method, rtol=1e-12), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_many_unknowns(method: Any, dtype: torch.dtype) -> None:
    """Eigenvalues 2 to 4, or of both signs for MINRES, whose eigenvectors are all that one wave is multiplied by."""
    n = 5000
    values = 3 + torch.sin(torch.arange(n)) if method != "minres" else 3 * (-1) ** torch.arange(n)
    phase = torch.exp(1j * torch.arange(n)) if dtype.is_complex else torch.ones(n)
    phase, values = phase.to(dtype), values.to(dtype)

    def matvec(v: Tensor) -> Tensor:  # D* R' diag(values) R D, with a rotation R of neighbours
        turned = phase * v
        turned = values * (0.6 * turned + 0.8 * turned.roll(n // 2) * SIGNS)
        return phase.conj() * (0.6 * turned + 0.8 * (turned * SIGNS).roll(-(n // 2)))

    A = operators.from_matvec(matvec, torch.zeros(n, dtype=dtype), symmetric=method != "gmres")
    x = torch.randn(n, 3, dtype=dtype)
    B = torch.stack([matvec(column) for column in x.unbind(1)], 1)
    found = operators.solve(A, B, method, rtol=1e-5, check=False)
    assert_close(found, x, rtol=1e-3, atol=1e-3)


SIGNS = torch.tensor([1.0, -1.0]).repeat_interleave(2500)


def test_method_is_chosen_by_what_is_known_of_the_operator() -> None:
    M = matrix("cg", 7)
    taken = {
        "cg": Counted(M, positive=True).operator,
        "minres": Counted(M, symmetric=True).operator,
        "gmres": operators.from_matrix(M),
        "lsmr": operators.from_matrix(M[:, :5]),
    }
    for method, A in taken.items():
        assert operators.solve(A, torch.ones(7, dtype=torch.float64), info=True)[1].method == method


@pytest.mark.parametrize("method", METHODS)
def test_steps_are_about_as_many_as_scipys(method: Any) -> None:
    M, b = matrix(method, 60), torch.randn(60, dtype=torch.float64)
    _, info = operators.solve(operators.from_matrix(M), b, method, rtol=1e-6, info=True)
    steps: list[Any] = []
    match method:
        case "cg":
            scipy.sparse.linalg.cg(M.numpy(), b.numpy(), rtol=1e-6, callback=steps.append)
        case "minres":
            scipy.sparse.linalg.minres(M.numpy(), b.numpy(), rtol=1e-6, callback=steps.append)
        case "gmres":
            scipy.sparse.linalg.gmres(
                M.numpy(), b.numpy(), rtol=1e-6, callback=steps.append, callback_type="pr_norm"
            )
        case "lsmr":
            count = scipy.sparse.linalg.lsmr(M.numpy(), b.numpy(), atol=1e-6, btol=1e-6, maxiter=600)[2]
            steps = [None] * count
    # SciPy's MINRES and LSMR also stop by the norms of A and x.
    assert abs(info.iterations.item() - len(steps)) <= (2 if method in ("cg", "gmres") else 0.15 * len(steps))


@pytest.mark.parametrize("method", METHODS)
def test_ill_conditioned_matrix_with_a_closed_form(method: Any) -> None:
    n = 150
    x = operators.solve(
        operators.from_matrix(second_differences(n)),
        torch.ones(n, dtype=torch.float64),
        method,
        rtol=1e-11,
        restart=n,
    )
    i = torch.arange(1, n + 1, dtype=torch.float64)
    assert_close(x, i * (n + 1 - i) / 2, rtol=1e-7, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_each_right_hand_side_stops_by_itself(method: Any) -> None:
    """One is an eigenvector, one is zero, one is small: it is no more exact for being so."""
    values = torch.linspace(1, 9, 20, dtype=torch.float64)
    Q, _ = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64))
    M = (Q * values) @ Q.mT
    b = torch.randn(20, dtype=torch.float64)
    B = torch.stack([Q[:, 4], b, torch.zeros(20, dtype=torch.float64), 1e-12 * b], 1)
    counted = Counted(M, positive=True)
    X, info = operators.solve(counted.operator, B, method, rtol=1e-9, info=True)
    assert_close(X[:, 0], Q[:, 4] / values[4], rtol=1e-8, atol=1e-12)
    assert_close(X[:, 1], torch.linalg.solve(M, b), rtol=1e-7, atol=1e-9)
    assert torch.equal(X[:, 2], torch.zeros(20, dtype=torch.float64))
    assert_close(X[:, 3], 1e-12 * X[:, 1], rtol=1e-7, atol=1e-20)
    first, second, zero, small = info.iterations.tolist()
    assert (first, zero) == (1, 0)
    assert second > 5
    assert abs(second - small) <= 1  # rounding
    # One block product for all of them in each step, and few around.
    per_step = 2 if method == "lsmr" else 1
    assert counted.products + counted.adjoints <= per_step * max(second, small) + 6
    alone = operators.solve(operators.from_matrix(M), Q[:, 4], method, rtol=1e-9, check=False)
    assert_close(X[:, 0], alone, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", ["cg", "minres", "gmres"])
def test_a_step_takes_one_product(method: Any) -> None:
    counted = Counted(matrix("cg", 40), positive=True)
    with torch.no_grad():
        _, info = operators.solve(
            counted.operator, torch.randn(40, dtype=torch.float64), method, rtol=1e-7, restart=40, info=True
        )
    assert counted.products == info.iterations.item() + 1
    assert counted.adjoints == 0


def test_fifty_steps_of_cg_take_at_most_fifty_two_products() -> None:
    counted = Counted(second_differences(400), positive=True)
    with pytest.warns(ConvergenceWarning):
        operators.solve(counted.operator, torch.ones(400, dtype=torch.float64), "cg", maxiter=50)
    assert counted.products == 52


@pytest.mark.parametrize("method", METHODS)
def test_warm_start(method: Any) -> None:
    M, b = matrix(method, 60), torch.randn(60, dtype=torch.float64)
    A, x = operators.from_matrix(M), torch.linalg.solve(M, b)
    _, cold = operators.solve(A, b, method, rtol=1e-6, info=True)
    near = x + 1e-6 * torch.randn(60, dtype=torch.float64)
    found, warm = operators.solve(A, b, method, rtol=1e-6, x0=near, info=True)
    assert 0 < warm.iterations < cold.iterations
    assert_close(found, x, rtol=1e-4, atol=1e-5)
    exact, none = operators.solve(A, b, method, rtol=1e-6, x0=x, info=True)
    assert none.iterations == 0
    assert torch.equal(exact, x)
    assert none.history.shape == (0,)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_to_solve(method: Any) -> None:
    double = torch.float64
    zero = torch.zeros(4, dtype=double)
    M = matrix(method, 4)
    A = operators.from_matrix(M)
    x, info = operators.solve(A, zero, method, x0=torch.ones(4, dtype=double), info=True)
    assert torch.equal(x, zero)
    assert info.iterations == 0
    assert info.converged
    assert operators.solve(A, torch.zeros(4, 0, dtype=double), method).shape == (4, 0)
    empty = operators.from_matrix(torch.zeros(0, 0))
    assert operators.solve(empty, torch.zeros(0), method).shape == (0,)
    one = operators.from_matrix(torch.tensor([[4.0]]))
    assert operators.solve(one, torch.tensor([2.0]), method).item() == 0.5


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("method", METHODS)
def test_squares_of_small_and_large_numbers_are_not_needed(method: Any, scale: float) -> None:
    M, b = matrix(method, 12, torch.float32), torch.randn(12)
    x = operators.solve(operators.from_matrix(M), scale * b, method)
    assert_close(x / scale, torch.linalg.solve(M, b), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_residual_is_that_of_the_solution_where_rounding_stops_the_iteration(method: Any) -> None:
    M = second_differences(60).float()
    b = torch.randn(60)
    with pytest.warns(ConvergenceWarning, match="More steps do not make it smaller"):
        x, info = operators.solve(
            operators.from_matrix(M), b, method, rtol=1e-12, restart=60, maxiter=5000, info=True
        )
    left = (b.double() - M.double() @ x.double()).norm() / b.norm()
    assert info.residual_norm.item() == pytest.approx(left.item(), rel=0.5)
    assert info.reason == "stagnated"
    assert not info.converged


def test_not_converging_is_a_warning_with_figures() -> None:
    A = operators.from_matrix(second_differences(50))
    b = torch.eye(50, dtype=torch.float64)[:, :2]
    with pytest.warns(
        ConvergenceWarning,
        match=r"cg has not converged after 7 of 7 steps: the residual is .*"
        r"of b for 2 of 2 right-hand sides, where 1\.0e-05 was asked for. Raise maxiter",
    ) as caught:
        x, info = operators.solve(A, b, "cg", maxiter=7, info=True)
    assert caught[0].filename == __file__
    assert info.iterations.tolist() == [7, 7]
    assert info.reason == "maxiter"
    assert info.history.shape == (7, 2)
    assert_close(info.history[0], torch.ones(2, dtype=torch.float64))
    left = (b - second_differences(50) @ x).norm(dim=0)
    assert_close(info.residual_norm, left)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operators.solve(A, b, "cg", atol=0.9, rtol=0.0, maxiter=50)


@pytest.mark.parametrize("method", ["cg", "minres"])
def test_operator_that_is_not_symmetric_is_refused(method: Any) -> None:
    M, b = matrix("gmres", 9), torch.randn(9, dtype=torch.float64)
    with pytest.raises(
        SolverError, match=r"operators\.solve: expected a symmetric operator .* method='gmres'"
    ):
        operators.solve(operators.from_matrix(M), b, method)
    symmetric = (M + M.T) / 2 + 20 * torch.eye(9, dtype=torch.float64)
    counted = Counted(symmetric)
    operators.solve(counted.operator, b, method)
    with_check = counted.products
    counted.products = 0
    operators.solve(counted.operator, b, method, check=False)
    assert with_check == counted.products + 1


def test_nan_is_an_error_with_its_step() -> None:
    calls = 0

    def matvec(v: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return v * torch.arange(1.0, 9.0) * (torch.nan if calls == 4 else 1)

    A = operators.from_matvec(matvec, torch.zeros(8), positive=True, check=False)
    for method in ("cg", "minres", "gmres"):
        calls = 0
        with pytest.raises(SolverError, match=f"{method} has NaN or infinities after step 4"):
            operators.solve(A, torch.ones(8), method)
    fine = operators.from_matrix(torch.eye(8))
    for b, x0 in ((torch.full((8,), torch.inf), None), (torch.ones(8), torch.full((8,), torch.nan))):
        with pytest.raises(SolverError, match="b, or A @ x0, holds NaN"):
            operators.solve(fine, b, "gmres", x0=x0)


def test_progress_bar(capsys: Any) -> None:
    A = operators.from_matrix(matrix("cg", 10))
    operators.solve(A, torch.ones(10, dtype=torch.float64), "cg", progress=True)
    text = capsys.readouterr().err
    assert "operators.solve: cg" in text
    assert "step/s" in text
    assert "residual" in text


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"method": "bicg"}, OptionError, "method are 'auto', 'cg'"),
        ({"rtol": -1.0}, OptionError, "rtol to be a number of at least 0"),
        ({"maxiter": 0}, OptionError, "maxiter is a positive int"),
        ({"restart": 2.5}, OptionError, "restart is a positive int"),
        ({"A": torch.eye(3)}, LeafError, r"operators\.from_matrix\(M\)"),
        ({"b": torch.ones(4)}, ShapeError, r"shape \[3\]"),
        ({"b": torch.ones(3, dtype=torch.float64)}, DtypeError, "float64"),
        ({"b": {"w": torch.ones(3)}}, StructureError, "b"),
        ({"x0": torch.ones(3, 2)}, ShapeError, "as many vectors in x0 as in b, got 2 and 1"),
        ({"preconditioner": operators.diagonal(torch.ones(2))}, ShapeError, r"preconditioner\.domain"),
        ({"preconditioner": torch.eye(3)}, LeafError, "preconditioner to be an operator"),
        ({"A": operators.from_matrix(torch.ones(4, 3)), "b": torch.ones(4)}, ShapeError, "method='lsmr'"),
        ({"A": operators.diagonal(torch.ones(3).half()), "b": torch.ones(3).half()}, DtypeError, "float16"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], match: str) -> None:
    call = {"A": operators.from_matrix(torch.eye(3)), "b": torch.ones(3), "method": "gmres"} | change
    with pytest.raises(error, match=match):
        operators.solve(**call)


@pytest.mark.skipif(_torch.version < TorchVersion("2.13"), reason="older tracers are not supported")
def test_compiled_code_is_interrupted_by_a_solver() -> None:
    M, b = matrix("cg", 5), torch.ones(5, dtype=torch.float64)
    double = lambda b: 2 * operators.solve(operators.from_matrix(M), 3 * b, "cg")
    assert_close(
        torch.compile(double, backend="eager")(b), 6 * torch.linalg.solve(M, b), rtol=1e-4, atol=1e-6
    )
    once = torch.compile(
        lambda b: operators.solve(operators.from_matrix(M), b, "cg"), backend="eager", fullgraph=True
    )
    with pytest.raises(torch._dynamo.exc.Unsupported, match="how many steps are taken depends"):
        once(b)


# Derivatives.


def family(method: str, t: Tensor) -> Tensor:
    """A matrix that depends on a number."""
    n = 5
    M = 0.3 * torch.sin(1.3 * torch.arange(n * n, dtype=t.dtype).reshape(n, n))
    if method in ("cg", "minres"):
        M = M + M.mT
    signs = (-1) ** torch.arange(n) if method == "minres" else 1
    return torch.diag((torch.arange(n, dtype=t.dtype) + 4) * signs) + M * t.sin() + t**2 / 10


RIGHT = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0], dtype=torch.float64)


def cubes(method: Any, t: Tensor, b: Tensor, **options: Any) -> Tensor:
    A = operators.from_matrix(family(method, t))
    return (operators.solve(A, b, method, rtol=1e-13, **options) ** 3).sum()


def exact_cubes(method: str, t: float) -> float:
    M = family(method, torch.tensor(t, dtype=torch.float64)).numpy()
    return float((np.linalg.solve(M, RIGHT.numpy()) ** 3).sum())


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_derivatives_are_those_of_finite_differences(method: Any, preconditioned: bool) -> None:
    t, h = torch.tensor(0.7, dtype=torch.float64), 1e-3
    M = operators.diagonal(1.0 / torch.arange(4, 9, dtype=torch.float64)) if preconditioned else None
    func = lambda t: cubes(method, t, RIGHT, preconditioner=M)
    far2, far1, here, near1, near2 = (exact_cubes(method, 0.7 + i * h) for i in (-2, -1, 0, 1, 2))
    first = (far2 - 8 * far1 + 8 * near1 - near2) / (12 * h)
    second = (-far2 + 16 * far1 - 30 * here + 16 * near1 - near2) / (12 * h * h)
    for once in (ad.grad(func), ad.jacfwd(func)):
        assert once(t).item() == pytest.approx(first, rel=1e-7)
        for twice in (ad.grad(once), ad.jacfwd(once)):
            assert twice(t).item() == pytest.approx(second, rel=1e-6)
    tracked = t.clone().requires_grad_()
    func(tracked).backward()
    assert tracked.grad is not None
    assert tracked.grad.item() == pytest.approx(first, rel=1e-7)


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0)])
@pytest.mark.parametrize("method", METHODS)
def test_inside_vmap(method: Any, in_dims: tuple[int | None, int | None]) -> None:
    t = torch.tensor([0.1, 0.7, 1.9], dtype=torch.float64)
    b = torch.stack([RIGHT, torch.zeros_like(RIGHT), 2 * RIGHT.flip(0)])
    given = (t if in_dims[0] == 0 else t[1], b if in_dims[1] == 0 else b[0])

    def solution(t: Tensor, b: Tensor) -> Tensor:
        return operators.solve(operators.from_matrix(family(method, t)), b, method, rtol=1e-12)

    def exact(t: Tensor, b: Tensor) -> Tensor:
        return torch.linalg.solve(family(method, t), b)

    assert_close(
        ad.vmap(solution, in_dims)(*given), torch.vmap(exact, in_dims)(*given), rtol=1e-9, atol=1e-11
    )
    gradients = ad.vmap(ad.grad(lambda *a: solution(*a).pow(3).sum()), in_dims)(*given)
    expected = torch.vmap(torch.func.grad(lambda *a: exact(*a).pow(3).sum()), in_dims)(*given)
    assert_close(gradients, expected, rtol=1e-8, atol=1e-10)


def test_newton_steps_of_many_points_at_once() -> None:
    """vmap over the arguments of a Hessian, and over an operator itself."""
    point = torch.randn(4, 3, dtype=torch.float64)
    func = lambda x: x.pow(4).sum() + (x * x.roll(1)).sum() + 2 * x.pow(2).sum()

    def step(x: Tensor) -> Tensor:
        return operators.solve(operators.hessian(func)(x), ad.grad(func)(x), rtol=1e-12)

    H, g = torch.vmap(torch.func.hessian(func))(point), torch.vmap(torch.func.grad(func))(point)
    expected = torch.linalg.solve(H, g)
    assert_close(ad.vmap(step)(point), expected, rtol=1e-9, atol=1e-11)
    many = ad.vmap(operators.from_matrix)(H)  # an operator whose leaf has one more dimension
    found = ad.vmap(lambda one, b: operators.solve(one, b, rtol=1e-12))(many, g)
    assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_captured_tensors_are_differentiated() -> None:
    w, n = torch.tensor(2.0, dtype=torch.float64), 5
    b = torch.arange(n, dtype=torch.float64)

    def total(w: Tensor) -> Tensor:
        A = operators.from_matvec(
            lambda v: w * v + (v.roll(1) + v.roll(-1)) / 10, torch.zeros_like(b), symmetric=True, check=False
        )
        return operators.solve(A, b, rtol=1e-12).pow(2).sum()

    def exact(w: Tensor) -> Tensor:
        unit = torch.eye(n, dtype=torch.float64)
        return torch.linalg.solve(w * unit + (unit.roll(1, 0) + unit.roll(-1, 0)) / 10, b).pow(2).sum()

    assert_close(ad.grad(total)(w), torch.func.grad(exact)(w))
    assert_close(ad.grad(ad.grad(total))(w), torch.func.grad(torch.func.grad(exact))(w))


def test_info_of_each_sample() -> None:
    M, B = second_differences(6), torch.randn(3, 6, dtype=torch.float64)
    B[1] = torch.linalg.eigh(M).eigenvectors[:, 2]
    X, info = ad.vmap(lambda b: operators.solve(operators.from_matrix(M), b, "cg", info=True))(B)
    assert_close(X, torch.linalg.solve(M, B, left=False), rtol=1e-4, atol=1e-6)
    assert info.iterations.tolist() == [6, 1, 6]
    assert info.converged.all()
    assert info.history.shape == (3, 6)


def test_derivative_that_has_not_converged_is_a_warning() -> None:
    """The solution itself is known from the start."""
    M = second_differences(40)
    b = torch.ones(40, dtype=torch.float64, requires_grad=True)
    x0 = torch.linalg.solve(M, b.detach())
    x = operators.solve(operators.from_matrix(M), b, "cg", x0=x0, maxiter=3)
    with pytest.warns(ConvergenceWarning, match="in a derivative, cg has not converged after 3 of 3 steps"):
        x.sum().backward()


@pytest.mark.parametrize("method", METHODS)
def test_solved_right_hand_side_stays_as_it_is(method: Any) -> None:
    """While the others go on. A diagonal has the same products for one vector and for many."""
    values = torch.linspace(1, 30, 25, dtype=torch.float64)
    A = operators.diagonal(values)
    easy = torch.zeros(25, dtype=torch.float64)
    easy[3:7] = 1 + torch.rand(4, dtype=torch.float64)
    B = torch.stack([easy, torch.randn(25, dtype=torch.float64)], 1)
    X, info = operators.solve(A, B, method, rtol=1e-3, info=True)
    assert info.iterations[0] < info.iterations[1] - 1
    assert_close(X[:, 0], operators.solve(A, easy, method, rtol=1e-3), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("method", METHODS)
def test_history_is_that_of_the_residuals(method: Any) -> None:
    M, b = matrix(method, 20), torch.randn(20, dtype=torch.float64)
    A = operators.from_matrix(M)
    with pytest.warns(ConvergenceWarning):
        _, info = operators.solve(A, b, method, maxiter=9, info=True)
    with pytest.warns(ConvergenceWarning):
        x = operators.solve(A, b, method, maxiter=8)
    assert_close(info.history[8], (b - M @ x).norm() / b.norm(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("method", ["cg", "minres", "gmres"])
def test_newton_step_is_differentiated_twice(method: Any) -> None:
    """Through the Hessian of a model in its parameters, against a dense Hessian."""
    params, data = params_and_data()
    flat = torch.cat([params["w"].reshape(-1), params["b"]])
    as_tree = lambda v: {"w": v[:6].reshape(3, 2), "b": v[6:]}
    right = torch.randn(8, dtype=torch.float64)

    def found(v: Tensor) -> Tensor:
        A = operators.hessian(loss)(as_tree(v), data) + 60.0
        return operators.solve(A, as_tree(right), method, rtol=1e-13)["w"].pow(3).sum()

    def exact(v: Tensor) -> Tensor:
        H = torch.func.hessian(lambda v: loss(as_tree(v), data))(v)
        return torch.linalg.solve(H + 60 * torch.eye(8, dtype=torch.float64), right)[:6].pow(3).sum()

    assert_close(ad.grad(found)(flat), torch.func.grad(exact)(flat), rtol=1e-8, atol=1e-14)
    expected = torch.func.hessian(exact)(flat)
    assert_close(ad.hessian(found)(flat), expected, rtol=1e-6, atol=1e-14)
    assert_close(ad.jacfwd(ad.grad(found))(flat), expected, rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_squares_of_an_operators_numbers_may_overflow_or_underflow(method: str, scale: float) -> None:
    # LSMR called zero a solution of the small ones, and the others did not find one.
    M, B = matrix(method, 6), torch.randn(6, 2, dtype=torch.float64)
    A = operators.from_matrix((scale * M).float())
    expected = torch.linalg.solve(scale * M, B)
    X, info = operators.solve(A, B.float(), method, rtol=1e-4, check=False, info=True)
    assert info.reason == "converged"
    assert_close(X.double() * scale, expected * scale, rtol=0.02, atol=0.02)
    batch = ad.vmap(
        lambda c: operators.solve(
            operators.from_matrix(c * M.float()), B.float(), method, rtol=1e-4, check=False
        )
    )(torch.tensor([1.0, scale]))
    assert_close(batch[1].double() * scale, batch[0].double(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_preconditioner_of_an_operator_of_an_unusual_size(method: str, scale: float) -> None:
    M = torch.diag(torch.linspace(1, 50, 8, dtype=torch.float64)) + 0.01
    A = operators.from_matrix((scale * M).float())
    b = torch.ones(8)
    x, info = operators.solve(
        A, b, method, rtol=1e-4, check=False, preconditioner=operators.jacobi(A), info=True
    )
    assert info.reason == "converged"
    assert info.iterations <= 6
    assert_close(x.double() * scale, torch.linalg.solve(M, b.double()), rtol=1e-3, atol=1e-4)
