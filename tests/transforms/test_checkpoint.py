"""checkpoint(func): the same numbers as func under every transform, by a second run, in less memory."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import autodiff as ad
from autodiff.core.memory import Meter
from autodiff.errors import CaptureError, InPlaceError
from every_transform import EVERY, Every, T, W, X, cubic
from scenarios import assert_close

segment = ad.checkpoint(lambda x: W * x**3)


@pytest.mark.parametrize("every", EVERY, ids=lambda every: every.name)
def test_every_transform_of_a_checkpointed_function(every: Every) -> None:
    assert_close(every.apply(lambda x: segment(x).sum(), X), every.expected(X, W))


@pytest.mark.parametrize("every", EVERY, ids=lambda every: every.name)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_captured_parameters_are_differentiated(every: Every, requires_grad: bool) -> None:
    """By plain autograd around the transform: everything here is linear in w."""
    w = W.clone().requires_grad_(requires_grad)
    result = every.apply(lambda x: ad.checkpoint(lambda x: w * x**3)(x).sum(), X)
    assert_close(result.detach(), every.expected(X, W))
    assert result.requires_grad is requires_grad
    if requires_grad:
        weights = torch.randn_like(result)
        (slope,) = torch.autograd.grad((weights * result).sum(), w)
        again = W.clone().requires_grad_()
        assert_close(slope, torch.autograd.grad((weights * every.expected(X, again)).sum(), again)[0])


ORDERS = {"grad": ad.grad, "jacfwd": ad.jacfwd, "jacrev": ad.jacrev, "torch grad": torch.func.grad}


@pytest.mark.parametrize("names", list(itertools.product(ORDERS, repeat=2)), ids="-".join)
def test_captured_tensors_of_other_transforms_are_differentiated(names: tuple[str, str]) -> None:
    """The inner transform differentiates by x, the outer one by what the segment captures."""
    outer, inner = (ORDERS[name] for name in names)

    def of_w(w: Tensor) -> Tensor:
        return inner(lambda x: ad.checkpoint(lambda x: (w * x**3).sin())(x).sum())(X).sum()

    expected = ad.grad(lambda w: ad.grad(lambda x: (w * x**3).sin().sum())(X).sum())(W)
    assert_close(outer(of_w)(W), expected)
    rows = ad.vmap(outer(of_w))(torch.stack([W, T]))
    assert_close(rows[0], expected)


def test_captured_batched_tensors_of_a_vmap_around() -> None:
    """The backward pass comes after vmap, when the level of the captured tensor is gone."""
    x = X.clone().requires_grad_()
    scales = torch.tensor([1.0, -2.0], dtype=torch.float64)
    ad.vmap(lambda s: ad.checkpoint(lambda x: (s * x**3).sum())(x))(scales).sum().backward()
    assert_close(x.grad, -3 * X**2)


def test_modules_and_functional_calls() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    params = {name: param.detach() for name, param in module.named_parameters()}
    xs = torch.randn(5, 3, dtype=torch.float64)

    def loss(params: Any, x: Tensor, *, checkpointed: bool) -> Tensor:
        run = lambda x: ad.functional_call(module, params, (x,))
        return ((ad.checkpoint(run) if checkpointed else run)(x) ** 2).sum()

    for transform in (ad.grad, ad.hessian):
        pairs = [
            ad.vmap(transform(loss), in_dims={"params": None, "x": 0})(params, xs, checkpointed=c)
            for c in (True, False)
        ]
        assert_close(*pairs)
    ad.checkpoint(module)(xs).sum().backward()
    expected = torch.autograd.grad(module(xs).sum(), list(module.parameters()))
    assert_close([param.grad for param in module.parameters()], list(expected))


def test_trees_static_arguments_and_keywords() -> None:
    @ad.checkpoint
    def func(tree: dict[str, Any], power: int, *, name: str, none: None = None) -> dict[str, Any]:
        return {"out": [tree["x"] ** power, tree["count"]], "name": name, "none": none}

    def total(tree: Any) -> Tensor:
        output = func(tree, 3, name="n")
        assert output["name"] == "n"
        assert output["out"][1].dtype == torch.int64
        return output["out"][0].sum()

    tree = {"x": X, "count": torch.arange(2), "text": "t"}
    assert_close(ad.grad(total)(tree)["x"], 3 * X**2)
    batch = {"x": torch.stack([X, 2 * X]), "count": torch.arange(2), "text": "t"}
    in_dims = ({"x": 0, "count": None, "text": None},)
    assert_close(ad.vmap(ad.grad(total), in_dims)(batch)["x"], torch.stack([3 * X**2, 12 * X**2]))


@pytest.mark.parametrize("wrapped", [False, True], ids=["ground", "vmap"])
@pytest.mark.parametrize("transform", [ad.grad, ad.jacrev, ad.jacfwd, ad.hessian], ids=lambda f: f.__name__)
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_dropout_masks_repeat(transform: Any, wrapped: bool, randomness: Any) -> None:
    """The derivative belongs to the mask of the value, and random numbers go on as after one run."""
    x = torch.linspace(1, 2, 40, dtype=torch.float64)

    def dropped(checkpointed: bool) -> Any:
        layer = lambda x: functional.dropout(x, 0.5) ** 2
        func = lambda x: (ad.checkpoint(layer) if checkpointed else layer)(x).sum()
        torch.manual_seed(0)
        transformed = transform(func)
        transformed = ad.vmap(transformed, randomness=randomness) if wrapped else transformed
        return transformed(torch.stack([x, 2 * x]) if wrapped else x), torch.rand(())

    result, after = dropped(checkpointed=True)
    expected, once = dropped(checkpointed=False)
    assert_close(result, expected)
    if not wrapped or transform is not ad.jacfwd:
        assert_close(after, once)


def test_function_runs_twice_and_only_for_a_derivative() -> None:
    ran = []
    func = ad.checkpoint(lambda x: (ran.append(1), cubic(x))[1])
    func(X)
    assert len(ran) == 1
    for call in (lambda: ad.grad(func)(X), lambda: ad.vmap(ad.grad(func))(X[None])):
        ran.clear()
        call()
        assert len(ran) == 2


def test_gradient_of_a_deep_network_in_segments_takes_less_memory() -> None:
    """32 layers, 4 segments: at most 0.45 x, eagerly and inside vmap."""
    torch.manual_seed(0)
    layers = [nn.Linear(64, 64) for _ in range(32)]
    params = [(layer.weight.detach(), layer.bias.detach()) for layer in layers]
    x = torch.randn(512, 64)

    def segment(params: Any, x: Tensor) -> Tensor:
        for weight, bias in params:
            x = torch.tanh(functional.linear(x, weight, bias))
        return x

    def loss(x: Tensor, run: Any) -> Tensor:
        for start in range(0, 32, 8):
            x = run(params[start : start + 8], x)
        return (x**2).sum()

    peaks = {}
    for place, transform in {
        "ground": ad.grad,
        "vmap": lambda f: ad.vmap(ad.grad(f), in_dims=(0, None)),
    }.items():
        for name, run in {"plain": segment, "checkpointed": ad.checkpoint(segment)}.items():
            point = x if place == "ground" else x[None]
            with Meter(torch.device("cpu")) as meter:
                transform(loss)(point, run)
            peaks[place, name] = meter.peak
        assert peaks[place, "checkpointed"] <= 0.45 * peaks[place, "plain"]


def test_nested_checkpoints() -> None:
    func = ad.checkpoint(lambda x: ad.checkpoint(lambda x: W * x**3)(x) * x)
    total = lambda x: func(x).sum()
    assert_close(ad.grad(total)(X), 4 * W * X**3)
    assert_close(ad.vmap(ad.hessian(total))(X[None])[0], torch.diag(12 * W * X**2))


@pytest.mark.parametrize("every", EVERY, ids=lambda every: every.name)
@pytest.mark.parametrize("depth", [2, 3])
def test_nested_checkpoints_that_capture_the_same_tensor(every: Every, depth: int) -> None:
    """A replaced tensor is replaced for the functions inside too, whose own second run comes after."""

    def captures(x: Tensor) -> Tensor:
        func = lambda y: x ** (4 - depth) * y
        for _ in range(depth - 1):
            inner = ad.checkpoint(func)
            func = lambda y, inner=inner: inner(y) * x
        return ad.checkpoint(func)(W).sum()

    assert_close(every.apply(captures, X), every.expected(X, W))


# w x^3 in ways that go differently inside other transforms and outside, and save tensors of one shape in both.
INSIDE: dict[str, Any] = {
    "checkpoint": ad.checkpoint(lambda x: W * x**3),
    "checkpoint in a checkpoint": ad.checkpoint(lambda x: ad.checkpoint(lambda x: W * x**2)(x) * x),
    "grad": ad.grad(lambda x: (W * x**4).sum() / 4),
    "jvp": lambda x: ad.jvp(lambda s: s**2 * W * x**3, (X**0,), (X**0 / 2,))[1],
    # By a formula on a level, by torch's own operation outside.
    "jvp of batch_norm": lambda x: ad.jvp(
        lambda s: functional.batch_norm((s * W * x**3)[None], 0 * X, X**0 - 1e-5)[0], (X**0,), (X**0,)
    )[1],
    # In forward mode alone by its pullback.
    "scatter_reduce": lambda x: torch.zeros_like(x).scatter_reduce(
        0, torch.arange(6) // 2, torch.stack([W * x, x**2], 1).flatten(), "prod", include_self=False
    ),
    "vmap": lambda x: ad.vmap(lambda x, w: w * ad.checkpoint(torch.square)(x) * x)(x, W),
}


def _autograds_pull(func: Any) -> Any:
    x = X.clone().requires_grad_()
    return partial(torch.autograd.grad, func(x), x)


def _by_torchs_level(pull: Any) -> Tensor:
    with forward_ad.dual_level():
        (pulled,) = pull(forward_ad.make_dual(X, T))
        return forward_ad.unpack_dual(pulled).tangent


# The slope of f is a diagonal matrix, and so linear in what is pulled.
PULLS: dict[str, Any] = {
    "jacrev": lambda f: ad.jacrev(f)(X) @ T,
    "hessian": lambda f: ad.hessian(lambda x: (f(x) * x).sum() / 8)(X) @ T,
    "vmap": lambda f: ad.vmap(ad.vjp(f, X)[1])(torch.stack([X, T]))[0][1],
    "torch.func.vmap": lambda f: torch.func.vmap(ad.vjp(f, X)[1])(torch.stack([X, T]))[0][1],
    "jvp": lambda f: ad.jvp(ad.vjp(f, X)[1], (X,), (T,))[1][0],
    "jacfwd": lambda f: ad.jacfwd(ad.vjp(f, X)[1])(X)[0] @ T,
    "torch.func.jvp": lambda f: torch.func.jvp(ad.vjp(f, X)[1], (X,), (T,))[1][0],
    "forward_ad": lambda f: _by_torchs_level(ad.vjp(f, X)[1]),
    "forward_ad around autograd": lambda f: _by_torchs_level(_autograds_pull(f)),
    "is_grads_batched": lambda f: _autograds_pull(f)(torch.diag(T), is_grads_batched=True)[0].sum(0),
}


@pytest.mark.parametrize("pulled", PULLS.values(), ids=PULLS)
@pytest.mark.parametrize("inside", INSIDE.values(), ids=INSIDE)
def test_second_run_inside_a_transform_goes_the_way_of_the_first(inside: Any, pulled: Any) -> None:
    """torch finds saved tensors by their place in the second run: another way gives wrong numbers without a word."""
    func = ad.checkpoint(lambda x: inside(x) ** 2 * x)  # w^2 x^7
    assert_close(pulled(func), 7 * W**2 * X**6 * T)


@pytest.mark.parametrize("captured", [False, True])
def test_writing_in_place_is_an_error_inside_other_transforms(captured: bool) -> None:
    """The second run would start from what the first one wrote."""

    def func(x: Tensor) -> Tensor:
        y = x * 1
        return (ad.checkpoint(lambda z: (y if captured else z).mul_(2))(y) * y).sum()

    batched = ad.vmap(ad.grad(func)), ad.vmap(ad.jacfwd(func))
    for transform in (ad.jacfwd(func), torch.func.grad(func), *batched):
        with pytest.raises(InPlaceError, match="write to a clone"):
            transform(X[None] if transform in batched else X)


def test_custom_rules_inside() -> None:
    squared = ad.custom_vjp(lambda x: x**2)
    squared.defvjp(lambda x: (x**2, x), lambda x, c: (5 * 2 * x * c,))
    func = ad.checkpoint(lambda x: squared(x).sum())
    assert_close(ad.grad(func)(X), 10 * X)
    assert_close(ad.vmap(ad.grad(func))(X[None])[0], 10 * X)
    assert_close(ad.hessian(func)(X), 10 * torch.eye(3, dtype=torch.float64))


def test_a_captured_tensor_in_a_transform_inside_is_an_error() -> None:
    """What cannot be replaced is refused; as an argument it works."""
    inner = ad.grad(lambda v: (v**3).sum())

    def captured(w: Tensor) -> Tensor:
        return ad.checkpoint(lambda x: x * ad.vmap(lambda v: v**2)(w))(X).sum()

    def passed(w: Tensor) -> Tensor:
        return ad.checkpoint(lambda x, w: (x * inner(w)).sum())(X, w)

    assert_close(ad.vmap(ad.grad(passed))(W[None])[0], 6 * X * W)
    for func in (captured, lambda w: ad.checkpoint(lambda x: (x * inner(w)).sum())(X)):
        with pytest.raises(CaptureError, match="pass the tensor to the checkpointed function"):
            ad.vmap(ad.grad(func))(W[None])


@pytest.mark.parametrize("when", [1, 2])
@pytest.mark.parametrize("wrapped", [False, True])
def test_an_exception_in_either_run_comes_out(when: int, wrapped: bool) -> None:
    class StopError(Exception):
        pass

    ran = []

    def func(x: Tensor) -> Tensor:
        ran.append(1)
        if len(ran) == when:
            raise StopError
        return (x**2).sum()

    transform = ad.vmap(ad.grad(ad.checkpoint(func))) if wrapped else ad.grad(ad.checkpoint(func))
    with pytest.raises(StopError):
        transform(X[None] if wrapped else X)
    assert_close(ad.grad(lambda x: segment(x).sum())(X), 3 * W * X**2)


def test_a_question_for_requires_grad_has_the_answer_of_the_caller() -> None:
    """Both runs take the branch that the function takes by itself."""
    asked: list[bool] = []

    def of_w(w: Tensor) -> Tensor:
        def func(x: Tensor) -> Tensor:
            asked.append(w.requires_grad)
            return (w * x**3).sum() if w.requires_grad else x.sum()

        return ad.checkpoint(func)(X)

    assert_close(ad.vmap(ad.grad(of_w))(W[None])[0], X**3)
    assert asked == [True, True]


def test_only_what_is_differentiated_gets_a_cotangent() -> None:
    # Under vmap a cotangent of shared weights would be one for every sample.
    weights, x = torch.randn(64, 64, dtype=T.dtype) / 8, torch.randn(512, 64, dtype=T.dtype)

    def layer(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (w @ x).tanh()

    def loss(call: Any, w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return call(w, x).sum()

    gradients = {
        call: ad.vmap(ad.grad(partial(loss, call), argnums="x"), (None, 0))
        for call in (layer, ad.checkpoint(layer))
    }
    plain, kept = gradients.values()
    with Meter(torch.device("cpu")) as of_plain:
        expected = plain(weights, x)
    with Meter(torch.device("cpu")) as of_kept:
        assert_close(kept(weights, x), expected)
    assert of_kept.peak < 4 * of_plain.peak


# Layers whose kernels depend on whether a transform is active, and torch's own checkpoint beside ours.


def torchs(func: Any) -> Any:
    return lambda *args: torch_checkpoint(func, *args, use_reentrant=False)


def seeded(make: Any) -> Any:
    torch.manual_seed(3)
    return make().double()


RECURRENT = seeded(lambda: nn.GRU(3, 3, batch_first=True))
TABLE = torch.tensor([[1.0, 2.0, 0.5], [-1.0, 3.0, 1.0], [2.0, 0.0, -1.5]], dtype=torch.float64)
DOUBLED = ad.custom_jvp(lambda x: 2 * x.sin())
DOUBLED.defjvp(lambda p, t: (2 * p[0].sin(), 2 * p[0].cos() * t[0]))
# A function, and the shape of what it takes.
LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear of one sample": (seeded(lambda: nn.Linear(3, 3)), (3,)),
    "linear without bias": (seeded(lambda: nn.Linear(3, 3, bias=False)), (2, 3)),
    "linear of a sequence": (seeded(lambda: nn.Linear(3, 2)), (2, 2, 3)),
    "mlp": (seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.SiLU())), (3,)),
    "layer_norm": (seeded(lambda: nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.GELU())), (2, 3)),
    "group_norm": (seeded(lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.Tanh())), (3, 4)),
    "conv": (seeded(lambda: nn.Sequential(nn.Conv1d(2, 2, 2), nn.Tanh())), (2, 3)),
    "conv of a batch": (seeded(lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh())), (1, 1, 2, 3)),
    "dropout": (seeded(lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Tanh())), (2, 3)),
    "recurrent": (lambda x: RECURRENT(x)[0], (1, 2, 3)),
    "solve": (lambda x: torch.linalg.solve(TABLE + torch.diag(x), x.sin()), (3,)),
    "einsum": (lambda x: torch.einsum("ij,bj->bi", TABLE, x).sin(), (2, 3)),
    "in place": (lambda x: functional.relu((x @ TABLE).mul_(2), inplace=True).sin(), (2, 3)),
    "custom rule": (lambda x: DOUBLED(functional.linear(x, TABLE)), (3,)),
}
ATTENTION = seeded(lambda: nn.TransformerEncoderLayer(4, 2, 4, dropout=0.0, batch_first=True)), (1, 2, 4)

squares = lambda f: lambda x: (f(x) ** 2).sum()
weights = lambda x: torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view(x.shape)
pairs = lambda x: torch.stack([x, x.cos()])
OUTER: dict[str, Any] = {
    "jacrev": lambda f, x: ad.jacrev(f)(x),
    "jacrev by two": lambda f, x: ad.jacrev(f, chunk_size=2)(x),
    "jacrev, learnt": lambda f, x: ad.jacrev(f, chunk_size="auto")(x),
    "hessian": lambda f, x: ad.hessian(squares(f))(x),
    "hessian, tracked": lambda f, x: ad.hessian(squares(f))(x.clone().requires_grad_()),
    "diagonal": lambda f, x: ad.hessian_diagonal(squares(f))(x),
    "functional.jacobian": ad.functional.jacobian,
    "functional.jacobian, vectorized": lambda f, x: ad.functional.jacobian(f, x, vectorize=True),
    "functional.hessian": lambda f, x: ad.functional.hessian(squares(f), x),
    "functional.hvp": lambda f, x: ad.functional.hvp(squares(f), x, weights(x)),
    "linearize": lambda f, x: ad.linearize(f, x)[1](weights(x)),
    "gradient of jacrev": lambda f, x: ad.grad(lambda x: ad.jacrev(f)(x).square().sum())(x),
    "gradient of a gradient": lambda f, x: ad.grad(lambda x: (ad.grad(squares(f))(x) * weights(x)).sum())(x),
}
ONLY_OURS: dict[str, Any] = {
    "jvp": lambda f, x: ad.jvp(f, (x,), (weights(x),))[1],
    "reverse over forward": lambda f, x: ad.hessian(squares(f), mode="reverse-over-forward")(x),
    "forward over reverse": lambda f, x: ad.hessian(squares(f), mode="forward-over-reverse")(x),
    "vmap of grad": lambda f, x: ad.vmap(ad.grad(squares(f)), randomness="same")(pairs(x)),
    "vmap of hessian": lambda f, x: ad.vmap(ad.hessian(squares(f)), randomness="same")(pairs(x)),
    "jacrev of vmap": lambda f, x: ad.jacrev(ad.vmap(f, randomness="same"))(pairs(x)),
}
HOW_OFTEN: dict[str, Any] = {
    "once": lambda kind, f: kind(f),
    "nested": lambda kind, f: kind(lambda x: kind(f)(x.sin()).exp()),
}


@pytest.mark.parametrize("how_often", HOW_OFTEN.values(), ids=HOW_OFTEN)
@pytest.mark.parametrize(
    ("layer", "kind", "outer"),
    [
        pytest.param(layer, kind, outer, id=f"{shown}-{name}-{place}")
        for shown, layer in LAYERS.items()
        for name, kind, outers in (("ours", ad.checkpoint, OUTER | ONLY_OURS), ("torch's", torchs, OUTER))
        for place, outer in outers.items()
        if not (shown == "recurrent" and "vmap" in place)  # torch batches no recurrent layer
    ],
)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_layers_as_without_a_checkpoint(layer: Any, kind: Any, outer: Any, how_often: Any) -> None:
    func, shape = layer
    x = torch.sin(torch.arange(1.0, 1 + math.prod(shape), dtype=torch.float64)).view(shape)
    results = []
    for one in (lambda f: f, kind):
        torch.manual_seed(0)
        results.append(outer(how_often(one, func), x))
    assert_close(*results)


@pytest.mark.parametrize("kind", [ad.checkpoint, torchs], ids=["ours", "torch's"])
@pytest.mark.parametrize("name", ["jacrev", "hessian", "functional.jacobian", "functional.hessian"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_attention_as_without_a_checkpoint(kind: Any, name: str) -> None:
    layer, shape = ATTENTION
    x = torch.linspace(-1, 2, 8, dtype=torch.float64).view(shape)
    assert_close(OUTER[name](kind(layer), x), OUTER[name](layer, x))


def test_an_operation_that_writes_to_what_it_has_saved() -> None:
    """rrelu saves its noise and then draws it: a second run that stops at the last saved tensor is too short."""
    run = lambda x: functional.rrelu(x, training=True)
    gradients = []
    for func in (run, ad.checkpoint(run)):
        torch.manual_seed(0)
        gradients.append(ad.grad(lambda x, func=func: func(x).sum())(-X.abs()))
    assert_close(*gradients)
    assert ((gradients[0] > 1 / 8) & (gradients[0] < 1 / 3)).all()


# Transforms in a checkpointed function, which run again with it.

QUARTIC = lambda x: (W * x**4).sum()
ONE = torch.ones((), dtype=torch.float64)
# The sum of some derivative of w x^4, in place of x -> sum w x^4.
HELD: dict[str, Any] = {
    "hessian": lambda x: ad.hessian(QUARTIC)(x).sum(),
    "forward over reverse": lambda x: ad.hessian(QUARTIC, mode="forward-over-reverse")(x).sum(),
    "jacrev": lambda x: ad.jacrev(lambda x: W * x**4)(x).sum(),
    "jacfwd": lambda x: ad.jacfwd(lambda x: W * x**4)(x).sum(),
    "jvp": lambda x: ad.jvp(QUARTIC, (x,), (x,))[1],
    "linearize": lambda x: ad.linearize(QUARTIC, x)[1](x),
    "hvp": lambda x: ad.hvp(QUARTIC, (x,), (x,))[1].sum(),
    "per sample": lambda x: ad.vmap(ad.grad(lambda x, w: w * x**4))(x, W).sum(),
    "hessian per sample": lambda x: ad.vmap(ad.hessian(lambda x, w: w * x**4))(x, W).sum(),
    "diagonal": lambda x: ad.hessian_diagonal(QUARTIC)(x).sum(),
    "functional.hessian": lambda x: ad.functional.hessian(QUARTIC, x, create_graph=True).sum(),
    "functional.jacobian": lambda x: ad.functional.jacobian(
        lambda x: W * x**4, x, create_graph=True, vectorize=False
    ).sum(),
    "functional.jvp": lambda x: ad.functional.jvp(QUARTIC, x, x, create_graph=True)[1],
    "by a captured tensor": lambda x: ad.hessian(lambda s: (W * x**4 * s**2).sum())(ONE),
    "jacrev by a captured tensor": lambda x: ad.jacrev(lambda s: W * x**4 * s)(ONE).sum(),
}
FACTORS = {
    "hessian": (12, 2),
    "forward over reverse": (12, 2),
    "hessian per sample": (12, 2),
    "diagonal": (12, 2),
}
FACTORS |= {"functional.hessian": (12, 2), "jvp": (4, 4), "linearize": (4, 4), "functional.jvp": (4, 4)}
FACTORS |= {"hvp": (12, 3), "by a captured tensor": (2, 4), "jacrev by a captured tensor": (1, 4)}
AROUND: dict[str, Any] = {
    "grad": lambda f: ad.grad(f)(X),
    "plain autograd": lambda f: torch.autograd.grad(f(x := X.clone().requires_grad_()), x)[0],
    "jacrev": lambda f: ad.jacrev(lambda x: f(x)[None])(X)[0],
    "functional.jacobian": lambda f: ad.functional.jacobian(f, X),
    "hessian": lambda f: ad.hessian(f)(X) @ X,
    "jvp": lambda f: torch.stack([ad.jvp(f, (X,), (e,))[1] for e in torch.eye(3, dtype=X.dtype)]),
    "vmap of grad": lambda f: ad.vmap(ad.grad(f))(X[None])[0],
}


@pytest.mark.parametrize(
    ("kind", "around"),
    [
        pytest.param(kind, around, id=f"{name}-{around}")
        for name, kind in (("ours", ad.checkpoint), ("torch's", torchs))
        for around in AROUND
        if kind is ad.checkpoint or around not in ("vmap of grad", "jvp")  # torch's is not for these
    ],
)
@pytest.mark.parametrize("held", HELD)
def test_transforms_in_a_checkpointed_function(held: str, kind: Any, around: str) -> None:
    factor, power = FACTORS.get(held, (4, 3))
    slope = factor * power * W * X ** (power - 1)
    expected = (power - 1) * slope if around == "hessian" else slope
    assert_close(AROUND[around](kind(HELD[held])), expected)
    if around not in ("jvp", "vmap of grad"):
        # Captured, and not handed on.
        scaled = lambda x: kind(lambda s: HELD[held](x) * s)(ONE)
        assert_close(AROUND[around](scaled), expected)


@pytest.mark.parametrize("chunk_size", [None, 1, "auto"])
def test_what_measures_memory_is_not_taken_for_captured(chunk_size: Any) -> None:
    """The first chunk is measured by a mode that looks at every tensor, those of inner levels as well."""
    func = ad.checkpoint(lambda x: ad.vmap(ad.grad(lambda x, w: w * x**3))(x, W) * x)
    hessian = ad.jacfwd(lambda x: ad.jacrev(func)(x).sum(0), chunk_size=chunk_size)(X)
    assert_close(hessian, torch.diag(18 * W * X))
