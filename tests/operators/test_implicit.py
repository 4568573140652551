"""Derivatives of solutions of linear equations, against those of the inverse by plain autograd."""

import gc
import weakref

import pytest
import torch
from torch import nn

import autodiff as ad
from autodiff import operators
from autodiff.errors import CaptureError
from autodiff.operators.implicit import solved
from mode_combinations import BATCHES, COMBINATIONS, by_autograd, expected_in_batch
from scenarios import assert_close

N = 4
GENERATOR = torch.Generator().manual_seed(3)


def random(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=GENERATOR)


G, P, B, WEIGHT = random(N, N), random(N), random(N), random(N)
T, TS = torch.tensor(0.7, dtype=torch.float64), torch.tensor([0.7, 1.4, -0.3], dtype=torch.float64)
IDENTITY = torch.eye(N, dtype=torch.float64)


def dense(A, b):
    return torch.linalg.solve(A.to_matrix(), b)


def asymmetric(t):
    return 3 * IDENTITY + torch.sin(t * G)


def quartic(p, t):
    return (p**4).sum() / 12 + (p * p.roll(1)).sum() * t / 5 + 2 * (p**2).sum()


def hessian_of_quartic(t):
    ring = IDENTITY.roll(1, 0) + IDENTITY.roll(-1, 0)
    return torch.diag(P**2 + 4) + ring * t / 5


def curve(p, t):
    return p**3 + 4 * p + torch.sin(t * G) @ p


def jacobian_of_curve(t):
    return torch.diag(3 * P**2 + 4) + torch.sin(t * G)


def by_products(matrix):
    return operators.from_matvec(lambda v: matrix @ v, P, rmatvec=lambda u: matrix.mT @ u)


# Operators that depend on a number t, and the matrices that they are.
OPERATORS = {
    "matrix": (lambda t: operators.from_matrix(asymmetric(t)), asymmetric),
    "diagonal": (
        lambda t: operators.diagonal(2 + torch.sin(t * P)),
        lambda t: torch.diag(2 + torch.sin(t * P)),
    ),
    "hessian": (lambda t: operators.hessian(quartic)(P, t), hessian_of_quartic),
    "jacobian": (lambda t: operators.jacobian(curve)(P, t), jacobian_of_curve),
    "adjoint": (lambda t: operators.jacobian(curve)(P, t).H, lambda t: jacobian_of_curve(t).mT),
    "sum": (
        lambda t: t * operators.hessian(quartic)(P, t) + (5 + t),
        lambda t: t * hessian_of_quartic(t) + (5 + t) * IDENTITY,
    ),
    "product": (
        lambda t: operators.jacobian(curve)(P, t).H @ operators.jacobian(curve)(P, t),
        lambda t: jacobian_of_curve(t).mT @ jacobian_of_curve(t),
    ),
    "hessian that captures t": (lambda t: operators.hessian(lambda p: quartic(p, t))(P), hessian_of_quartic),
    "jacobian that captures t": (lambda t: operators.jacobian(lambda p: curve(p, t))(P), jacobian_of_curve),
    "function that captures t": (lambda t: operators.from_matvec(lambda v: asymmetric(t) @ v, P), asymmetric),
    "function that captures a matrix": (
        lambda t: by_products(asymmetric(t)),
        asymmetric,
    ),
}
each_operator = pytest.mark.parametrize(("operator", "matrix"), OPERATORS.values(), ids=OPERATORS)


def loss(x):
    return (WEIGHT * x).sin().sum()


def of_operator(operator):
    return lambda t, b: loss(solved(operator(t), b, dense))


def of_matrix(matrix):
    return lambda t, b: loss(torch.linalg.inv(matrix(t)) @ b)


@each_operator
class TestEveryOperator:
    @pytest.mark.parametrize(("derivative", "order"), COMBINATIONS.values(), ids=COMBINATIONS)
    def test_mode_combination(self, operator, matrix, derivative, order):
        assert_close(derivative(of_operator(operator), T, B), by_autograd(of_matrix(matrix), T, B)[order])

    @pytest.mark.parametrize(("derivative", "order"), BATCHES.values(), ids=BATCHES)
    def test_batch(self, operator, matrix, derivative, order):
        assert_close(
            derivative(of_operator(operator), TS, B), expected_in_batch(of_matrix(matrix), TS, B, order)
        )

    def test_third_derivative(self, operator, matrix):
        third = ad.grad(ad.grad(ad.grad(of_operator(operator))))(T, B)
        assert_close(third, ad.grad(ad.grad(ad.grad(of_matrix(matrix))))(T, B))

    def test_finite_differences(self, operator, matrix):
        del matrix
        ad.testing.check_grads(of_operator(operator), (T, B), order=2, atol=1e-6, rtol=1e-6)


