"""Roots, fixed points and minima that a solver found, differentiated: against closed forms."""

import gc
import math
import weakref

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import nn

import autodiff as ad
from autodiff import operators
from autodiff.errors import (
    CaptureError,
    ConvergenceWarning,
    DtypeError,
    InPlaceError,
    LeafError,
    OutputError,
    ShapeError,
    SingularError,
    StructureError,
)
from autodiff.operators import answers
from mode_combinations import BATCHES, COMBINATIONS, by_autograd, expected_in_batch
from scenarios import assert_close

GENERATOR = torch.Generator().manual_seed(5)


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR)


def number(value):
    return torch.tensor(value, dtype=torch.float64)


X, Y, X_VAL, Y_VAL = random(7, 3), random(7), random(5, 3), random(5)
WEIGHT = random(3)
IDENTITY = torch.eye(3, dtype=torch.float64)
START = {"w": torch.zeros(3, dtype=torch.float64), "steps": 4}
LAM, LAMS = number(0.6), torch.tensor([0.6, 1.1, 2.0], dtype=torch.float64)


# Ridge regression, whose solution is known.


def ridge_objective(params, lam, y):
    return ((X @ params["w"] - y) ** 2).sum() / 2 + lam * (params["w"] ** 2).sum() / 2


def ridge(lam, y):
    return torch.linalg.inv(X.mT @ X + lam * IDENTITY) @ X.mT @ y


def newton(objective, start, *args):
    """One step of Newton's method: a quadratic has its minimum there."""
    w = start["w"]
    of_w = lambda w: objective({**start, "w": w}, *args)
    return {**start, "w": w - torch.linalg.solve(ad.hessian(of_w)(w), ad.grad(of_w)(w))}


@operators.minimum(ridge_objective)
def by_newton(start, lam, y):
    return newton(ridge_objective, start, lam, y)


@operators.minimum(ridge_objective)
def by_scipy(start, lam, y):
    """What no tracer follows, and no level either."""
    x, y, lam = X.numpy(), y.numpy(), float(lam)
    objective = lambda w: ((x @ w - y) ** 2).sum() / 2 + lam * (w**2).sum() / 2
    gradient = lambda w: x.T @ (x @ w - y) + lam * w
    options = {"xtol": 1e-15}
    hess = lambda _: x.T @ x + lam * np.eye(3)
    found = scipy.optimize.minimize(
        objective, start["w"].numpy(), jac=gradient, hess=hess, method="Newton-CG", options=options
    )
    return {**start, "w": torch.as_tensor(found.x)}


@operators.root(lambda params, lam, y: {"w": X.mT @ (X @ params["w"] - y) + lam * params["w"], "steps": None})
def by_equations(start, lam, y):
    return {**start, "w": ridge(lam, y)}


@operators.fixed_point(
    lambda params, lam, y: {
        **params,
        "w": params["w"] - (X.mT @ (X @ params["w"] - y) + lam * params["w"]) / 20,
    }
)
def by_descent(start, lam, y):
    w = start["w"]
    for _ in range(600):
        w = w - (X.mT @ (X @ w - y) + lam * w) / 20
    return {**start, "w": w}


def closed_over(start, lam, y):
    """The way a function is written inside another one: all is captured."""

    @operators.minimum(lambda params: ridge_objective(params, lam, y))
    def fit(start):
        return newton(ridge_objective, start, lam, y)

    return fit(start)


SOLVERS = {
    "minimum": by_newton,
    "root": by_equations,
    "fixed point": by_descent,
    "captured": closed_over,
    "SciPy": by_scipy,
}


def of_solver(solver):
    return lambda lam, y: (WEIGHT * solver(START, lam, y)["w"]).sin().sum()


