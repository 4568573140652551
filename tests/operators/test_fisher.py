"""Fisher matrices, against sums of outer products from plain autograd."""

from functools import partial
from importlib import import_module

import pytest
import torch
from torch import nn
from torch.nn import functional

import autodiff as ad
from autodiff import operators
from autodiff.errors import BatchError, OptionError, OutputError
from autodiff.operators.likelihoods import likelihood_of

SAMPLES, INPUTS, CLASSES = 6, 3, 4
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(SAMPLES, INPUTS, dtype=torch.float64, generator=GENERATOR)
LABELS = torch.randint(CLASSES, (SAMPLES,), generator=GENERATOR)
W = torch.randn(CLASSES, INPUTS, dtype=torch.float64, generator=GENERATOR)
NUMBERS = torch.randn(SAMPLES, CLASSES, dtype=torch.float64, generator=GENERATOR)
BITS = (NUMBERS > 0).double()
SIZE = CLASSES * INPUTS


def model(w, x):
    return torch.tanh(x) @ w.T


def jacobian(x=X):
    return torch.autograd.functional.jacobian(lambda w: model(w, x), W).reshape(-1, SIZE)


def expected_of_outputs(blocks):
    """J^T M J for a matrix of the outputs of each sample: [samples, classes, classes]."""
    return jacobian().T @ torch.block_diag(*blocks) @ jacobian()


def categorical():
    p = model(W, X).softmax(1)
    return [torch.diag(row) - torch.outer(row, row) for row in p]


# The loss, a target for it, and the matrix in closed form.
KNOWN = {
    "cross entropy": (functional.cross_entropy, LABELS, lambda: expected_of_outputs(categorical()) / SAMPLES),
    "cross entropy, sum": (
        partial(functional.cross_entropy, reduction="sum"),
        LABELS,
        lambda: expected_of_outputs(categorical()),
    ),
    "cross entropy, one sample ignored": (
        nn.CrossEntropyLoss(),
        LABELS.index_fill(0, torch.tensor([2]), -100),
        lambda: expected_of_outputs([b * (i != 2) for i, b in enumerate(categorical())]) / (SAMPLES - 1),
    ),
    "squared error": (functional.mse_loss, NUMBERS, lambda: 2 * jacobian().T @ jacobian() / NUMBERS.numel()),
    "squared error, sum": (nn.MSELoss(reduction="sum"), NUMBERS, lambda: 2 * jacobian().T @ jacobian()),
    "logits": (
        nn.BCEWithLogitsLoss(),
        BITS,
        lambda: expected_of_outputs([torch.diag(p * (1 - p)) for p in model(W, X).sigmoid()]) / BITS.numel(),
    ),
}


@pytest.mark.parametrize("case", KNOWN)
class TestOfKnownLikelihoods:
    def test_exact(self, case):
        loss, target, expected = KNOWN[case]
        A = operators.fisher(model, loss)(W, X, target)
        torch.testing.assert_close(A.to_matrix(), expected())
        assert A.positive

    def test_by_draws(self, case):
        loss, target, expected = KNOWN[case]
        generator = torch.Generator().manual_seed(5)
        A = operators.fisher(model, loss, 4000, generator=generator)(W, X, target)
        error = (A.to_matrix() - expected()).norm() / expected().norm()
        assert 1e-5 < error < 0.07  # 1 / sqrt(4000), times a few
        assert A.positive

    def test_few_draws_are_unbiased(self, case):
        loss, target, expected = KNOWN[case]
        generator = torch.Generator().manual_seed(6)
        v = torch.randn(SIZE, dtype=torch.float64, generator=generator)
        draw = lambda: v @ (operators.fisher(model, loss, 1, generator=generator)(W, X, target) @ v)
        estimates = torch.stack([draw() for _ in range(300)])
        assert abs(estimates.mean() - v @ expected() @ v) < 4 * estimates.std() / 300**0.5


