"""The tape rule: eagerly everything that works with backward() works inside a transform.

What torch.func refuses, and what these tests do, stands in docs/limitations.md.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import graph
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import autodiff as ad
from autodiff import _torch
from autodiff.core.reverse import record
from autodiff.errors import BatchedPullError, InPlaceError
from every_transform import EVERY, Every, T, W, X, cubic, each_derivative, gradient
from scenarios import assert_close

# What has no level at any time: the derivative is all plain autograd.
GROUND = ["grad", "value_and_grad", "vjp", "linearize", "jacrev-1", "hessian-1", "hvp", "jacrev", "jacobian"]
on_ground = pytest.mark.parametrize("name", GROUND)


def transform_named(name: str) -> Every:
    return next(every for every in EVERY if every.name == name)


def checkpointed(x: Tensor) -> Tensor:
    return checkpoint(cubic, x, use_reentrant=False)


def saved_on_cpu(x: Tensor) -> Tensor:
    with graph.save_on_cpu():
        return cubic(x)


def hooked(x: Tensor) -> Tensor:
    with graph.saved_tensors_hooks(lambda t: t * 1, lambda t: t):
        return cubic(x)


class OldStyle(torch.autograd.Function):
    """x^3 without setup_context."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * cotangent


def old_style(x: Tensor) -> Tensor:
    return (W * OldStyle.apply(x)).sum()


def with_requires_grad(x: Tensor) -> Tensor:
    free = torch.ones(3, dtype=x.dtype).requires_grad_()
    (slope,) = torch.autograd.grad((free**2).sum(), free)
    return (slope / 2 * W * x**3).sum()


def with_retain_grad(x: Tensor) -> Tensor:
    y = x**3
    y.retain_grad()
    return (W * y).sum()


def with_hook(x: Tensor) -> Tensor:
    y = x**3
    y.register_hook(lambda cotangent: cotangent * 1)
    return (W * y).sum()


def with_nested_functional(x: Tensor) -> Tensor:
    slopes = torch.autograd.functional.jacobian(lambda y: y**4 / 4, x, create_graph=True)
    return (W * slopes.diagonal()).sum()


def with_nested_grad(x: Tensor) -> Tensor:
    (slope,) = torch.autograd.grad((x**4 / 4).sum(), x, create_graph=True)
    return (W * slope).sum()


def with_anomaly_detection(x: Tensor) -> Tensor:
    with torch.autograd.set_detect_anomaly(mode=False):
        return cubic(x)


PLAIN_AUTOGRAD = [
    checkpointed,
    saved_on_cpu,
    hooked,
    old_style,
    with_requires_grad,
    with_retain_grad,
    with_hook,
    with_nested_functional,
    with_nested_grad,
    with_anomaly_detection,
]


@on_ground
@pytest.mark.parametrize("func", PLAIN_AUTOGRAD, ids=lambda f: f.__name__)
def test_what_backward_allows_works_on_the_ground(name: str, func: Any) -> None:
    every = transform_named(name)
    assert_close(every.apply(func, X), every.expected(X, W))


@pytest.mark.parametrize("func", [saved_on_cpu, checkpointed, hooked], ids=lambda f: f.__name__)
def test_saved_tensor_hooks_work_in_a_batched_hessian(func: Any) -> None:
    every = transform_named("hessian")
    assert_close(every.apply(func, X), every.expected(X, W))


def test_saved_tensor_hook_inside_vmap_is_an_error_that_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"saved-tensor hook .* cannot run inside a transform"):
        ad.vmap(ad.grad(saved_on_cpu))(X[None])


def test_hook_inside_sees_the_cotangent() -> None:
    seen = []

    def func(x: Tensor) -> Tensor:
        y = x * 1
        y.register_hook(lambda cotangent: seen.append(cotangent.clone()))
        return cubic(y)

    ad.grad(func)(X)
    assert_close(seen, [gradient(X)])


def test_escaped_tensors_are_ordinary() -> None:
    escaped = []

    def func(x: Tensor) -> Tensor:
        escaped.append(x * 2)
        return cubic(x)

    ad.grad(func)(X)
    assert_close(escaped[0].detach() + 1, 2 * X + 1)
    assert not _torch.is_wrapper(escaped[0])