def of_ridge(lam, y):
    return (WEIGHT * ridge(lam, y)).sin().sum()


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
class TestRidge:
    @pytest.mark.parametrize(("derivative", "order"), COMBINATIONS.values(), ids=COMBINATIONS)
    def test_mode_combination(self, solver, derivative, order):
        assert_close(derivative(of_solver(solver), LAM, Y), by_autograd(of_ridge, LAM, Y)[order])

    @pytest.mark.parametrize(("derivative", "order"), BATCHES.values(), ids=BATCHES)
    def test_batch(self, solver, derivative, order):
        if solver is by_scipy:
            with pytest.raises(RuntimeError) as caught:
                derivative(of_solver(solver), LAMS, Y)
            assert "fallback='loop'" in caught.value.__notes__[0]
            return
        assert_close(derivative(of_solver(solver), LAMS, Y), expected_in_batch(of_ridge, LAMS, Y, order))

    def test_finite_differences(self, solver):
        ad.testing.check_grads(of_solver(solver), (LAM, Y), order=2, atol=1e-6, rtol=1e-6)

    def test_iterations_where_the_matrix_is_large(self, solver, monkeypatch):
        monkeypatch.setattr(answers, "_DENSE", 0)
        gradient, hessian = by_autograd(of_solver(solver), LAM, Y)
        expected = by_autograd(of_ridge, LAM, Y)
        assert_close(gradient, expected[0], loose=True)
        assert_close(hessian, expected[1], loose=True)


def test_slope_of_ridge_in_closed_form():
    w, inverse = ridge(LAM, Y), torch.linalg.inv(X.mT @ X + LAM * IDENTITY)
    of_lam = lambda lam: by_newton(START, lam, Y)["w"]
    assert_close(ad.jacobian(of_lam)(LAM), -inverse @ w)
    assert_close(ad.jacobian(ad.jacobian(of_lam))(LAM), 2 * inverse @ inverse @ w)


def test_hyperparameter_gradient_in_closed_form():
    def validation_loss(log_lam):
        return ((X_VAL @ by_newton(START, log_lam.exp(), Y)["w"] - Y_VAL) ** 2).mean()

    inverse = torch.linalg.inv(X.mT @ X + LAM * IDENTITY)
    w = ridge(LAM, Y)
    slope = 2 / 5 * (X_VAL @ w - Y_VAL) @ X_VAL @ (-inverse @ w) * LAM
    assert_close(ad.grad(validation_loss)(LAM.log()), slope)


def test_samples_one_by_one_through_scipy():
    gradients = ad.vmap(ad.grad(of_solver(by_scipy)), (0, None), fallback="loop")(LAMS, Y)
    assert_close(gradients, expected_in_batch(of_ridge, LAMS, Y, 0))


# Equations of numbers.


def test_square_root():
    @operators.root(lambda x, a: x**2 - a)
    def square_root(start, a):
        x = start
        while ((x**2 - a).abs() > 1e-14 * a).any():
            x = (x + a / x) / 2
        return x

    of_a = lambda a: square_root(torch.ones_like(a), a)
    a = number(3.7)
    assert_close(ad.grad(of_a)(a), 1 / (2 * a.sqrt()))
    assert_close(ad.grad(ad.grad(of_a))(a), -1 / (4 * a**1.5))
    assert_close(ad.grad(ad.grad(ad.grad(of_a)))(a), 3 / (8 * a**2.5))


def test_kepler():
    @operators.root(lambda E, M, e: E - e * E.sin() - M)
    def anomaly(start, M, e):
        E = start + M
        for _ in range(30):
            E = E - (E - e * E.sin() - M) / (1 - e * E.cos())
        return E

    M, e = number(0.8), number(0.35)
    of_both = lambda M, e: anomaly(number(0.0), M, e)
    E = of_both(M, e)
    slope = 1 / (1 - e * E.cos())
    assert_close(ad.grad(of_both, (0, 1))(M, e), (slope, slope * E.sin()))
    assert_close(ad.grad(ad.grad(of_both))(M, e), -e * E.sin() * slope**3)
    assert_close(ad.jacfwd(ad.jacfwd(of_both))(M, e), -e * E.sin() * slope**3)
    Ms = torch.linspace(0.1, 3.0, 4, dtype=torch.float64)
    assert_close(
        ad.vmap(ad.grad(of_both), (0, None))(Ms, e), torch.stack([ad.grad(of_both)(one, e) for one in Ms])
    )


def test_fixed_point_of_a_cosine():
    @operators.fixed_point(lambda x, a: (a * x).cos())
    def iterate(start, a):
        for _ in range(200):
            start = (a * start).cos()
        return start

    a = number(0.9)
    x = iterate(number(0.5), a)
    assert_close(ad.grad(lambda a: iterate(number(0.5), a))(a), -x * (a * x).sin() / (1 + a * (a * x).sin()))


