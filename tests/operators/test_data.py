"""Operators over a data set, compared with dense matrices over all of the data, made by torch.func."""

from __future__ import annotations

import gc
import multiprocessing
import threading
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.torch_version import TorchVersion
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import autodiff as ad
from autodiff import _torch, operators
from autodiff.core.memory import Meter
from autodiff.errors import ArgnumsError, DataError, InPlaceError, OptionError

if TYPE_CHECKING:
    from collections.abc import Iterator

D = torch.float64
# Eleven samples in batches of four: the last one is smaller.
X = torch.randn(11, 3, dtype=D, generator=torch.Generator().manual_seed(1))
Y = torch.randn(11, 2, dtype=D, generator=torch.Generator().manual_seed(2))
LABELS = torch.tensor([0, 1, 1, 0, 1, 0, 0, 0, 1, 1, 0])
THETA = torch.randn(8, dtype=D, generator=torch.Generator().manual_seed(3))
V = torch.randn(8, dtype=D, generator=torch.Generator().manual_seed(4))


def tree(flat: Tensor) -> dict[str, Tensor]:
    return {"w": flat[:6].reshape(3, 2), "b": flat[6:]}


def flat(params: dict[str, Tensor]) -> Tensor:
    return torch.cat([params["w"].reshape(-1), params["b"]])


def model(params: Any, x: Tensor) -> Tensor:
    return torch.tanh(x @ params["w"]) + params["b"] ** 2


def loss(params: Any, x: Tensor, y: Tensor) -> Tensor:
    return ((model(params, x) - y) ** 4).mean()


def total(params: Any, x: Tensor, y: Tensor) -> Tensor:
    return ((model(params, x) - y) ** 4).sum()


def hessian_at(theta: Tensor, function: Any = loss) -> Tensor:
    """The dense matrix over all samples at once."""
    return torch.func.hessian(lambda t: function(tree(t), X, Y))(theta)


class Counted:
    """A loss that counts its runs."""

    def __init__(self, function: Any = loss) -> None:
        self.function, self.runs = function, 0

    def __call__(self, *args: Any) -> Tensor:
        self.runs += 1
        return self.function(*args)  # type: ignore[no-any-return]


class Anew:
    """Batches from a generator that starts anew each time."""

    def __init__(self, *batches: Any) -> None:
        self.batches, self.passes = batches, 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        yield from self.batches


PIECES = [(X[i : i + 4], Y[i : i + 4]) for i in (0, 4, 8)]
LOADER = DataLoader(TensorDataset(X, Y), batch_size=4)
SOURCES: dict[str, Any] = {
    "list": (PIECES, None),
    "tuple of tuples": (tuple(PIECES), None),
    "lists": ([list(piece) for piece in PIECES], None),
    "anew": (Anew(*PIECES), None),
    "loader": (LOADER, None),
    "shuffled": (DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True), None),
    "tensors": ((X, Y), 4),
    "one each": ((X, Y), 1),
    "one batch": ((X, Y), 100),
    "auto": ((X, Y), "auto"),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("check", [True, False])
def test_mean_over_any_source(source: str, check: bool) -> None:
    batches, size = SOURCES[source]
    A = operators.hessian(loss).over(batches, batch_size=size, check=check)(tree(THETA))
    torch.testing.assert_close(A @ V, hessian_at(THETA) @ V)
    torch.testing.assert_close(A.value, loss(tree(THETA), X, Y))
    gradient = torch.func.grad(lambda t: loss(tree(t), X, Y))(THETA)
    torch.testing.assert_close(flat(A.gradient), gradient)
    assert A.symmetric
    assert A.H is A
    assert A.shape == (8, 8)


def test_sum_over_batches_weighs_nothing() -> None:
    A = operators.hessian(total).over((X, Y), batch_size=4, reduction="sum")(tree(THETA))
    torch.testing.assert_close(A.to_matrix(), hessian_at(THETA, total))
    torch.testing.assert_close(A.value, total(tree(THETA), X, Y))


@pytest.mark.parametrize("form", ["tree", "vector", "matrix", "scipy", "block", "algebra", "diagonal"])
def test_forms_and_algebra(form: str) -> None:
    dense = hessian_at(THETA)
    A = operators.hessian(loss).over(LOADER)(tree(THETA))
    match form:
        case "tree":
            torch.testing.assert_close(flat(A @ tree(V)), dense @ V)
        case "vector":
            torch.testing.assert_close(A @ V, dense @ V)
        case "matrix":
            columns = torch.stack([V, V.roll(1), V.roll(3)], 1)
            torch.testing.assert_close(A @ columns, dense @ columns)
        case "scipy":
            pytest.importorskip("scipy")
            found = A.to_scipy() @ V.numpy()
            torch.testing.assert_close(torch.from_numpy(found), dense @ V)
        case "block":
            torch.testing.assert_close(A["w", "b"].to_matrix(), dense[:6, 6:])
        case "algebra":
            torch.testing.assert_close(
                (2 * A @ A + 0.5).to_matrix(), 2 * dense @ dense + 0.5 * torch.eye(8, dtype=D)
            )
        case "diagonal":
            torch.testing.assert_close(flat(A.diagonal()), dense.diagonal())


