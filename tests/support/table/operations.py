"""Operations without a right rule in torch, against closed forms and difference quotients."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributions, nn
from torch.nn import functional

from scenarios import assert_close, difference
from table.row import NO_FORWARD, WRONG, Section, has_torch
from table.twice_forward import A

if TYPE_CHECKING:
    from collections.abc import Callable

    Function = Callable[[Tensor], Tensor]

OPERATIONS = Section("Operations without a rule, or with a wrong one")
_generator = torch.Generator().manual_seed(5)


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=_generator)


ROWS, OTHERS, MOVE = _normal(4, 2), _normal(3, 2), _normal(4, 2)


def distances(x: Tensor) -> Tensor:
    return torch.cdist(x, OTHERS)


def slopes_of_distances() -> Tensor:
    """[4, 3, 4, 2]: the distance of row i from row j moves with row i alone, along the unit vector."""
    apart = ROWS[:, None] - OTHERS
    units = apart / (apart * apart).sum(-1, keepdim=True).sqrt()
    return torch.einsum("ijk,il->ijlk", units, torch.eye(4, dtype=units.dtype))


@OPERATIONS.row("`jacrev(cdist)` at three or more rows", torch="wrong numbers", fails=WRONG, ours="right")
def jacrev_of_cdist(library: Any) -> None:
    assert_close(library.jacrev(distances)(ROWS), slopes_of_distances())


@OPERATIONS.row("`jvp` of cdist", torch="NotImplementedError", fails=NO_FORWARD, ours="right")
def jvp_of_cdist(library: Any) -> None:
    expected = torch.einsum("ijlk,lk->ij", slopes_of_distances(), MOVE)
    assert_close(library.jvp(distances, (ROWS,), (MOVE,))[1], expected)


@OPERATIONS.row(
    "Hessian of cdist, forward over reverse", torch="NotImplementedError", fails=NO_FORWARD, ours="right"
)
def hessian_of_cdist(library: Any) -> None:
    def func(x: Tensor) -> Tensor:
        return (distances(x) ** 3).sum()

    # 3 d^2 times the unit vector, summed over j: a gradient by hand.
    def gradient(x: Tensor) -> Tensor:
        apart = x[:, None] - OTHERS
        return 3 * (apart * (apart * apart).sum(-1, keepdim=True).sqrt()).sum(1)

    hessian = library.jacfwd(library.jacrev(func))(ROWS)
    torch.testing.assert_close(
        torch.tensordot(hessian, MOVE, 2), difference(gradient, ROWS, MOVE, 1e-3), rtol=1e-6, atol=1e-6
    )


@OPERATIONS.row(
    "`jacrev` of `masked_select` with a mask larger than the input",
    torch="RuntimeError",
    fails="RuntimeError: The size of tensor",
    ours="right",
)
def jacrev_of_masked_select(library: Any) -> None:
    mask = torch.tensor([[True, False, True], [True, True, False]])
    jacobian = library.jacrev(lambda x: x.masked_select(mask))(_normal(3))
    assert_close(jacobian, torch.eye(3, dtype=torch.float64)[[0, 2, 0, 1]])


@OPERATIONS.row(
    "`jacrev` of `torch.sparse.mm`",
    torch="RuntimeError",
    fails="RuntimeError: expand is unsupported",
    ours="right",
)
def jacrev_of_sparse_mm(library: Any) -> None:
    dense = torch.tensor([[0.0, 2.0, 0.0, 0.0], [0.0, 0.0, -1.0, 3.0]], dtype=torch.float64)
    jacobian = library.jacrev(lambda x: torch.sparse.mm(dense.to_sparse(), x))(ROWS)
    assert_close(jacobian, torch.einsum("ij,kl->ikjl", dense, torch.eye(2, dtype=dense.dtype)))


@OPERATIONS.row('`jvp` of `scatter_reduce(..., "prod")`', torch="zero", fails=WRONG, ours="right")
def jvp_of_scatter_reduce_prod(library: Any) -> None:
    x, t = _normal(2, 3).unbind(0)

    def func(x: Tensor) -> Tensor:
        return torch.ones(2, dtype=x.dtype).scatter_reduce(0, torch.tensor([0, 0, 1]), x, "prod")

    expected = torch.stack([x[0] * t[1] + x[1] * t[0], t[2]])
    assert_close(library.jvp(func, (x,), (t,))[1], expected)


@torch.library.custom_op("autodiff_table::cube", mutates_args=())
def cube(x: Tensor) -> Tensor:
    return x**3


cube.register_autograd(
    lambda ctx, cotangent: 3 * ctx.saved_tensors[0] ** 2 * cotangent,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@OPERATIONS.row(
    "`jvp` of an operator made by `torch.library.custom_op`", torch="zero", fails=WRONG, ours="right"
)
def jvp_of_a_custom_op(library: Any) -> None:
    x, t = _normal(2, 3).unbind(0)
    assert_close(library.jvp(cube, (x,), (t,))[1], 3 * x**2 * t)


SHAPES = torch.tensor([0.7, 2.3, 5.0], dtype=torch.float64)
DRAWN: dict[str, Function] = {
    "Gamma": lambda a: distributions.Gamma(a, a + 1).rsample(),
    "Chi2": lambda a: distributions.Chi2(a).rsample(),
    "StudentT": lambda a: distributions.StudentT(a).rsample(),
    "FisherSnedecor": lambda a: distributions.FisherSnedecor(a, a + 1).rsample(),
}


@OPERATIONS.row(
    "`jvp`, `jacfwd` of `rsample` of Gamma, Chi2, StudentT, FisherSnedecor",
    torch="NotImplementedError",
    fails=NO_FORWARD,
    ours="right: the tangent is that of the draw that is returned",
    over=DRAWN,
)
def forward_mode_of_random_draws(library: Any, draw: Function) -> None:
    def seeded(a: Tensor) -> Tensor:
        torch.manual_seed(11)
        return draw(a)

    t = torch.tensor([1.0, 0.5, -2.0], dtype=torch.float64)
    value = seeded(SHAPES)
    expected = torch.autograd.functional.jacobian(seeded, SHAPES) @ t  # of the same draw, by reverse mode
    for got, pushed in (
        library.jvp(seeded, (SHAPES,), (t,)),
        (value, library.jacfwd(seeded)(SHAPES) @ t),
    ):
        assert_close(got, value)
        assert_close(pushed, expected)


POINTS = 0.7 * _normal(1, 2, 3, 2).tanh()
SIGNS = torch.tensor([1.0, -1, 1, 1, -1], dtype=torch.float64)
IMAGE = _normal(1, 2, 4, 5)
NO_RULE: dict[str, tuple[Function, Tensor]] = {
    "index_reduce": (
        lambda x: torch.ones(2, 2, dtype=x.dtype).index_reduce(0, torch.tensor([0, 1, 0, 1]), x, "mean"),
        ROWS,
    ),
    "pdist": (functional.pdist, ROWS),
}
if not has_torch("2.15"):  # which has it no more
    NO_RULE["cholesky"] = (lambda a: torch.cholesky(a @ a.T), A)


@OPERATIONS.row(
    "`jvp` of index_reduce, pdist, cholesky (`linalg.cholesky` is right in torch too)",
    torch="NotImplementedError",
    fails=NO_FORWARD,
    ours="right: by the pullback of the pullback, or by a formula",
    over=NO_RULE,
)
def jvp_of_operations_without_forward_mode(library: Any, case: tuple[Function, Tensor]) -> None:
    func, x = case
    t = x.flip(0).cos()
    expected = difference(func, x, t, 1e-3)
    torch.testing.assert_close(library.jvp(func, (x,), (t,))[1], expected, rtol=1e-6, atol=1e-6)


def sampled(grid: Tensor) -> Tensor:
    return functional.grid_sample(IMAGE, grid, align_corners=False)


@OPERATIONS.row(
    "`jvp` of grid_sample",
    torch="NotImplementedError",
    fails=NO_FORWARD,
    ours="right, by the pullback of the pullback",
    mended="2.15",
    needs="2.13",
)
def jvp_of_grid_sample(library: Any) -> None:
    jvp_of_operations_without_forward_mode(library, (sampled, POINTS))


# Losses and layers whose gradient has no forward mode.

LOSSES: dict[str, tuple[str, Function, Tensor]] = {
    "hvp-huber_loss": ("hvp", lambda x: functional.huber_loss(x, SIGNS), _normal(5)),
    "hvp-soft_margin_loss": ("hvp", lambda x: functional.soft_margin_loss(x, SIGNS), _normal(5)),
    "hessian-soft_margin_loss": ("hessian", lambda x: functional.soft_margin_loss(x, SIGNS), _normal(5)),
}
SECOND: dict[str, Callable[[Any, Function, Tensor, Tensor], Tensor]] = {
    "hvp": lambda library, func, x, t: library.hvp(func, (x,), (t,))[1],
    "hessian": lambda library, func, x, t: torch.tensordot(library.hessian(func)(x), t, t.dim()),
}


@OPERATIONS.row(
    "`hvp`, `hessian` of cdist and hardsigmoid, which lack a rule in one mode combination",
    torch="NotImplementedError",
    fails="(NotImplementedError|RuntimeError): ",
    ours="right: another combination is tried, from the same random numbers; where all lack a rule, the error says so",
    over={
        "hvp-cdist": ("hvp", lambda x: (torch.cdist(x[:, None], x[:2, None] + 1) ** 3).sum(), _normal(5)),
        "hessian-cdist": (
            "hessian",
            lambda x: (torch.cdist(x[:, None], x[:2, None] + 1) ** 3).sum(),
            _normal(5),
        ),
        "hessian-hardsigmoid": ("hessian", lambda x: (functional.hardsigmoid(x) ** 2).sum(), _normal(5)),
    },
)
def another_order_of_modes(library: Any, case: tuple[str, Function, Tensor]) -> None:
    second, func, x = case
    t = x.flip(0).cos()
    expected = difference(partial(torch.autograd.functional.jacobian, func), x, t, 1e-4)
    torch.testing.assert_close(SECOND[second](library, func, x, t), expected, rtol=1e-5, atol=1e-6)


@OPERATIONS.row(
    "`hvp` of huber_loss; `hvp`, `hessian` of soft_margin_loss",
    torch="NotImplementedError",
    fails=NO_FORWARD,
    ours="right",
    over=LOSSES,
    issue="pytorch#123996",
)
def second_derivatives_of_losses(library: Any, case: tuple[str, Function, Tensor]) -> None:
    second, func, x = case
    t = x.flip(0).cos()
    expected = difference(partial(torch.autograd.functional.jacobian, func), x, t, 1e-4)
    torch.testing.assert_close(SECOND[second](library, func, x, t), expected, rtol=1e-5, atol=1e-7)


@OPERATIONS.row(
    "`hvp`, `hessian` of grid_sample",
    torch="NotImplementedError",
    fails=NO_FORWARD,
    ours="right",
    over={"hvp": "hvp", "hessian": "hessian"},
    needs="2.13",
)
def second_derivatives_of_grid_sample(library: Any, second: str) -> None:
    second_derivatives_of_losses(library, (second, lambda grid: (sampled(grid) ** 3).sum(), POINTS))


@OPERATIONS.row(
    "`hvp`, `hessian` of an LSTM",
    torch="NotImplementedError",
    fails=NO_FORWARD,
    ours="right",
    over={"hvp": "hvp", "hessian": "hessian"},
    issue="pytorch#105982",
)
def second_derivatives_of_an_lstm(library: Any, second: str) -> None:
    torch.manual_seed(8)
    module = nn.LSTM(3, 4)  # its fused kernel is for float32
    x, t = torch.randn(2, 5, 1, 3).unbind(0)

    def func(x: Tensor) -> Tensor:
        return (module(x)[0] ** 2).sum()

    result = SECOND[second](library, func, x, t).detach()
    module.double()
    expected = difference(partial(torch.autograd.functional.jacobian, func), x.double(), t.double(), 1e-3)
    torch.testing.assert_close(result, expected.float(), rtol=1e-3, atol=1e-5)


@OPERATIONS.row(
    "gradients of recurrent layers and their cells for every sample, `vmap(grad)`",
    torch="RuntimeError",
    fails="RuntimeError: .*(output with shape|[Bb]atching rule)",
    ours="right",
    over={"GRU": nn.GRU, "RNN": nn.RNN, "LSTMCell": nn.LSTMCell},
)
def gradients_of_recurrent_layers_per_sample(library: Any, layer: Any) -> None:
    torch.manual_seed(8)
    module = layer(3, 4, dtype=torch.float64)
    x = torch.randn(5, 2, 3, dtype=torch.float64)

    def func(x: Tensor) -> Tensor:
        return (module(x)[0] ** 2).sum()

    result = library.vmap(library.grad(func))(x).detach()
    expected = [torch.autograd.functional.jacobian(func, one) for one in x]
    assert_close(result, torch.stack(expected))


@OPERATIONS.row(
    '`jacfwd(randomness="different")`',
    torch="another mask for every column: no function has that Jacobian",
    fails="AssertionError: a row of the Jacobian mixes masks",
    ours="one mask for all columns",
    issue="functorch#408",
)
def jacfwd_of_a_random_function(library: Any) -> None:
    torch.manual_seed(1)
    weights, x = torch.randn(6, 5, dtype=torch.float64), _normal(5)
    jacobian = library.jacfwd(lambda x: functional.dropout(weights @ x), randomness="different")(x)
    mask = torch.round(jacobian / weights)
    assert_close(jacobian, mask * weights)
    assert (mask == mask[:, :1]).all(), "a row of the Jacobian mixes masks"


@OPERATIONS.row(
    "`jvp` of linear_cross_entropy in chunks",
    torch="zero",
    fails=WRONG,
    ours="right",
    needs="2.13",
)
def jvp_of_linear_cross_entropy(library: Any) -> None:
    x, weight, move = _normal(4, 2), _normal(3, 2), _normal(4, 2)
    target = torch.tensor([0, 2, 1, 1])
    chunked = nn.LinearCrossEntropyOptions(chunking_method="auto")

    def func(x: Tensor) -> Tensor:
        return functional.linear_cross_entropy(x, weight, target, options=chunked)  # type: ignore[attr-defined]

    plain = lambda x: functional.cross_entropy(x @ weight.mT, target)
    assert_close(library.jvp(func, (x,), (move,))[1], difference(plain, x, move))


@OPERATIONS.row("`linearize` of logcumsumexp", torch="right", fails=None, ours="right")
def linearize_of_logcumsumexp(library: Any) -> None:
    x, t = torch.tensor([0.2, -1.0, 0.7], dtype=torch.float64), _normal(3)
    pushed = library.linearize(lambda x: x.logcumsumexp(0), x)[1](t)
    expected = (x.exp() * t).cumsum(0) / x.exp().cumsum(0)
    torch.testing.assert_close(pushed, expected, rtol=1e-4, atol=1e-4)


@OPERATIONS.row(
    "`jvp` of logcumsumexp of numbers that are far apart",
    torch="wrong numbers",
    fails=WRONG,
    ours="right, by the pullback of the pullback",
)
def jvp_of_logcumsumexp(library: Any) -> None:
    x = torch.tensor([0.0, 1.0, 50.0], dtype=torch.float64)
    t = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)
    weight = torch.sigmoid(x[1] - x[0])  # of the second of the first two
    expected = torch.stack([t[0], (1 - weight) * t[0] + weight * t[1], t[2]])
    assert_close(library.jvp(lambda x: x.logcumsumexp(0), (x,), (t,))[1], expected)


@OPERATIONS.row(
    "`jvp` of cholesky_inverse",
    torch="wrong numbers",
    fails=WRONG,
    ours="right, by the pullback of the pullback",
)
def jvp_of_cholesky_inverse(library: Any) -> None:
    factor = _normal(3, 3).tril() + 3 * torch.eye(3, dtype=torch.float64)
    move = _normal(3, 3).tril()
    inverse = (factor @ factor.mT).inverse()
    expected = -inverse @ (move @ factor.mT + factor @ move.mT) @ inverse
    assert_close(library.jvp(torch.cholesky_inverse, (factor,), (move,))[1], expected)


@OPERATIONS.row(
    "`functional.jvp` of cholesky along a matrix that is not symmetric",
    torch="right",
    fails=None,
    ours="right",
)
def functional_jvp_of_cholesky(library: Any) -> None:
    factor = _normal(3, 3).tril() + 3 * torch.eye(3, dtype=torch.float64)
    move = _normal(3, 3)
    # Reverse mode symmetrises. I. Murray, "Differentiation of the Cholesky decomposition" (2016).
    inner = factor.inverse() @ (move + move.mT) / 2 @ factor.inverse().mT
    expected = factor @ (inner.tril() - inner.diagonal().diag() / 2)
    _, product = library.functional.jvp(torch.linalg.cholesky, factor @ factor.mT, move)
    assert_close(product, expected)