def test_complex_root_is_differentiated_holomorphically():
    @operators.root(lambda z, a: z**3 - a)
    def cube_root(start, a):
        del start
        return a ** (1 / 3)

    a = torch.tensor(1.5 + 0.7j, dtype=torch.complex128)
    slope = ad.grad(lambda a: cube_root(torch.ones_like(a), a), holomorphic=True)(a)
    assert_close(slope, a ** (-2 / 3) / 3)


def test_scales_of_equations_do_not_matter():
    scales = torch.tensor([1.0, 1e-14, 1e10], dtype=torch.float64)

    @operators.root(lambda x, a: scales * (x - a**2))
    def square(start, a):
        del start
        return a**2

    a = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert_close(ad.jacobian(lambda a: square(torch.zeros_like(a), a))(a), torch.diag(2 * a))


# What a solver may be, and what it is called with.


def test_trees_and_numbers_that_are_not_differentiated():
    def objective(x, target, power, *, weights):
        return (weights[0] * (x["a"] - target["a"]) ** power).sum() + weights[1] * (
            (x["b"][0] - target["b"]) ** 2
        ).sum()

    @operators.minimum(objective)
    def fit(start, target, power, *, weights, tolerance):
        assert (power, tolerance) == (2, 1e-9)
        assert not target["a"].requires_grad
        assert weights[0] > 0
        return {"a": target["a"].clone(), "b": [target["b"].clone(), None]}

    start = {"a": torch.zeros(2, 3), "b": [torch.zeros(2), None]}
    target = {"a": torch.ones(2, 3), "b": torch.tensor([1.0, 2.0])}

    def total(target, weights):
        x = fit(start, target, 2, weights=weights, tolerance=1e-9)
        return (2 * x["a"]).sum() + x["b"][0].prod()

    of_target, of_weights = ad.grad(total, (0, 1))(target, (torch.tensor(3.0), torch.tensor(1.0)))
    assert_close(of_target, {"a": torch.full((2, 3), 2.0), "b": torch.tensor([2.0, 1.0])})
    assert_close(of_weights, (torch.tensor(0.0), torch.tensor(0.0)))


def test_tensors_of_integers_among_the_arguments():
    rows = torch.tensor([0, 2, 2])

    @operators.minimum(lambda x, a, rows: ((x - a[rows]) ** 2).sum())
    def pick(start, a, rows):
        del start
        return a[rows]

    jacobian = ad.jacobian(lambda a: pick(torch.zeros(3), a, rows))(torch.arange(4.0))
    assert_close(jacobian, nn.functional.one_hot(rows, 4).float())


def test_start_by_keyword_has_derivative_zero():
    @operators.root(lambda x, a: x - 2 * a)
    def double(start, a):
        return 2 * a + 0 * start

    slopes = ad.grad(lambda s, a: double(a=a, start=s), (0, 1))(number(1.0), number(3.0))
    assert_close(slopes, (number(0.0), number(2.0)))


def test_start_may_be_written():
    @operators.minimum(lambda x, a: ((x - a) ** 2).sum())
    def fit(start, a):
        x = start.requires_grad_()
        optimizer = torch.optim.SGD([x], lr=0.5)
        with torch.enable_grad():
            ((x - a) ** 2).sum().backward()
        optimizer.step()
        return x

    start, a = torch.zeros(3, dtype=torch.float64), random(3)
    assert_close(ad.jacobian(lambda a: fit(start, a))(a), IDENTITY)
    assert_close(start, torch.zeros(3, dtype=torch.float64))
    assert not start.requires_grad


def test_aux_is_a_constant():
    @operators.root(lambda x, a: x - a**2, has_aux=True)
    def square(start, a):
        del start
        return a**2, {"steps": 3, "a": a}

    a = number(3.0).requires_grad_()
    x, aux = square(number(0.0), a)
    assert x.requires_grad
    assert aux["steps"] == 3
    assert not aux["a"].requires_grad


def test_methods_and_names_stay():
    class Model:
        @operators.root(lambda x, a: x - a)
        def same(self, start, a):
            """Give back."""
            raise NotImplementedError

    assert Model.same.__doc__ == "Give back."


def test_parameters_of_a_module():
    layer = nn.Linear(3, 3).double()
    nn.init.constant_(layer.weight, 0.1)

    @operators.fixed_point(lambda z, x: torch.tanh(layer(z) + x))
    def equilibrium(start, x):
        z = start
        for _ in range(100):
            z = torch.tanh(layer(z) + x)
        return z

    x = random(3)
    z = equilibrium(torch.zeros(3, dtype=torch.float64), x)
    z.sum().backward()
    z = z.detach()
    slope = torch.diag(1 - z**2)
    adjoint = torch.linalg.inv(IDENTITY - slope @ layer.weight.detach()).mT @ torch.ones(
        3, dtype=torch.float64
    )
    assert_close(layer.bias.grad, slope @ adjoint)
    assert_close(layer.weight.grad, torch.outer(slope @ adjoint, z))