def test_gauss_newton_and_fisher_over_data() -> None:
    jacobian = torch.func.jacrev(lambda t: model(tree(t), X))(THETA).reshape(22, 8)
    A = operators.gauss_newton(model, mse_loss).over((X, Y), batch_size=4)(tree(THETA))
    assert A.positive
    torch.testing.assert_close(A.to_matrix(), 2 / 22 * jacobian.mT @ jacobian)
    A = operators.fisher(model, cross_entropy).over((X, LABELS), batch_size=4)(tree(THETA))
    chances = model(tree(THETA), X).softmax(1)
    middle = torch.diag_embed(chances) - chances[:, :, None] * chances[:, None, :]
    rows = jacobian.reshape(11, 2, 8)
    torch.testing.assert_close(A.to_matrix(), (rows.mT @ middle @ rows).mean(0))


def test_monte_carlo_fisher_is_one_matrix_whose_batches_draw_different_numbers() -> None:
    x, y = X[:1].expand(6, 3), LABELS[:6]
    maker = operators.fisher(model, cross_entropy, samples=3, generator=torch.Generator().manual_seed(0))
    A = maker.over((x, y), batch_size=2)(tree(THETA))
    torch.testing.assert_close(A.to_matrix(), A.to_matrix(), rtol=0, atol=0)
    parts = [maker.for_batch(i)(tree(THETA), x[:2], y[:2]).to_matrix() for i in range(3)]
    torch.testing.assert_close(A.to_matrix(), sum(parts) / 3)
    assert not torch.allclose(parts[0], parts[1])


def test_empirical_fisher_over_data() -> None:
    def of_sample(params: Any, x: Tensor, y: Tensor) -> Tensor:
        return ((model(params, x) - y) ** 2).sum()

    gradients = torch.vmap(torch.func.grad(lambda t, x, y: of_sample(tree(t), x, y)), (None, 0, 0))(
        THETA, X, Y
    )
    A = operators.empirical_fisher(of_sample).over((X, Y), batch_size=4)(tree(THETA))
    torch.testing.assert_close(A.to_matrix(), gradients.mT @ gradients / 11)
    with pytest.raises(AttributeError, match="no gradient"):
        A.gradient  # noqa: B018


def test_dict_batches_names_and_kwargs() -> None:
    def of_dict(params: Any, batch: dict[str, Tensor], *, power: int) -> Tensor:
        return ((model(params, batch["x"]) - batch["y"]) ** power).mean()

    A = operators.hessian(of_dict, "params", wrt="w").over({"x": X, "y": Y}, batch_size=4)(
        tree(THETA), power=4
    )
    torch.testing.assert_close(A.to_matrix(), hessian_at(THETA)[:6, :6])


def test_complex_holomorphic_product_and_its_adjoint() -> None:
    z = torch.tensor([1.0 + 2j, 0.5 - 1j], dtype=torch.complex128)
    scales = torch.tensor([1.0, 2.0, 4.0], dtype=D)
    cubic = lambda z, s: (s[:, None] * z**3 * (1 + 1j)).sum(1).mean()
    A = operators.hessian(cubic, holomorphic=True).over(scales, batch_size=2)(z)
    dense = torch.diag(6 * z * (1 + 1j) * 7 / 3)
    torch.testing.assert_close(A.to_matrix(), dense)
    torch.testing.assert_close(A.H.to_matrix(), dense.mH.resolve_conj())


# Counts.


def test_one_run_for_each_batch_and_product() -> None:
    counted = Counted()
    A = operators.hessian(counted).over((X, Y), batch_size=4, check=False)(tree(THETA))
    counted.runs = 0
    A @ V
    assert counted.runs == 3
    A @ torch.stack([V, V.roll(1), V.roll(2), V.roll(3)], 1)
    assert counted.runs == 6
    A.value, A.gradient  # noqa: B018
    assert counted.runs == 9
    A.gradient  # noqa: B018
    assert counted.runs == 9


def test_product_at_tensors_that_require_grad_runs_the_function_once_for_each_batch() -> None:
    counted = Counted()
    params = {key: value.requires_grad_() for key, value in tree(THETA.clone()).items()}
    A = operators.hessian(counted).over((X, Y), batch_size=4, check=False)(params)
    counted.runs = 0
    product = A @ V
    assert counted.runs == 3
    assert product.requires_grad


