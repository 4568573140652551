"""Gauss-Newton matrices, against J^T H J from plain autograd."""

import pytest
import torch
from torch.nn import functional

import autodiff as ad
from autodiff import operators
from autodiff.errors import ArgnumsError, OutputError, RuleError, ShapeError

SAMPLES, INPUTS, CLASSES = 7, 3, 4
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(SAMPLES, INPUTS, dtype=torch.float64, generator=GENERATOR)
LABELS = torch.randint(CLASSES, (SAMPLES,), generator=GENERATOR)
PARAMS = {
    "hidden": torch.randn(5, INPUTS, dtype=torch.float64, generator=GENERATOR),
    "last": {"weight": torch.randn(CLASSES, 5, dtype=torch.float64, generator=GENERATOR), "steps": 3},
}
SIZE = 5 * INPUTS + 5 * CLASSES


def model(params, x):
    return torch.tanh(x @ params["hidden"].T) @ params["last"]["weight"].T


def quartic(output, target):
    return ((output - target) ** 4).sum() + output[:, 0].sum() ** 2


TARGETS = {
    functional.cross_entropy: LABELS,
    functional.mse_loss: torch.randn(SAMPLES, CLASSES, dtype=torch.float64, generator=GENERATOR),
    quartic: torch.randn(SAMPLES, CLASSES, dtype=torch.float64, generator=GENERATOR),
}
LOSSES = list(TARGETS)


def flat_model(numbers, x=X):
    hidden, last = numbers.split([5 * INPUTS, 5 * CLASSES])
    return model({"hidden": hidden.view(5, INPUTS), "last": {"weight": last.view(CLASSES, 5)}}, x)


def numbers_of(params):
    return torch.cat([params["hidden"].reshape(-1), params["last"]["weight"].reshape(-1)])


def dense(loss, params=PARAMS, x=X):
    """J^T H J by torch.autograd.functional."""
    numbers = numbers_of(params)
    J = torch.autograd.functional.jacobian(lambda n: flat_model(n, x), numbers).reshape(-1, SIZE)
    output = flat_model(numbers, x).detach()
    of_output = lambda o: loss(o.reshape(output.shape), TARGETS[loss])
    H = torch.autograd.functional.hessian(of_output, output.reshape(-1))
    return J.T @ H @ J