def test_several_right_hand_sides():
    columns = random(N, 3)
    of_columns = lambda t, c: solved(operators.from_matrix(asymmetric(t)), c, dense).pow(3).sum()
    expected = lambda t, c: (torch.linalg.inv(asymmetric(t)) @ c).pow(3).sum()
    for derivative, order in COMBINATIONS.values():
        assert_close(derivative(of_columns, T, columns), by_autograd(expected, T, columns)[order])


def test_complex_operator_is_differentiated_holomorphically():
    M, b = random(N, N, dtype=torch.complex128) + 3 * IDENTITY, random(N, dtype=torch.complex128)
    z = torch.tensor(0.4 - 0.3j, dtype=torch.complex128)
    x = torch.linalg.inv(z * M + IDENTITY) @ b
    of_z = lambda z: solved(operators.from_matrix(z * M + IDENTITY), b, dense)
    slope = -torch.linalg.inv(z * M + IDENTITY) @ M @ x
    assert_close(ad.jacrev(of_z, holomorphic=True)(z), slope)
    assert_close(ad.jacfwd(of_z, holomorphic=True)(z), slope)
    second = -2 * torch.linalg.inv(z * M + IDENTITY) @ M @ slope
    assert_close(ad.jacrev(ad.jacrev(of_z, holomorphic=True), holomorphic=True)(z), second)


def test_backward_of_a_complex_operator():
    M, b = random(N, N, dtype=torch.complex128) + 3 * IDENTITY, random(N, dtype=torch.complex128)
    results = []
    for solution in (
        lambda matrix, b: solved(operators.from_matrix(matrix), b, dense),
        lambda matrix, b: torch.linalg.inv(matrix) @ b,
    ):
        leaves = [M.clone().requires_grad_(), b.clone().requires_grad_()]
        solution(*leaves).abs().pow(3).sum().backward()
        results.append([leaf.grad for leaf in leaves])
    assert_close(results[0], results[1])


class TestWhatIsComputed:
    def counted(self):
        calls = []

        def solver(A, b):
            calls.append((A, b))
            assert not torch.is_grad_enabled()
            assert not b.requires_grad
            return dense(A, b)

        return solver, calls

    def test_nothing_is_attached_where_nothing_is_differentiated(self):
        solver, calls = self.counted()
        A = operators.hessian(quartic)(P, T)
        x = solved(A, B, solver)
        assert not x.requires_grad
        assert [one is A for one, _ in calls] == [True]

    def test_no_grad_mode(self):
        t = T.clone().requires_grad_()
        with torch.no_grad():
            assert not solved(operators.hessian(quartic)(P, t), B, dense).requires_grad

    def test_one_solution_for_the_value_and_one_for_each_pull(self):
        solver, calls = self.counted()
        t, b = T.clone().requires_grad_(), B.clone().requires_grad_()
        x = solved(operators.from_matrix(asymmetric(t)), b, solver)
        assert len(calls) == 1
        for count in (2, 3):
            torch.autograd.grad(x.sum(), (t, b), retain_graph=True)
            assert len(calls) == count

    def test_one_solution_for_each_tangent(self):
        solver, calls = self.counted()
        of_t = lambda t: solved(operators.from_matrix(asymmetric(t)), B, solver)
        ad.jvp(of_t, (T,), (T,))
        assert len(calls) == 2

    def test_rows_of_a_jacobian_are_solved_for_in_one_batch(self):
        solver, calls = self.counted()
        ad.jacrev(lambda b: solved(operators.from_matrix(asymmetric(T)), b, solver))(B)
        assert len(calls) == 2

    def test_second_derivative_does_not_solve_for_the_value_again(self):
        solver, calls = self.counted()
        ad.grad(ad.grad(lambda t: loss(solved(operators.from_matrix(asymmetric(t)), B, solver))))(T)
        assert [torch.equal(b.detach(), B) for _, b in calls] == [True, False, False, False, False]
        # The value x, and w of its pull; then the pulls of w, of the x in the loss, and of the x that w's rule has.

    def test_function_is_not_run_for_b_alone(self):
        runs = []

        def counted(p):
            runs.append(p)
            return quartic(p, T)

        A = operators.hessian(counted)(P)
        b = B.clone().requires_grad_()
        x = solved(A, b, dense)
        before = len(runs)
        x.sum().backward()
        assert len(runs) - before == 1
        assert_close(b.grad, torch.linalg.inv(hessian_of_quartic(T)).sum(0))