def test_kept_batches_are_not_run_again() -> None:
    counted = Counted()
    for memory, runs in (("1MiB", 0), (None, 3)):
        A = operators.hessian(counted).over(LOADER, memory=memory)(tree(THETA))
        torch.testing.assert_close(A @ V, hessian_at(THETA) @ V)
        counted.runs = 0
        torch.testing.assert_close(A @ V.roll(1), hessian_at(THETA) @ V.roll(1))
        assert counted.runs == runs


def test_so_many_batches_are_kept_as_fit() -> None:
    counted = Counted()
    runs = []
    for memory in range(200, 12000, 300):
        A = operators.hessian(counted).over((X, Y), batch_size=1, memory=memory)(tree(THETA))
        A @ V
        counted.runs = 0
        torch.testing.assert_close(A @ V, hessian_at(THETA) @ V)
        runs.append(counted.runs)
    assert runs[0] == 11
    assert runs[-1] == 0
    assert runs == sorted(runs, reverse=True)
    assert len(set(runs)) > 4


def test_one_batch_is_kept_without_memory() -> None:
    counted = Counted()
    A = operators.hessian(counted).over((X, Y), batch_size=20)(tree(THETA))
    A @ V
    counted.runs = 0
    torch.testing.assert_close(A @ V, hessian_at(THETA) @ V)
    assert counted.runs == 0


def test_kept_batch_of_other_data_is_an_error() -> None:
    batches = [(x.clone(), y.clone()) for x, y in PIECES]
    A = operators.hessian(loss).over(batches, memory=1700)(tree(THETA))
    A @ V
    assert 0 < len(A.__dict__["_kept"]._parts) < 3
    batches.reverse()
    with pytest.raises(DataError, match="batch 0 as it was"):
        A @ V


# Memory.


def wide(params: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(x[:, :, None] * params).sin().exp().mean()


@pytest.mark.parametrize("what", ["product", "tracked product", "gradient", "second gradient", "pushed"])
def test_memory_is_that_of_one_batch(what: str) -> None:
    w = torch.linspace(0.1, 1.0, 50, dtype=D)
    peaks = []
    for count in (2, 8):
        x = torch.linspace(0, 1, 16 * count * 10, dtype=D).reshape(16 * count, 10)

        def product(w: Tensor, x: Tensor = x) -> Tensor:
            A = operators.hessian(wide).over(x, batch_size=16, check=False)(w)
            return (A @ torch.ones_like(w)).square().sum()

        def at(what: str, product: Any = product) -> None:
            match what:
                case "product":
                    product(w)
                case "tracked product":
                    product(w.clone().requires_grad_())
                case "gradient":
                    product(leaf := w.clone().requires_grad_())
                    torch.autograd.grad(product(leaf), leaf)
                case "second gradient":
                    leaf = w.clone().requires_grad_()
                    (slope,) = torch.autograd.grad(product(leaf), leaf, create_graph=True)
                    torch.autograd.grad(slope.sum(), leaf)
                case "pushed":
                    ad.jvp(product, (w,), (torch.ones_like(w),))

        with Meter(torch.device("cpu")) as meter:
            at(what)
        peaks.append(meter.peak)
    one = 16 * 10 * 50 * 8
    assert peaks[0] > 2 * one, "the meter sees the graph of a batch"
    assert peaks[1] < 1.1 * peaks[0]


def test_operator_is_released_with_what_it_keeps() -> None:
    gc.collect()
    gc.disable()
    try:
        A = operators.hessian(loss).over((X, Y), batch_size=4, memory="1MiB")(tree(THETA))
        A @ V
        graph = weakref.ref(A.__dict__["_kept"]._parts[0].operator)
        operator = weakref.ref(A)
        del A
        assert operator() is None
        assert graph() is None
    finally:
        gc.enable()


def test_product_that_shares_its_memory_is_not_written() -> None:
    # The Hessian's product is an expanded tensor.
    A = operators.hessian(lambda w, x: x.mean() * w.sum() ** 2).over(torch.arange(5.0), batch_size=2)(
        torch.ones(3)
    )
    v = torch.tensor([1.0, 2.0, 4.0])
    torch.testing.assert_close(A @ v, torch.full((3,), 28.0))
    assert torch.equal(v, torch.tensor([1.0, 2.0, 4.0]))


# Derivatives.


def product_norm(theta: Tensor) -> Tensor:
    A = operators.hessian(loss).over((X, Y), batch_size=4)(tree(theta))
    return (A @ V).square().sum()


def dense_norm(theta: Tensor) -> Tensor:
    return (hessian_at(theta) @ V).square().sum()


@pytest.mark.parametrize(
    ("transformed", "expected"),
    [
        (ad.grad, torch.func.grad),
        (ad.jacfwd, torch.func.grad),
        (ad.hessian, torch.func.hessian),
        (lambda f: ad.jacfwd(ad.jacfwd(f)), torch.func.hessian),
        (lambda f: ad.jacfwd(ad.grad(f)), torch.func.hessian),
        (lambda f: ad.grad(lambda t: ad.grad(f)(t) @ V), lambda f: lambda t: torch.func.hessian(f)(t) @ V),
    ],
    ids=["reverse", "forward", "hessian", "forward forward", "forward reverse", "reverse reverse"],
)
def test_derivatives_of_a_product(transformed: Any, expected: Any) -> None:
    torch.testing.assert_close(transformed(product_norm)(THETA), expected(dense_norm)(THETA))


def test_backward_through_a_product_in_parameters_and_vector() -> None:
    theta, v = THETA.clone().requires_grad_(), V.clone().requires_grad_()
    A = operators.hessian(loss).over(LOADER)(tree(theta))
    (A @ v).square().sum().backward()
    assert theta.grad is not None
    assert v.grad is not None
    torch.testing.assert_close(theta.grad, torch.func.grad(dense_norm)(THETA))
    torch.testing.assert_close(v.grad, 2 * hessian_at(THETA) @ hessian_at(THETA) @ V)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.hessian])