def test_an_operator_repeats_its_draws_and_another_one_draws_anew():
    generator = torch.Generator().manual_seed(1)
    one = operators.fisher(model, functional.cross_entropy, 2, generator=generator)
    other = operators.fisher(model, functional.cross_entropy, 2, generator=generator)
    first, again, second = one(W, X, LABELS), one(W, X, LABELS), other(W, X, LABELS)
    assert torch.equal(first.to_matrix(), again.to_matrix())
    assert not torch.equal(first.to_matrix(), second.to_matrix())
    repeated = operators.fisher(
        model, functional.cross_entropy, 2, generator=torch.Generator().manual_seed(1)
    )
    assert torch.equal(repeated(W, X, LABELS).to_matrix(), first.to_matrix())


def test_the_seed_comes_from_the_global_generator_and_draws_leave_it_alone():
    torch.manual_seed(0)
    maker = operators.fisher(model, functional.cross_entropy, 2)
    state = torch.get_rng_state()
    maker(W, X, LABELS).to_matrix()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(0)
    same = operators.fisher(model, functional.cross_entropy, 2)
    assert torch.equal(same(W, X, LABELS).to_matrix(), maker(W, X, LABELS).to_matrix())


def test_any_loss_by_draws_of_the_users():
    """A mean of Laplace distributions: the gradient is a sign, so its second moment is one for each number."""
    laplace = lambda output, target: (output - target).abs().sum(1).mean()
    sample = lambda output, generator: (
        output + torch.randn(output.shape, generator=generator, dtype=output.dtype)
    )
    A = operators.fisher(model, laplace, 4000, sample=sample)(W, X, NUMBERS)
    expected = jacobian().T @ jacobian() / SAMPLES
    assert (A.to_matrix() - expected).norm() / expected.norm() < 0.08
    summed = lambda output, target: (output - target).abs().sum()
    B = operators.fisher(model, summed, 4000, sample=sample)(W, X, NUMBERS)
    assert (B.to_matrix() / SAMPLES - expected).norm() / expected.norm() < 0.08