def test_more_numbers_than_are_factorised():
    size = 300
    matrix = random(size, size) / size**0.5
    matrix = matrix @ matrix.mT + torch.eye(size, dtype=torch.float64)
    b, w = random(size), random(size)
    fit = operators.minimum(lambda x, b: x @ matrix @ x / 2 - b @ x)(
        lambda start, b: start + torch.linalg.solve(matrix, b)
    )
    slope = ad.grad(lambda b: fit(torch.zeros_like(b), b) @ w)(b)
    torch.testing.assert_close(slope, torch.linalg.solve(matrix, w), rtol=1e-8, atol=1e-9)


def test_minimum_inside_a_minimum():
    inner = operators.minimum(lambda y, x: (y - x**2) ** 2 / 2)(lambda start, x: x**2 + 0 * start)

    def objective(x, a):
        return (inner(number(0.0), x) - a) ** 2 / 2

    outer = operators.minimum(objective)(lambda start, a: a.sqrt() + 0 * start)
    of_a = lambda a: outer(number(0.0), a)
    a = number(2.25)
    assert_close(ad.grad(of_a)(a), number(1 / 3))
    assert_close(ad.hessian(of_a)(a), number(-0.25 * 2.25**-1.5))


def test_leaves_of_several_dtypes():
    start = {"p": torch.zeros(()), "q": number(0.0)}
    objective = lambda x, a: (x["p"] - a) ** 2 + (x["q"] - a.double() ** 2) ** 2
    fit = operators.minimum(objective)(lambda s, a: {"p": a + 0 * s["p"], "q": a.double() ** 2 + 0 * s["q"]})
    total = lambda a: 3 * fit(start, a)["p"].double() + fit(start, a)["q"]
    assert_close(ad.grad(total)(torch.tensor(2.0)), torch.tensor(7.0))
    assert_close(ad.hessian(total)(torch.tensor(2.0)), torch.tensor(2.0))


def test_argument_that_is_written_later_is_an_error():
    fit = operators.root(lambda x, a: x - a**2)(lambda start, a: a**2 + start)
    a = random(3).requires_grad_()
    doubled = 2 * a
    x = fit(torch.zeros_like(a), doubled)
    with torch.no_grad():
        doubled.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()


def test_compiled_around():
    fit = operators.minimum(lambda x, a: ((x - a**2) ** 2).sum())(lambda start, a: a**2 + 0 * start)

    @torch.compile(backend="eager")
    def around(a):
        return ad.grad(lambda a: fit(torch.zeros(3), a).sum())(2 * a) + 1

    assert_close(around(torch.ones(3)), torch.full((3,), 5.0))


def test_objective_is_released_with_the_answer():
    gc.collect()
    gc.disable()
    try:

        def objective(x, a):
            return ((x - a) ** 2).sum()

        fit = operators.minimum(objective)(lambda start, a: a + 0 * start)
        a = random(3).requires_grad_()
        x = fit(torch.zeros_like(a), a)
        x.sum().backward()
        kept = weakref.ref(objective)
        del fit, x, objective
        assert kept() is None
    finally:
        gc.enable()


class TestWhatIsComputed:
    def test_solver_runs_once_and_each_pull_solves_once(self):
        runs, solves = [], []

        def solve(A, b):
            solves.append((A, b))
            return torch.linalg.solve(A.to_matrix(), b)

        @operators.minimum(lambda x, a: ((x - a**2) ** 2).sum(), solve=solve)
        def fit(start, a):
            del start
            runs.append(torch.is_grad_enabled())
            return a**2

        a = random(3).requires_grad_()
        x = fit(torch.zeros_like(a), a)
        assert (runs, solves) == ([False], [])
        for count in (1, 2):
            torch.autograd.grad(x.sum(), a, retain_graph=True)
            assert len(solves) == count
        assert solves[0][0].symmetric
        assert (runs, solves[0][1].shape) == ([False], (3,))

    def test_nothing_is_attached_where_nothing_is_differentiated(self):
        evaluations = []

        def residual(x, a):
            evaluations.append(x)
            return x - a

        square = operators.root(residual)(lambda start, a: start + 5 * a)  # not a root, which nobody asks for
        with torch.no_grad():
            square(number(0.0), number(1.0).requires_grad_())
        assert evaluations == []
        assert not square(number(0.0), number(1.0)).requires_grad