def test_in_place_writes_to_captured_tensors_take_effect() -> None:
    counter, log = torch.zeros(()), torch.zeros(3, dtype=torch.float64)

    def func(x: Tensor) -> Tensor:
        counter.add_(1)
        log.copy_(x.detach())
        return cubic(x)

    ad.grad(func)(X)
    assert counter.item() == 1
    assert_close(log, X)


@on_ground
def test_write_to_a_computed_input_that_requires_grad_is_refused(name: str) -> None:
    """Torch lets it pass, and the derivative would be one at the written value."""
    x = X.clone().requires_grad_() * 1
    with pytest.raises(InPlaceError, match=r"wrote in place to an argument .* of shape \[\(3,\)\]"):
        transform_named(name).apply(lambda x: cubic(x.mul_(2)), x)


@pytest.mark.parametrize("computed", [False, True])
@pytest.mark.parametrize("func", [cubic, lambda x: 2 * x], ids=["cubic", "linear"])
def test_input_that_is_written_after_it_was_recorded(func: Any, *, computed: bool) -> None:
    """A written view has another place in the graph, so that no cotangent would arrive: zeros, silently."""
    x = X.clone().requires_grad_()
    x = x * 1 if computed else x
    _, pullback = ad.vjp(func, x)
    before = pullback(torch.ones_like(func(X)))
    with torch.no_grad():
        x.add_(1)
    assert before[0].abs().sum() > 0
    with pytest.raises(
        InPlaceError, match=r"written in place after the function was recorded.*record the function anew"
    ):
        pullback(torch.ones_like(func(X)))


def test_embedding_that_renormalises_its_weight() -> None:
    """It writes to a leaf that requires grad, which torch lets it do; nothing has used the leaf before."""
    places = torch.tensor([0, 2, 2])
    start = torch.linspace(-3, 3, 12, dtype=torch.float64).view(4, 3)

    def func(weight: Tensor, other: Tensor) -> Tensor:
        # The second input is not reached by all that is pulled.
        return functional.embedding(places, weight, max_norm=1.0).pow(3).sum() + 0 * other.sum()

    plain, other = start.clone().requires_grad_(), X.clone().requires_grad_()
    expected = torch.autograd.grad(func(plain, other), plain)[0]
    weight = start.clone().requires_grad_()
    assert_close(ad.grad(func)(weight, other), expected)
    weight = start.clone().requires_grad_()
    H = ad.hessian(func, argnums=(0, 1))(weight, other)
    # The weight is a constant but for the numbers that it ends up with.
    assert_close(H[0][0].reshape(12, 12).diagonal().reshape(4, 3)[2], 6 * 2 * weight.detach()[2])
    assert_close(weight.detach(), plain.detach())


def test_write_without_grad_mode_after_a_use_is_refused() -> None:
    """The first use has another place in the graph than the second: half of the gradient, silently."""

    def func(x: Tensor) -> Tensor:
        before = cubic(x)
        with torch.no_grad():
            x.add_(1)
        return before + cubic(x)

    with pytest.raises(InPlaceError, match="write to a clone"):
        ad.grad(func)(X.clone().requires_grad_())


@pytest.mark.parametrize("layer", [functional.silu, functional.mish], ids=lambda f: f.__name__)
def test_pull_inside_forward_mode_takes_the_formula_that_carries_tangents(layer: Any) -> None:
    """Without grad mode torch pulls these by one fused operation, which has no forward rule."""
    x, t = torch.randn(2, 3, 4, dtype=torch.float64).unbind(0)

    def func(x: Tensor) -> Tensor:
        return (layer(x) ** 2).sum()

    _, expected = torch.autograd.functional.hvp(func, x, t)
    assert_close(ad.jvp(ad.grad(func), (x,), (t,))[1], expected)


@each_derivative
def test_same_numbers_on_a_level_as_on_the_ground(every: Every) -> None:
    """Inside somebody else's vmap the tape is a functorch level."""
    result = torch.func.vmap(lambda x: every.apply(cubic, x))(torch.stack([X, T]))
    assert_close(result, torch.stack([every.expected(X, W), every.expected(T, W)]))


def listed(func: Any) -> Any:
    """A function of tensors as the tape wants it."""
    return lambda inputs, lift: (list(func(*inputs)), [])


def test_tape_gives_none_for_an_input_that_nothing_depends_on() -> None:
    tape = record(listed(lambda x, y: (x * 2, y * 0)), [X, T])
    assert_close(tape.outputs, [2 * X, T * 0])
    assert_close(tape.pull([X, None], retain_graph=True), [2 * X, None])
    assert_close(tape.pull([None, X], retain_graph=True), [None, X * 0])
    assert_close(tape.pull([None, None]), [None, None])