@pytest.mark.parametrize("loss", LOSSES)
class TestProducts:
    def test_matrix(self, loss):
        A = operators.gauss_newton(model, loss)(PARAMS, X, TARGETS[loss])
        torch.testing.assert_close(A.to_matrix(), dense(loss))
        assert A.shape == (SIZE, SIZE)
        assert A.symmetric

    def test_forms_of_vectors(self, loss):
        A, M = operators.gauss_newton(model, loss)(PARAMS, X, TARGETS[loss]), dense(loss)
        v = torch.randn(SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(A @ v, M @ v)
        torch.testing.assert_close(v @ A, M @ v)
        torch.testing.assert_close(A @ v[:, None].expand(-1, 3), (M @ v)[:, None].expand(-1, 3))
        tree = A.domain.unravel(v)
        product = A @ tree
        assert product["last"]["steps"] is None
        torch.testing.assert_close(numbers_of(product), M @ v)

    def test_value_gradient_and_hessian_of_the_loss(self, loss):
        A = operators.gauss_newton(model, loss)(PARAMS, X, TARGETS[loss])
        numbers = numbers_of(PARAMS).requires_grad_()
        value = loss(flat_model(numbers), TARGETS[loss])
        torch.testing.assert_close(A.value, value.detach())
        torch.testing.assert_close(numbers_of(A.gradient), torch.autograd.grad(value, numbers)[0])
        output = flat_model(numbers).detach()
        H = torch.autograd.functional.hessian(lambda o: loss(o, TARGETS[loss]), output)
        torch.testing.assert_close(A.loss_hessian.to_matrix(), H.reshape(output.numel(), -1))

    def test_part_of_the_parameters(self, loss):
        A = operators.gauss_newton(model, loss, wrt="last.*")(PARAMS, X, TARGETS[loss])
        torch.testing.assert_close(A.to_matrix(), dense(loss)[5 * INPUTS :, 5 * INPUTS :])
        whole = operators.gauss_newton(model, loss)(PARAMS, X, TARGETS[loss])
        torch.testing.assert_close(
            whole["last.*", "hidden"].to_matrix(), dense(loss)[5 * INPUTS :, : 5 * INPUTS]
        )

    def test_derivative_in_the_parameters(self, loss):
        v = torch.randn(SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

        def curvature(params):
            return v @ (operators.gauss_newton(model, loss)(params, X, TARGETS[loss]) @ v)

        direction = torch.randn(SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        shifted = lambda step: {
            "hidden": PARAMS["hidden"] + step * direction[: 5 * INPUTS].view(5, INPUTS),
            "last": {
                "weight": PARAMS["last"]["weight"] + step * direction[5 * INPUTS :].view(CLASSES, 5),
                "steps": 3,
            },
        }
        step = 1e-5
        expected = v @ (dense(loss, shifted(step)) - dense(loss, shifted(-step))) @ v / (2 * step)
        actual = numbers_of(ad.grad(curvature)(PARAMS)) @ direction
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
        tangent = {"hidden": direction[: 5 * INPUTS].view(5, INPUTS), "last": {"weight": None, "steps": None}}
        tangent["last"]["weight"] = direction[5 * INPUTS :].view(CLASSES, 5)
        _, pushed = ad.jvp(curvature, (PARAMS,), (tangent,))
        torch.testing.assert_close(pushed, expected, rtol=1e-6, atol=1e-7)

    def test_over_points_in_vmap(self, loss):
        points = torch.stack([X, 2 * X, X - 1])
        v = torch.randn(SIZE, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        products = ad.vmap(lambda x: operators.gauss_newton(model, loss)(PARAMS, x, TARGETS[loss]) @ v)(
            points
        )
        expected = torch.stack([dense(loss, x=x) @ v for x in points])
        torch.testing.assert_close(products, expected)


def test_the_model_runs_once():
    runs = []

    def counted(params, x):
        runs.append(1)
        return model(params, x)

    A = operators.gauss_newton(counted, functional.cross_entropy)(PARAMS, X, LABELS)
    A @ torch.ones(SIZE, dtype=torch.float64)
    assert A.value.shape == ()
    A.to_matrix()
    assert len(runs) == 1


def test_aux():
    with_aux = lambda params, x: (model(params, x), {"mean": x.mean()})
    A = operators.gauss_newton(with_aux, functional.cross_entropy, has_aux=True)(PARAMS, X, LABELS)
    assert A.aux["mean"] == X.mean()
    torch.testing.assert_close(A.to_matrix(), dense(functional.cross_entropy))


def test_an_output_that_is_a_tree():
    tree_model = lambda params, x: {"a": model(params, x)[:, :1], "b": (model(params, x)[:, 1:], None)}
    tree_loss = lambda output, target: functional.cross_entropy(
        torch.cat([output["a"], output["b"][0]], 1), target
    )
    A = operators.gauss_newton(tree_model, tree_loss)(PARAMS, X, LABELS)
    torch.testing.assert_close(A.to_matrix(), dense(functional.cross_entropy))


def test_positive_where_it_is_known():
    make = operators.gauss_newton
    assert make(model, functional.cross_entropy)(PARAMS, X, LABELS).positive
    assert make(model, torch.nn.MSELoss(reduction="sum"))(PARAMS, X, TARGETS[functional.mse_loss]).positive
    assert not make(model, quartic)(PARAMS, X, TARGETS[quartic]).positive
    convex = lambda output, target: ((output - target) ** 4).sum()
    assert make(model, convex, convex=True)(PARAMS, X, TARGETS[quartic]).positive
    assert not make(model, convex)(PARAMS, X, TARGETS[quartic]).positive


def test_a_loss_that_is_not_convex_as_promised():
    concave = lambda output, target: -functional.mse_loss(output, target)
    with pytest.raises(RuleError, match=r"convex.*is negative along a vector\. Drop convex=True"):
        operators.gauss_newton(model, concave, convex=True)(PARAMS, X, TARGETS[functional.mse_loss])


def test_wrong_calls():
    make = operators.gauss_newton(model, functional.cross_entropy)
    with pytest.raises(ArgnumsError, match=r"operators\.gauss_newton: .*Pass the target last"):
        make(PARAMS)
    with pytest.raises(OutputError, match=r"operators\.gauss_newton: loss: .*scalar"):
        operators.gauss_newton(model, lambda output, target: output)(PARAMS, X, LABELS)
    with pytest.raises(OutputError, match=r"operators\.gauss_newton: .*only tensors"):
        operators.gauss_newton(lambda params, x: "text", functional.cross_entropy)(PARAMS, X, LABELS)
    with pytest.raises(ShapeError, match=r"gauss_newton of cross_entropy of model @ v"):
        make(PARAMS, X, LABELS) @ torch.ones(3, dtype=torch.float64)


def test_repr_says_what_it_is():
    A = operators.gauss_newton(model, functional.cross_entropy)(PARAMS, X, LABELS)
    assert repr(A) == (
        "<gauss_newton of cross_entropy of model: [35, 35], torch.float64, cpu, positive semidefinite, "
        "2 gradients a product>"
    )