def test_batches_that_do_not_depend_on_all_arguments(transform: Any) -> None:
    def branching(params: Any, x: Tensor, y: Tensor) -> Tensor:
        # In the second batch alone, which no mean over samples is.
        more = (params["b"] ** 4).sum() * params["w"].sum() if torch.equal(y, Y[4:8]) else 0.0
        return ((x @ params["w"]) ** 4).mean() + more

    def norm(theta: Tensor) -> Tensor:
        A = operators.hessian(branching).over((X, Y), batch_size=4, check=False)(tree(theta))
        return (A @ V).square().sum()

    def dense(theta: Tensor) -> Tensor:
        def whole(t: Tensor) -> Tensor:
            params = tree(t)
            return ((X @ params["w"]) ** 4).mean() + 4 / 11 * (params["b"] ** 4).sum() * params["w"].sum()

        return (torch.func.hessian(whole)(theta) @ V).square().sum()

    ours = getattr(ad, transform.__name__)
    torch.testing.assert_close(ours(norm)(THETA), transform(dense)(THETA))


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton", "fisher"])
@pytest.mark.parametrize("where", [1, 9])
def test_mean_that_leaves_samples_out_is_refused(kind: str, where: int) -> None:
    """A batch's mean is over the samples that count, whose number is not the batch's."""
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 2, 1, 0, 1, 2])
    model = lambda w, x: x @ w
    loss = torch.nn.functional.cross_entropy
    weights = torch.randn(X.shape[1], 3, dtype=X.dtype, generator=torch.Generator().manual_seed(0))
    if kind == "hessian":
        maker = operators.hessian(lambda w, x, y: loss(model(w, x), y))
    else:
        maker = getattr(operators, kind)(model, loss)
    A = maker.over((X, labels), batch_size=4)(weights)
    whole = operators.hessian(lambda w: loss(model(w, X), labels))(weights)
    torch.testing.assert_close(A.to_matrix(), whole.to_matrix())
    ignored = labels.index_fill(0, torch.tensor([where]), -100)
    with pytest.raises(
        DataError, match=r"a mean over a batch's samples, got one in some batches .*ignore_index"
    ):
        maker.over((X, ignored), batch_size=4)(weights)


def test_products_over_points_under_vmap() -> None:
    points = torch.stack([THETA, THETA.roll(1), -THETA])
    torch.testing.assert_close(ad.vmap(product_norm)(points), torch.vmap(dense_norm)(points))
    found = ad.vmap(ad.grad(product_norm))(points)
    torch.testing.assert_close(found, torch.vmap(torch.func.grad(dense_norm))(points))
    A = operators.hessian(loss).over((X, Y), batch_size=4, memory="1MiB")(tree(THETA))
    torch.testing.assert_close(ad.vmap(lambda v: A @ v)(points), points @ hessian_at(THETA))


@pytest.mark.parametrize("where", ["eager", "grad", "jvp"])
def test_captured_tensors_are_differentiated(where: str) -> None:
    def of_power(power: Tensor) -> Tensor:
        def loss(params: Any, x: Tensor, y: Tensor) -> Tensor:
            return ((model(params, x) - y) ** 4 * power).mean() + power**2 * (params["w"] ** 3).sum()

        A = operators.hessian(loss).over((X, Y), batch_size=4)(tree(THETA))
        return (A @ V).square().sum()

    def dense(power: Tensor) -> Tensor:
        def whole(theta: Tensor) -> Tensor:
            fourth = ((model(tree(theta), X) - Y) ** 4 * power).mean()
            return fourth + power**2 * (tree(theta)["w"] ** 3).sum()

        return (torch.func.hessian(whole)(THETA) @ V).square().sum()

    power = torch.tensor(1.5, dtype=D)
    expected = torch.func.grad(dense)(power)
    match where:
        case "eager":
            power.requires_grad_()
            of_power(power).backward()
            found = power.grad
        case "grad":
            found = ad.grad(of_power)(power)
        case _:
            found = ad.jvp(of_power, (power,), (torch.ones_like(power),))[1]
    torch.testing.assert_close(found, expected)