def test_one_draw_is_the_outer_product_of_its_gradients():
    drawn = []

    def sample(output, generator):
        drawn.append(output.detach() + torch.randn(output.shape, generator=generator, dtype=output.dtype))
        return drawn[-1]

    squares = lambda output, target: ((output - target) ** 2).sum(1).mean()
    A = operators.fisher(model, squares, 1, sample=sample)(W, X, NUMBERS)
    (target,) = drawn
    rows = [
        torch.autograd.functional.jacobian(
            lambda w, n=n: ((model(w, X[n]) - target[n]) ** 2).sum(), W
        ).reshape(-1)
        for n in range(SAMPLES)
    ]
    torch.testing.assert_close(A.to_matrix(), sum(torch.outer(g, g) for g in rows) / SAMPLES)
    v = torch.randn(SIZE, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(A @ v, sum(torch.outer(g, g) for g in rows) @ v / SAMPLES)


def test_derivative_in_the_parameters_of_exact_and_drawn():
    v = torch.randn(SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    direction = torch.randn(CLASSES, INPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for samples in (None, 2):
        maker = operators.fisher(
            model, functional.cross_entropy, samples, generator=torch.Generator().manual_seed(4)
        )
        curvature = lambda w, maker=maker: v @ (maker(w, X, LABELS) @ v)
        step = 1e-6
        expected = (curvature(W + step * direction) - curvature(W - step * direction)) / (2 * step)
        actual = (ad.grad(curvature)(W) * direction).sum()
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)


def test_what_is_not_known():
    for loss in (
        lambda output, target: 2 * functional.cross_entropy(output, target),
        partial(functional.cross_entropy, weight=torch.ones(CLASSES)),
        partial(functional.cross_entropy, label_smoothing=0.1),
        nn.CrossEntropyLoss(weight=torch.ones(CLASSES)),
        nn.BCEWithLogitsLoss(pos_weight=torch.ones(CLASSES)),
        nn.MSELoss(reduction="none"),
        functional.l1_loss,
    ):
        assert likelihood_of(loss) is None
        with pytest.raises(OptionError, match=r"operators\.fisher: .*operators\.gauss_newton"):
            operators.fisher(model, loss)


def test_wrong_options():
    with pytest.raises(OptionError, match="samples is a positive int, got 0"):
        operators.fisher(model, functional.cross_entropy, 0)
    with pytest.raises(OptionError, match=r"Pass samples=1 or more"):
        operators.fisher(model, functional.cross_entropy, sample=lambda output, generator: output)
    squared_mean = lambda output, target: (output - target).sum() ** 2
    with pytest.raises(OutputError, match="neither"):
        operators.fisher(model, squared_mean, 1, sample=lambda output, generator: output + 1)(W, X, NUMBERS)


# Empirical Fisher matrices.


def sample_loss(w, x, y):
    return functional.cross_entropy(model(w, x[None]), y[None])


def gradients(x=X, y=LABELS):
    return torch.stack(
        [
            torch.autograd.functional.jacobian(lambda w, n=n: sample_loss(w, x[n], y[n]), W).reshape(-1)
            for n in range(len(y))
        ]
    )


@pytest.fixture(params=["formed", "not formed"])
def _formed(request, monkeypatch):
    monkeypatch.setattr(
        import_module("autodiff.operators.fisher"), "_FORMED", 10**6 if request.param == "formed" else 0
    )


@pytest.mark.usefixtures("_formed")
class TestEmpirical:
    def test_matrix(self):
        G = gradients()
        A = operators.empirical_fisher(sample_loss)(W, X, LABELS)
        torch.testing.assert_close(A.to_matrix(), G.T @ G / SAMPLES)
        summed = operators.empirical_fisher(sample_loss, reduction="sum")(W, X, LABELS)
        torch.testing.assert_close(summed.to_matrix(), G.T @ G)
        assert A.positive
        torch.testing.assert_close(A.values, functional.cross_entropy(model(W, X), LABELS, reduction="none"))

    def test_dims(self):
        G = gradients()
        A = operators.empirical_fisher(sample_loss, in_dims=(None, 1, 0))(W, X.T, LABELS)
        torch.testing.assert_close(A.to_matrix(), G.T @ G / SAMPLES)

    def test_other_arguments(self):
        G = gradients()
        A = operators.empirical_fisher(lambda x, w, y: sample_loss(w, x, y), argnums=1)(X, W, LABELS)
        torch.testing.assert_close(A.to_matrix(), G.T @ G / SAMPLES)

    def test_aux(self):
        with_aux = lambda w, x, y: (sample_loss(w, x, y), x.sum())
        A = operators.empirical_fisher(with_aux, has_aux=True)(W, X, LABELS)
        torch.testing.assert_close(A.aux, X.sum(1))

    def test_derivative_in_the_parameters(self):
        v = torch.randn(SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        curvature = lambda w: v @ (operators.empirical_fisher(sample_loss)(w, X, LABELS) @ v)
        direction = torch.randn(
            CLASSES, INPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
        )
        step = 1e-6
        expected = (curvature(W + step * direction) - curvature(W - step * direction)) / (2 * step)
        torch.testing.assert_close((ad.grad(curvature)(W) * direction).sum(), expected, rtol=1e-6, atol=1e-8)

    def test_wrong_calls(self):
        with pytest.raises(
            OutputError, match=r"operators\.empirical_fisher: .*scalar|Write the loss of one sample"
        ):
            operators.empirical_fisher(lambda w, x, y: model(w, x))(W, X, LABELS)
        with pytest.raises(BatchError):
            operators.empirical_fisher(sample_loss)(W, X, LABELS[:2])
        with pytest.raises(OptionError, match="reduction"):
            operators.empirical_fisher(sample_loss, reduction="none")