class TestChecks:
    def halves(self, steps, **options):
        @operators.minimum(lambda x, a: ((x - a) ** 2).sum(), **options)
        def fit(start, a):
            x = start
            for _ in range(steps):
                x = (x + a) / 2
            return x

        return lambda a: fit(torch.zeros_like(a), a).sum()

    def test_answer_that_has_not_converged(self):
        with pytest.warns(
            ConvergenceWarning, match=r"operators\.minimum: expected fit .* gradient is zero, .* 0\.25 there"
        ):
            ad.grad(self.halves(3))(number(1.0))

    def test_one_sample_that_has_not_converged(self):
        @operators.root(lambda x, a: x - a)
        def fit(start, a):
            del start
            return a + (a > 2) * 0.5

        with pytest.warns(ConvergenceWarning, match="iterate further|Iterate further"):
            ad.vmap(ad.grad(lambda a: fit(number(0.0), a)))(torch.tensor([1.0, 3.0], dtype=torch.float64))

    def test_answer_that_is_not_a_number(self):
        fit = operators.root(lambda x, a: x - a)(lambda start, a: start + math.nan * a)
        with pytest.warns(ConvergenceWarning, match="nan"):
            ad.grad(lambda a: fit(number(0.0), a))(number(1.0))

    @pytest.mark.parametrize(("steps", "options"), [(40, {}), (3, {"check": False})])
    def test_no_warning(self, steps, options):
        assert_close(ad.grad(self.halves(steps, **options))(number(1.0)), number(1.0))

    def test_start_at_the_answer_and_answer_at_zero(self):
        fit = operators.root(lambda x, a: x - a)(lambda start, a: 0 * start + a)
        for a in (0.0, 1e-30, 1.0):
            assert_close(ad.grad(lambda a: fit(number(1.0), a))(number(a)), number(1.0))

    @pytest.mark.parametrize("transform", [ad.grad, ad.jacfwd, ad.hessian])
    def test_singular_jacobian(self, transform):
        fit = operators.minimum(lambda x, a: (x.sum() - a) ** 2)(lambda start, a: start + a / 2)
        with pytest.raises(SingularError, match=r"operators\.minimum: expected the Hessian .* singular"):
            transform(lambda a: (fit(torch.zeros(2, dtype=torch.float64), a) ** 2).sum())(number(1.0))

    def test_residual_that_does_not_depend_on_one_number(self):
        fit = operators.root(lambda x, a: torch.stack([x[0] - a, 0 * x[1]]))(lambda start, a: start + a)
        with pytest.raises(SingularError, match="the Jacobian of the residual"):
            ad.grad(lambda a: fit(torch.zeros(2), a).sum())(torch.tensor(1.0))

    def test_sample_with_a_singular_jacobian(self):
        fit = operators.root(lambda x, a: a * (x - a))(lambda start, a: 0 * start + a)
        with pytest.raises(SingularError):
            ad.vmap(ad.grad(lambda a: fit(number(1.0), a)))(torch.tensor([1.0, 0.0]).double())


# A residual, a solver, and the error.
WRONG = {
    "another structure": (
        lambda x, a: x - a,
        lambda start, a: (a,),
        StructureError,
        r"<lambda>\(start, \.\.\.\) to be a tree like start",
    ),
    "another shape": (
        lambda x, a: x - a,
        lambda start, a: a[None],
        ShapeError,
        r"shape \(2,\) .* got shape \(1, 2\)",
    ),
    "another dtype": (
        lambda x, a: x - a,
        lambda start, a: a.float(),
        DtypeError,
        "dtype torch.float32. Reshape or convert",
    ),
    "an array": (
        lambda x, a: x - a,
        lambda start, a: a.numpy(),
        LeafError,
        "ndarray. Convert it, as in torch.as_tensor",
    ),
    "residual of another shape": (
        lambda x, a: (x - a).sum(),
        lambda start, a: a,
        ShapeError,
        r"<lambda>\(x\) of shape \(2,\)",
    ),
    "residual of another structure": (
        lambda x, a: [x - a],
        lambda start, a: a,
        StructureError,
        r"<lambda>\(x\) to be a tree like x",
    ),
    "argument written": (
        lambda x, a: x - a,
        lambda start, a: a.mul_(2),
        InPlaceError,
        "other than start",
    ),
}