class Cubed(torch.autograd.Function):
    """A function that torch's modes do not see into."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        del output
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


@pytest.mark.parametrize("what", ["tensors of each batch", "inside a Function"])
def test_captured_tensors_that_cannot_be_replaced_are_differentiated(what: str) -> None:
    scales = torch.linspace(0.5, 1.5, 11, dtype=D).requires_grad_()
    power = torch.tensor(1.5, dtype=D, requires_grad=True)

    def loss(params: Any, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        weight = Cubed.apply(power) if what == "inside a Function" else 1.0
        return ((model(params, x) - y) ** 4 * scale[:, None] * weight).mean()

    A = operators.hessian(loss).over((X, Y, scales), batch_size=4)(tree(THETA))
    (A @ V).square().sum().backward()

    def dense(scales: Tensor, weight: Tensor) -> Tensor:
        whole = lambda t: ((model(tree(t), X) - Y) ** 4 * scales[:, None] * weight).mean()
        return (torch.func.hessian(whole)(THETA) @ V).square().sum()

    weight = torch.tensor(1.5**3 if what == "inside a Function" else 1.0, dtype=D)
    slope, by_weight = torch.func.grad(dense, (0, 1))(scales.detach(), weight)
    torch.testing.assert_close(scales.grad, slope)
    if what == "inside a Function":
        torch.testing.assert_close(power.grad, by_weight * 3 * 1.5**2)


def test_captured_tensors_cost_one_batch_more_and_only_where_they_are_differentiated() -> None:
    power = torch.tensor(1.5, dtype=D, requires_grad=True)
    counted = Counted(lambda params, x, y: loss(params, x, y) * power)
    A = operators.hessian(counted).over((X, Y), batch_size=4)(tree(THETA))
    A @ V
    counted.runs = 0
    A @ V
    assert counted.runs == 4
    with torch.no_grad():
        A @ V
    assert counted.runs == 7


def test_solutions_over_data_are_differentiated_twice() -> None:
    def solved(theta: Tensor) -> Tensor:
        A = operators.gauss_newton(model, mse_loss).over((X, Y), batch_size=4)(tree(theta))
        return operators.solve(A + 0.1, V, rtol=1e-13).square().sum()  # type: ignore[no-any-return]

    def dense(theta: Tensor) -> Tensor:
        jacobian = torch.func.jacrev(lambda t: model(tree(t), X))(theta).reshape(22, 8)
        matrix = jacobian.mT @ jacobian / 11 + 0.1 * torch.eye(8, dtype=D)
        return torch.linalg.solve(matrix, V).square().sum()

    close = {"rtol": 1e-8, "atol": 1e-8}
    torch.testing.assert_close(solved(THETA), dense(THETA), **close)
    torch.testing.assert_close(ad.grad(solved)(THETA), torch.func.grad(dense)(THETA), **close)
    torch.testing.assert_close(ad.hessian(solved)(THETA), torch.func.hessian(dense)(THETA), **close)


@pytest.mark.filterwarnings("ignore:Dynamo")
@pytest.mark.skipif(_torch.version < TorchVersion("2.13"), reason="older tracers are not supported")
def test_compiled_code_goes_through_the_data_uncompiled() -> None:
    A = operators.hessian(loss).over(PIECES)(tree(THETA))
    torch.testing.assert_close(
        torch.compile(lambda v: 2 * (A @ v), backend="eager")(V), 2 * hessian_at(THETA) @ V
    )
    make = torch.compile(lambda t: operators.hessian(loss).over(PIECES)(tree(t)) @ V, backend="eager")
    torch.testing.assert_close(make(THETA), hessian_at(THETA) @ V)


def test_value_and_gradient_are_differentiated() -> None:
    def value(theta: Tensor) -> Tensor:
        return operators.hessian(loss).over((X, Y), batch_size=4)(tree(theta)).value  # type: ignore[no-any-return]

    torch.testing.assert_close(ad.hessian(value)(THETA), hessian_at(THETA))


def test_operator_as_an_argument_of_a_transform() -> None:
    A = operators.hessian(loss).over((X, Y), batch_size=4)(tree(THETA))
    slope = ad.grad(lambda one: (one @ V).square().sum())(A)
    torch.testing.assert_close(flat(slope.args[0]), torch.func.grad(dense_norm)(THETA))


# What is refused.


def shuffled(drop_last: bool = False, size: int = 4) -> Any:
    return DataLoader(TensorDataset(X, Y), batch_size=size, shuffle=True, drop_last=drop_last)


class Exhausted:
    """An iterable whose iterators share what is left."""

    def __init__(self) -> None:
        self.rest = iter(PIECES)

    def __iter__(self) -> Any:
        return iter(list(self.rest))


class Flow(IterableDataset):  # type: ignore[type-arg]
    """Another number of samples each time."""

    def __init__(self) -> None:
        self.count = 6

    def __iter__(self) -> Iterator[Any]:
        self.count += 1
        yield from zip(X[: self.count], Y[: self.count], strict=True)


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        ((piece for piece in PIECES), {}, DataError, "got a generator, an iterator that is exhausted"),
        (iter(PIECES), {}, DataError, "got a list_iterator"),
        (zip([X], [Y], strict=True), {}, DataError, "got a zip"),
        (iter(LOADER), {}, DataError, "iterator"),
        (shuffled(drop_last=True), {}, DataError, "leaves out 3 others each time"),
        (X, {}, OptionError, "Pass batch_size="),
        ((X, Y), {}, OptionError, "Pass batch_size="),
        (TensorDataset(X, Y), {}, OptionError, "single samples"),
        (3, {}, OptionError, "got a int"),
        ("text", {}, OptionError, "got a str"),
        ((X, Y), {"batch_size": 0}, OptionError, "batch_size is a positive int"),
        ((X, Y), {"batch_size": True}, OptionError, "batch_size is a positive int"),
        (PIECES, {"reduction": "none"}, OptionError, "reduction is 'mean'"),
        (PIECES, {"memory": "lots"}, OptionError, "memory is a positive number .* to keep no batch"),
    ],
)
def test_refused_before_any_call(source: Any, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        operators.hessian(loss).over(source, **options)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ([], {}, "at least one batch"),
        (Exhausted(), {}, "at least one batch"),
        (DataLoader(Flow(), batch_size=4), {}, "batches of"),
        ([(X[:4], Y[:3])], {}, "batch 0 is weighed"),
        ([(X[:4], Y[:4]), (X[:0], Y[:0])], {}, "samples in batch 1, got none"),
        ((X, Y[:4]), {"batch_size": 2}, "one number of samples"),
        (LOADER, {"batch_size": 2}, "no tensor"),
    ],
)
def test_refused_when_the_operator_is_made(source: Any, options: Any, message: str) -> None:
    with pytest.raises((DataError, OptionError), match=message):
        operators.hessian(loss).over(source, **options)(tree(THETA))


def test_jacobian_is_refused_with_the_way_out() -> None:
    with pytest.raises(OptionError, match="gauss_newton"):
        operators.jacobian(model).over([X])


@pytest.mark.parametrize("argnums", [1, -1, (0, 1), "x"])
def test_argument_of_the_batch_cannot_be_differentiated(argnums: Any) -> None:
    with pytest.raises(ArgnumsError, match="which the batches hold"):
        operators.hessian(loss, argnums).over(PIECES)(tree(THETA))


def network(*layers: nn.Module) -> tuple[nn.Module, dict[str, Tensor], Any]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 5), *layers, nn.Linear(5, 2)).double()

    def loss(params: Any, x: Tensor, y: Tensor) -> Tensor:
        return mse_loss(ad.functional_call(module, params, (x,)), y)

    return module, dict(module.named_parameters()), loss


def test_dropout_is_refused_and_leaves_the_random_state() -> None:
    module, params, loss = network(nn.Dropout(0.3))
    before = torch.get_rng_state()
    with pytest.raises(DataError, match="draws random numbers"):
        operators.hessian(loss).over(LOADER)(params)
    assert torch.equal(torch.get_rng_state(), before)
    module.eval()
    operators.hessian(loss).over(LOADER)(params)
    assert torch.equal(torch.get_rng_state(), before)


def test_unchecked_dropout_draws_the_same_in_every_product() -> None:
    _, params, loss = network(nn.Dropout(0.3))
    A = operators.hessian(loss).over(shuffled(), check=False)(params)
    before = torch.get_rng_state()
    v = torch.ones(A.shape[1], dtype=D)
    one = A @ v
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    torch.testing.assert_close(A @ v, one, rtol=0, atol=0)
    matrix = A.to_matrix()
    torch.testing.assert_close(matrix, matrix.mT)


def test_batches_that_draw_are_not_kept() -> None:
    # A kept one would draw nothing, and the next would draw its numbers.
    _, params, loss = network(nn.Dropout(0.3))
    for memory in range(1000, 9000, 500):
        A = operators.hessian(loss).over((X, Y), batch_size=4, check=False, memory=memory)(params)
        v = torch.ones(A.shape[1], dtype=D)
        torch.testing.assert_close(A @ v, A @ v, rtol=0, atol=0)


def test_little_noise_is_refused_where_the_function_draws() -> None:
    noisy = lambda params, x, y: loss(params, x, y) * (1 + 1e-11 * torch.rand((), dtype=D))
    with pytest.raises(DataError, match="draws random numbers"):
        operators.hessian(noisy).over(PIECES)(tree(THETA))


@pytest.mark.filterwarnings("ignore:functional_call. the module wrote")
def test_batch_norm_in_training_mode_is_refused_where_batches_change() -> None:
    module, params, loss = network(nn.BatchNorm1d(5))
    with pytest.raises(DataError, match="BatchNorm in training mode"):
        operators.hessian(loss).over(shuffled())(params)
    module.eval()
    operators.hessian(loss).over(shuffled())(params)


def test_sum_is_not_taken_for_a_mean() -> None:
    with pytest.raises(DataError, match="Pass reduction='sum'"):
        operators.hessian(total).over(LOADER)(tree(THETA))
    penalty = lambda params, x, y: loss(params, x, y) + 0.1 * flat(params).square().sum()
    A = operators.hessian(penalty).over(LOADER)(tree(THETA))
    torch.testing.assert_close(A.to_matrix(), hessian_at(THETA) + 0.2 * torch.eye(8, dtype=D))
    # A zero is both.
    linear = operators.hessian(lambda params, x, y: (x @ params["w"]).mean()).over(LOADER)(tree(THETA))
    assert not linear.to_matrix().any()
    # Of less than three samples nothing is said; and one may ask for nothing to be said.
    operators.hessian(total).over((X, Y), batch_size=2)(tree(THETA))
    operators.hessian(total).over(LOADER, check=False)(tree(THETA))


@pytest.mark.parametrize("form", ["torch's functional_call", "a batch norm", "a count"])
def test_written_statistics_are_put_back_and_refused(form: str) -> None:
    module, params, _ = network(nn.BatchNorm1d(5))
    mean, variance, count = torch.zeros(2, dtype=D), torch.ones(2, dtype=D), torch.zeros((), dtype=D)

    def loss(params: Any, x: Tensor, y: Tensor) -> Tensor:
        if form == "torch's functional_call":
            return mse_loss(torch.func.functional_call(module, params, (x,)), y)
        output = x @ params["0.weight"][:2].T
        if form == "a count":
            count.detach().add_(1)
        else:
            output = nn.functional.batch_norm(output, mean, variance, training=True)
        return mse_loss(output, y)

    before = [tensor.clone() for tensor in (*module.buffers(), mean, variance, count)]
    with pytest.raises(DataError, match="They have been put back"):
        operators.hessian(loss).over(LOADER)(params)
    for tensor, old in zip((*module.buffers(), mean, variance, count), before, strict=True):
        assert torch.equal(tensor, old)


def test_small_dependence_on_batches_is_refused_and_rounding_is_not() -> None:
    x = torch.randn(64, 3)

    def of_batch(w: Tensor, x: Tensor, scale: float) -> Tensor:
        return ((x @ w) ** 4).mean() + scale * (x.mean(0) @ w) ** 4

    loader = DataLoader(TensorDataset(x), batch_size=8, shuffle=True)
    w = torch.ones(3)
    for scale, refused in ((0.0, False), (1.0, True)):
        maker = operators.hessian(lambda w, x, scale=scale: of_batch(w, x, scale)).over(loader)
        if refused:
            with pytest.raises(DataError, match="more than rounding"):
                maker(w)
        else:
            maker(w)


def test_shuffling_is_the_same_in_every_product() -> None:
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True, generator=generator)
    A = operators.hessian(loss).over(loader)(tree(THETA))
    before = generator.get_state(), torch.get_rng_state()
    one = A @ V
    torch.rand(5)
    torch.testing.assert_close(A @ V, one, rtol=0, atol=0)
    assert torch.equal(generator.get_state(), before[0])


def test_length_that_changes_is_an_error() -> None:
    batches = list(PIECES)
    A = operators.hessian(loss).over(batches)(tree(THETA))
    batches.append(PIECES[0])
    with pytest.raises(DataError, match=r"3 batches of 11 samples in all, got 4 batches of 15"):
        A @ V


def test_arguments_written_in_place_are_an_error() -> None:
    params = tree(THETA.clone())
    A = operators.hessian(loss).over(PIECES)(params)
    params["w"].mul_(2)
    with pytest.raises(InPlaceError, match="make it at clones"):
        A @ V
    x = X.clone()
    A = operators.hessian(loss).over((x, Y), batch_size=4)(tree(THETA))
    x.add_(1)
    with pytest.raises(InPlaceError, match="and the data"):
        A @ V


# Errors inside, and what is left.


def test_error_names_the_batch() -> None:
    batches = [*PIECES[:2], (X[:4, :2], Y[:4])]
    with pytest.raises(RuntimeError) as caught:
        operators.hessian(loss).over(batches)(tree(THETA))
    assert any("in batch 2" in note for note in caught.value.__notes__)


class Failing(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> Any:
        if index == 6:
            raise ValueError("lost")
        return X[index], Y[index]


def test_error_of_the_data_names_the_batch_and_leaves_the_random_state() -> None:
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="lost") as caught:
        operators.hessian(loss).over(DataLoader(Failing(), batch_size=4))(tree(THETA))
    assert any("in batch 1" in note for note in caught.value.__notes__)
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_end_when_the_function_fails() -> None:
    def failing(params: Any, x: Tensor, y: Tensor) -> Tensor:
        if torch.equal(y, Y[4:8]):
            raise ValueError("inside")
        return loss(params, x, y)

    loader = DataLoader(TensorDataset(X, Y), batch_size=4, num_workers=1, multiprocessing_context="fork")
    with pytest.raises(ValueError, match="inside") as caught:
        operators.hessian(failing).over(loader, check=False)(tree(THETA)) @ V
    assert any("in batch 1" in note for note in caught.value.__notes__)
    assert multiprocessing.active_children() == []


class Bar:
    """Stands for tqdm, and remembers."""

    bars: list[Bar] = []  # noqa: RUF012

    def __init__(self, desc: str, total: int | None, initial: int, unit: str, leave: bool) -> None:
        self.desc, self.total, self.leave, self.done, self.closed = desc, total, leave, initial, False
        self.bars.append(self)

    def set_postfix_str(self, text: str, refresh: bool) -> None:
        del text, refresh

    def update(self, count: int) -> None:
        self.done += count

    def close(self) -> None:
        self.closed = True


def test_a_bar_for_each_product_which_is_closed_in_any_case(monkeypatch: Any) -> None:
    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    monkeypatch.setattr(Bar, "bars", [])
    batches: list[Any] = list(PIECES)
    A = operators.hessian(loss).over(batches, progress=True)(tree(THETA))
    Bar.bars.clear()
    A @ V
    batches[1] = (X[:4, :2], Y[:4])
    with pytest.raises(RuntimeError):
        A @ V
    done = [(bar.desc, bar.total, bar.done, bar.closed) for bar in Bar.bars]
    name = "hessian of loss over 11 samples: product"
    assert done == [(name, 11, 11, True), (name, 11, 4, True)]


def test_a_bar_needs_tqdm(monkeypatch: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OptionError, match="autodiff\\[progress\\]"):
        operators.hessian(loss).over(PIECES, progress=True)


def test_repr_says_what_it_is() -> None:
    maker = operators.hessian(loss).over(PIECES)
    assert repr(maker) == "<<HessianOperator of loss> over a data set>"
    shown = repr(maker(tree(THETA)))
    assert (
        shown
        == "<hessian of loss over 11 samples: [8, 8], torch.float64, cpu, symmetric, 3 gradients a product>"
    )
    A = operators.hessian(loss).over(PIECES, memory="1MiB")(tree(THETA))
    A @ V
    assert "2 gradients a product" in repr(A)


@pytest.mark.parametrize("memory", [None, "1MiB"])
def test_threads_share_an_operator(memory: Any) -> None:
    A = operators.hessian(loss).over((X, Y), batch_size=4, memory=memory)(tree(THETA))
    expected, found = hessian_at(THETA), {}

    def work(number: int) -> None:
        for turn in range(5):
            found[number, turn] = A @ V.roll(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20
    for (number, _), product in found.items():
        torch.testing.assert_close(product, expected @ V.roll(number))


def test_size_of_batches_follows_memory() -> None:
    x = torch.linspace(0, 1, 5000, dtype=D).reshape(500, 10)
    w = torch.linspace(0.1, 1.0, 50, dtype=D)
    sizes = []
    for memory in ("1MiB", "4MiB", "1GiB"):
        with Meter(torch.device("cpu")) as meter:
            A = operators.hessian(wide).over(x, batch_size="auto", memory=memory)(w)
        sizes.append(A.data.size)
        assert memory == "1GiB" or meter.peak < {"1MiB": 1, "4MiB": 4}[memory] * 2**20
    assert 1 < sizes[0] < sizes[1] < sizes[2] == 500
    # Larger batches would be slower, whatever memory there is.
    maker = operators.hessian(wide).over(x.repeat(20, 1), batch_size="auto", check=False)
    with Meter(torch.device("cpu")) as meter:
        A = maker(w)
        A @ torch.ones_like(w)
    assert 2**24 < meter.peak < 1.2 * 2**26