def test_tape_detaches_its_outputs_where_nobody_watches() -> None:
    tape = record(listed(lambda x: (x.sin(), x)), [X])
    assert [output.requires_grad for output in tape.outputs] == [False, False]


def test_tape_sees_a_captured_leaf_that_is_itself_an_output() -> None:
    w = W.clone().requires_grad_()
    tape = record(listed(lambda x: (x * 2, w)), [X])
    assert tape.outputs[1].requires_grad


def test_tape_sees_a_captured_leaf_deep_in_the_graph() -> None:
    w = W.clone().requires_grad_()
    y = w * 1
    for _ in range(50):
        y = y * 1
    result = ad.grad(lambda x: cubic(x, y))(X)
    (by_w,) = torch.autograd.grad(result.sum(), w)
    assert_close(by_w, 3 * X**2)


def test_unwatched_gradient_frees_its_graph() -> None:
    """No double backward is prepared: a Function whose backward has none is fine."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        def backward(ctx: Any, cotangent: Tensor) -> Tensor:
            made_with_graph.append(torch.is_grad_enabled())
            return 2 * ctx.saved_tensors[0] * cotangent

    made_with_graph: list[bool] = []
    ad.grad(lambda x: Once.apply(x).sum())(X)
    ad.jacrev(Once.apply)(X)
    ad.vjp(Once.apply, X)[1](T)
    assert made_with_graph == [False] * 3
    ad.grad(lambda x: Once.apply(x).sum())(X.clone().requires_grad_())
    assert made_with_graph == [False] * 3 + [True]


def test_pull_with_retain_graph_frees_nothing_that_an_outer_tape_shares() -> None:
    """An inner jacrev reads the graph that the outer one records."""
    inner = ad.jacrev(lambda x: x.exp() * x[0])
    result = ad.jacrev(lambda x: inner(x).sum() + inner(x * 2).sum())(X)
    # J(x) = diag(exp(x) x0) + exp(x) e0^T, whose entries sum to sum(exp(x)) x0 + sum(exp(x)).
    expected = X.exp() * (X[0] + 1) + 2 * (2 * X).exp() * (2 * X[0] + 1)
    expected[0] += X.exp().sum() + 2 * (2 * X).exp().sum()
    assert_close(result, expected)


def test_tensor_subclass_goes_through_the_ground_tape() -> None:
    class Tagged(Tensor):
        pass

    x = X.as_subclass(Tagged)
    assert_close(ad.grad(cubic)(x).as_subclass(Tensor), gradient(X))
    parameter = torch.nn.Parameter(X.clone())
    result = ad.grad(cubic)(parameter)
    assert type(result) is Tensor
    assert_close(result.detach(), gradient(X))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["grad", "jacrev", "hessian"])
def test_linalg_on_a_level_leaves_no_graph_where_none_is_recorded(mode: Any, name: str) -> None:
    """A pull through linalg's operations makes a graph for its own sake; nobody sees it without grad mode."""
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def func(x: Tensor) -> Tensor:
        return scale * torch.linalg.slogdet(torch.diag(x)).logabsdet

    x = torch.tensor([[1.0, 2.0], [4.0, 5.0]], dtype=torch.float64)
    with mode():
        result = ad.vmap(getattr(ad, name)(func))(x)
    assert not result.requires_grad
    assert_close(result.clone(), 2 / x if name != "hessian" else torch.diag_embed(-2 / x**2))


AUX = {"a tensor": lambda x: x.sum(), "a constant": lambda x: 3, "nothing": lambda x: None}