class TestCapturedTensors:
    def test_parameters_of_a_module_that_are_not_arguments(self):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
        x, y = random(5, 2), random(5, 1)
        last = {"2.weight": model[2].weight.detach(), "2.bias": model[2].bias.detach()}

        def ridge(params):
            return ((ad.functional_call(model, params, x) - y) ** 2).sum() + sum(
                (p**2).sum() for p in params.values()
            )

        solved(operators.hessian(ridge)(last), B, dense).sum().backward()

        def by_hand(weight, bias):
            features = torch.cat([torch.tanh(x @ weight.mT + bias), x.new_ones(5, 1)], 1)
            return (torch.linalg.inv(2 * features.mT @ features + 2 * IDENTITY) @ B).sum()

        leaves = [p.detach().clone().requires_grad_() for p in (model[0].weight, model[0].bias)]
        by_hand(*leaves).backward()
        assert_close([model[0].weight.grad, model[0].bias.grad], [leaf.grad for leaf in leaves])
        assert model[2].weight.grad is None

    def test_captured_tensor_that_is_batched_alone(self):
        def of_t(t, center):
            shifted = lambda p, t: quartic(p + center, t)
            return loss(solved(operators.hessian(shifted)(P, t), B, dense))

        centers = random(3, N)
        got = ad.vmap(ad.grad(of_t))(TS, centers)
        expected = []
        for t, center in zip(TS, centers, strict=True):
            ring = IDENTITY.roll(1, 0) + IDENTITY.roll(-1, 0)
            matrix = lambda t, c=center: torch.diag((P + c) ** 2 + 4) + ring * t / 5  # noqa: B023
            expected.append(by_autograd(of_matrix(matrix), t, B)[0][0])
        assert_close(got, torch.stack(expected))

    @pytest.mark.parametrize("transform", [ad.grad, ad.jacfwd, lambda f: ad.vmap(ad.grad(f))])
    def test_one_inside_a_transform_of_its_own_is_refused(self, transform):
        def of_t(t):
            hides = lambda p: quartic(p, ad.grad(lambda s: s**3 / 3)(t))
            return loss(solved(operators.hessian(hides)(P), B, dense))

        with pytest.raises(CaptureError, match=r"operators\.solve: .* captures .* Expected an argument"):
            transform(of_t)(T if transform in (ad.grad, ad.jacfwd) else TS)


class TestErrors:
    @pytest.mark.parametrize("transform", [ad.grad, ad.jacfwd, ad.hessian, lambda f: ad.vmap(ad.grad(f))])
    @pytest.mark.parametrize("at", [1, 2])
    def test_error_in_the_solver_comes_out(self, transform, at):
        calls = []

        def failing(A, b):
            calls.append(b)
            if len(calls) == at:
                raise ValueError("no solution today")
            return dense(A, b)

        point = T if transform in (ad.grad, ad.jacfwd, ad.hessian) else TS
        f = lambda t: loss(solved(operators.from_matrix(asymmetric(t.sum())), B, failing))
        with pytest.raises(ValueError, match="no solution today"):
            transform(f)(point)

    def test_error_in_the_function_of_a_rule_comes_out(self):
        runs = []

        def failing(p, t):
            runs.append(t)
            if len(runs) == 4:
                raise ValueError("not again")
            return quartic(p, t)

        with pytest.raises(ValueError, match="not again"):
            ad.grad(lambda t: loss(solved(operators.hessian(failing)(P, t), B, dense)))(T)


def test_what_is_kept_is_released_with_the_solution():
    gc.collect()
    gc.disable()
    try:
        t = T.clone().requires_grad_()

        def own(p, t):
            return quartic(p, t)

        A = operators.hessian(own)(P, t)
        x = solved(A, B, dense)
        x.sum().backward()
        kept = weakref.ref(A), weakref.ref(own)
        del A, x, own
        assert [one() for one in kept] == [None, None]
    finally:
        gc.enable()


def test_graph_is_not_freed_for_a_second_backward():
    t = T.clone().requires_grad_()
    x = solved(operators.hessian(quartic)(P, t), B, dense)
    x.sum().backward(retain_graph=True)
    first = t.grad.clone()
    x.sum().backward()
    assert_close(t.grad, 2 * first)


def test_combinations_are_told_apart():
    """A solver whose result is differentiated as if it were a constant fails in each of them."""
    wrong = lambda t, b: (
        loss(solved(operators.from_matrix(asymmetric(t)), b, dense).detach()) + 0 * (t + b.sum())
    )
    for derivative, order in COMBINATIONS.values():
        with pytest.raises((AssertionError, RuntimeError)):
            assert_close(derivative(wrong, T, B), by_autograd(of_matrix(asymmetric), T, B)[order])