class TestErrors:
    @pytest.mark.parametrize(("residual", "solver", "error", "words"), WRONG.values(), ids=WRONG)
    def test_refused(self, residual, solver, error, words):
        fit = operators.root(residual)(solver)
        with pytest.raises(error, match=r"operators\.root: .*" + words):
            ad.grad(lambda a: fit(torch.zeros(2, dtype=torch.float64), a).sum())(
                torch.ones(2, dtype=torch.float64)
            )

    def test_objective_that_is_not_scalar(self):
        fit = operators.minimum(lambda x, a: (x - a) ** 2)(lambda start, a: a)
        with pytest.raises(OutputError, match=r"operators\.minimum: .* scalar"):
            ad.grad(lambda a: fit(torch.zeros(2), a).sum())(torch.ones(2))

    def test_complex_minimum(self):
        fit = operators.minimum(lambda x, a: ((x - a).abs() ** 2).sum())(lambda start, a: start + a)
        with pytest.raises(
            DtypeError, match=r"operators\.minimum: expected real tensors in start, .*view_as_real"
        ):
            ad.grad(lambda a: fit(torch.zeros(2) * 1j, a).abs().sum())(torch.ones(2))

    def test_start_without_a_tensor(self):
        with pytest.raises(LeafError, match=r"operators\.root"):
            operators.root(lambda x: x)(lambda start: start)(3)

    def test_pair_is_expected_for_aux(self):
        with pytest.raises(OutputError, match="has_aux"):
            operators.root(lambda x: x, has_aux=True)(lambda start: start)(number(0.0))

    def test_differentiated_keyword_of_the_solver_alone(self):
        fit = operators.root(lambda x, a: x - a)(lambda start, a, speed: 0 * start + a)
        with pytest.raises(
            CaptureError, match=r"operators\.root: speed of <lambda> is differentiated, but <lambda> has no"
        ):
            ad.grad(lambda s: fit(number(0.0), number(1.0), speed=s))(number(1.0))

    @pytest.mark.parametrize("transform", [ad.grad, ad.hessian, lambda f: ad.vmap(ad.grad(f))])
    def test_error_in_the_solver_comes_out(self, transform):
        def failing(start, a):
            raise ValueError("no answer today")

        fit = operators.root(lambda x, a: x - a)(failing)
        with pytest.raises(ValueError, match="no answer today"):
            transform(lambda a: fit(a, a).sum())(torch.ones(2))

    def test_error_in_the_linear_solver_comes_out(self):
        def failing(A, b):
            raise ValueError("no solution today")

        fit = operators.root(lambda x, a: x - a, solve=failing)(lambda start, a: 0 * start + a)
        for transform in (ad.grad, ad.jacfwd, ad.hessian):
            with pytest.raises(ValueError, match="no solution today"):
                transform(lambda a: fit(number(0.0), a))(number(1.0))


@pytest.mark.parametrize("transform", [ad.jacfwd, ad.jacrev, ad.hessian])
def test_solver_differentiates_by_levels_of_its_own_inside_another_minimum(transform):
    # Its levels have the numbers of those around, from which it is taken out: its derivatives were taken for captured.
    inner_objective = lambda x, t: (x**2 - t * x).sum()  # x = t / 2

    @operators.minimum(inner_objective)
    def newton(start, t):
        slope, curvature = (d(inner_objective)(start, t) for d in (torch.func.grad, torch.func.hessian))
        return start - torch.linalg.solve(curvature, slope)

    zero = torch.zeros(2, dtype=torch.float64)

    @operators.minimum(lambda t, c: ((newton(zero, t) - c) ** 2).sum() / 2 + (t**2).sum() / 2)
    def outer(start, c):
        return 0.4 * c

    c = torch.tensor([1.0, -2.0], dtype=torch.float64)
    if transform is ad.hessian:
        found = ad.hessian(lambda c: (outer(zero, c) ** 2).sum())(c) / 0.8
    else:
        found = transform(lambda c: outer(zero, c))(c)
    torch.testing.assert_close(found, 0.4 * torch.eye(2, dtype=torch.float64))