@pytest.mark.parametrize("aux", AUX.values(), ids=AUX)
def test_aux_does_not_hide_what_the_graph_asks_for(aux: Any) -> None:
    """The policy of a pull is that of the outputs' graph, whatever the graph of aux holds."""
    x, y = torch.randn(4, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    apart = x[:, None] - y
    units = apart / apart.norm(dim=-1, keepdim=True)
    expected = torch.einsum("ijk,il->ijlk", units, torch.eye(4, dtype=x.dtype))
    assert_close(ad.jacrev(lambda x: (torch.cdist(x, y), aux(x)), has_aux=True)(x)[0], expected)
    _, pullback, _ = ad.vjp(lambda x: (torch.cdist(x, y), aux(x)), x, has_aux=True)
    with pytest.raises(BatchedPullError, match="cdist"):
        ad.vmap(pullback)(torch.ones(2, 4, 3, dtype=x.dtype))
    t = torch.tensor([0.2, -1.0, 0.7], dtype=torch.float64)
    jacobian, _ = ad.jacobian(lambda s: ((t * s).logcumsumexp(0), aux(s)), has_aux=True)(
        torch.ones((), dtype=t.dtype)
    )
    torch.testing.assert_close(jacobian, (t * t.exp()).cumsum(0) / t.exp().cumsum(0), rtol=1e-4, atol=1e-4)


def test_parts_of_a_hessian_pull_one_row_at_a_time_where_torch_cannot_batch() -> None:
    mask = torch.tensor([True, False, True, True])
    x = torch.tensor([0.5, 2.0, -1.5, 1.0], dtype=torch.float64)
    cubes = lambda x: (x.masked_select(mask) ** 3).sum()
    diagonal = 6 * x * mask
    assert_close(ad.hessian_diagonal(cubes)(x), diagonal)
    assert_close(ad.hessian_block_diagonal(cubes)(x), diagonal.diag())
    assert_close(ad.hessian_trace(cubes)(x), diagonal.sum())
    assert_close(ad.hessian_eigenvalues(cubes, 2)(x), diagonal.sort(descending=True).values[:2])
    assert_close(ad.hessian_eigenvalues(cubes, 1, iterations=1)(x.repeat(30)[:4]), diagonal.max()[None])


OUTSIDE: dict[str, Any] = {
    "silu": functional.silu,
    "mish": functional.mish,
    "group_norm": lambda x: functional.group_norm(x.view(1, 2, 2), 1).flatten(),
    "hardsigmoid": functional.hardsigmoid,
    "cdist": lambda x: torch.cdist(x[:, None], x[:2, None] + 1).flatten(),
    "mse_loss": lambda x: functional.mse_loss(x, x.detach() + 1)[None],
    "a captured parameter": lambda x: functional.silu(x * CAPTURED),
}
CAPTURED = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", OUTSIDE)
def test_pullback_made_outside_is_linear_in_forward_mode(name: str) -> None:
    """Whatever rules its operations have: the tangent of what it gives is what it gives of the tangent."""
    x = torch.tensor([0.3, -1.2, 0.8, 2.1], dtype=torch.float64)
    output, pullback = ad.vjp(OUTSIDE[name], x)
    pull = lambda c: pullback(c)[0]
    cotangent = torch.linspace(1, 2, output.numel()).double()
    moved = cotangent.cos()
    expected = pull(cotangent).detach(), pull(moved).detach()
    pushed = ad.jvp(lambda c: 2 * pull(c), (cotangent,), (moved,))
    assert_close([one.detach() / 2 for one in pushed], list(expected))
    if name != "cdist":  # whose pullback cannot be batched
        assert_close(ad.jacfwd(pull)(cotangent).detach() @ moved, expected[1])
        batched = ad.vmap(lambda c, t: ad.jvp(pull, (c,), (t,)))(cotangent[None], moved[None])
        assert_close([one[0].detach() for one in batched], list(expected))
    if name == "a captured parameter":
        slopes = [
            torch.autograd.grad(one.sum(), CAPTURED, retain_graph=True)[0]
            for one in (pushed[1] / 2, pull(moved))
        ]
        assert_close(*slopes)


def test_pushforward_made_outside_is_linear_in_forward_mode() -> None:
    x, t = torch.tensor([0.3, -1.2], dtype=torch.float64), torch.tensor([1.0, 2.0], dtype=torch.float64)
    _, pushforward = ad.linearize(lambda x: functional.mse_loss(x, torch.zeros_like(x)), x)
    assert_close(ad.jvp(pushforward, (x,), (t,)), (x @ x, x @ t))


def test_pullback_made_inside_a_forward_mode_carries_its_tangents() -> None:
    def pulled(x: Tensor) -> Tensor:
        _, pullback = ad.vjp(functional.silu, x)
        return pullback(x)[0]

    closed = lambda x: x * (x.sigmoid() * (1 + x * (1 - x.sigmoid())))
    expected = torch.autograd.functional.jacobian(closed, X) @ T
    assert_close(ad.jvp(pulled, (X,), (T,)), (closed(X), expected))
