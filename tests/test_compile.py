"""torch.compile over the transforms: one graph, right numbers, compiled once, and nothing left behind."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as functional_nn
from torch.nn.functional import mse_loss, scaled_dot_product_attention
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_structure

import autodiff as ad
from autodiff import _torch, functional
from every_transform import FIRST, SECOND, Every, T, W, cubic
from scenarios import assert_close
from table.row import has_torch

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [
    pytest.mark.skipif(
        torch.torch_version.TorchVersion(torch.__version__) < (2, 13),
        reason="older tracers do not know what the transforms are made of",
    ),
    # What torch warns of while it traces is its own business.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
X = torch.tensor([0.5, -0.75, 1.25])
BATCH = torch.stack([X, X.sin(), 2 * X, X.cos()])
inductor = pytest.param(
    "inductor",
    marks=pytest.mark.skipif(
        not any(map(shutil.which, ("g++", "clang++", "c++"))),
        reason="inductor compiles C++, and no compiler is here",
    ),
)


@pytest.fixture(autouse=True)
def fresh_tracer() -> Any:
    torch.compiler.reset()
    with torch._inductor.config.patch(fx_graph_cache=False):
        yield
    torch.compiler.reset()


def copied(tree: Any) -> Any:
    """The same arguments in other tensors."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), tree)


def assert_compiles_once(func: Callable[..., Any], arguments: Any, expected: Any, backend: str) -> None:
    """One graph, the expected numbers, and none compiled for a second call with other tensors of the same shapes."""
    compiled = torch.compile(func, backend=backend, fullgraph=True)
    first = compiled(*copied(arguments))
    with torch.compiler.set_stance("fail_on_recompile"):
        second = compiled(*copied(arguments))
    leaves, spec = tree_flatten(expected)
    for result in (first, second):
        assert tree_structure(result) == spec
        assert_close(tree_leaves(result), leaves, loose=True)


# Each transform, and vmap of it, against closed forms in float64.

TRANSFORMS = {
    every.name: every
    for every in [
        *FIRST,
        *SECOND,
        Every("jacfwd-2", lambda f, x: ad.jacfwd(f, chunk_size=2)(x), FIRST[0].expected),
    ]
}
BY_INDUCTOR = (
    *("grad", "value_and_grad", "grad_and_value", "vjp", "jvp", "linearize"),
    *("jacrev", "jacfwd", "jacobian", "hessian", "hvp"),
)
over_transforms = pytest.mark.parametrize(
    ("name", "backend"),
    [(name, "aot_eager") for name in TRANSFORMS]
    + [pytest.param(name, *inductor.values, marks=inductor.marks) for name in BY_INDUCTOR],
)


@over_transforms
def test_transform_compiles_to_its_closed_form(name: str, backend: str) -> None:
    every = TRANSFORMS[name]
    assert_compiles_once(lambda x: every.apply(cubic, x), (T,), every.expected(T, W), backend)


@over_transforms
def test_vmap_of_transform_compiles_to_its_closed_form(name: str, backend: str) -> None:
    every, batch = TRANSFORMS[name], torch.stack([T, 1.5 * T])
    expected = torch.stack([every.expected(sample, W) for sample in batch])
    assert_compiles_once(ad.vmap(lambda x: every.apply(cubic, x)), (batch,), expected, backend)


# What people write with them, against eager mode.


@ad.pytree.register_dataclass
@dataclass
class Line:
    w: Tensor
    b: Tensor
    power: int = 2


PARAMS = {"w": torch.tensor([0.3, -0.2, 0.9]), "b": torch.tensor(0.1), "power": 2}
LINE = Line(PARAMS["w"], PARAMS["b"])
NORM, LINEAR = nn.BatchNorm1d(3), nn.Linear(3, 2)
WEIGHTS = {"weight": torch.stack([X, X.cos()])}
with torch.random.fork_rng():
    torch.manual_seed(0)
    NETWORK = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
STATE = {name: param.detach() for name, param in NETWORK.named_parameters()}


def scalar(x: Tensor) -> Tensor:
    return (x.sin() * x.flip(0)).sum()


def vector(x: Tensor) -> Tensor:
    return x.exp() * x.roll(1)


def loss(params: dict[str, Any], x: Tensor, y: Tensor) -> Tensor:
    return ((params["w"] * x).sum().tanh() + params["b"] - y) ** params["power"]


def of_line(line: Line, x: Tensor, y: Tensor) -> Tensor:
    return loss(vars(line), x, y)


def with_aux(x: Tensor) -> tuple[Tensor, Any]:
    return scalar(x), {"doubled": 2 * x, "name": "any", "count": 3, "nothing": None}


def of_norm(params: dict[str, Any], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    output, buffers = ad.functional_call(NORM, params, (x,), return_buffers=True)
    return output.square().sum(), buffers


def of_linear(params: dict[str, Any], x: Tensor) -> Tensor:
    return ad.functional_call(LINEAR, params, (x,)).exp().sum()


def residual(state: dict[str, Tensor], points: Tensor) -> Tensor:
    """How far a network is from a solution of a Poisson equation."""

    def network(x: Tensor) -> Tensor:
        return ad.functional_call(NETWORK, state, (x,)).squeeze()

    curvatures = ad.vmap(ad.hessian(network))(points)
    return (curvatures.diagonal(dim1=1, dim2=2).sum(1) - points.sum(1)).square().mean()


def step(state: dict[str, Tensor], points: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    value, slope = ad.value_and_grad(residual)(state, points)
    return {name: param - 0.1 * slope[name] for name, param in state.items()}, value


def through(operation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: operation(x).pow(3).sum()


def attending(x: Tensor) -> Tensor:
    return scaled_dot_product_attention(x, x.sin(), x.cos()).pow(3).sum()


def legacy(name: str, func: Callable[..., Tensor], *v: Tensor, **options: Any) -> tuple[Any, Any]:
    return lambda x: getattr(functional, name)(func, x, *v, **options), (X,)


CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "grad of a tree": (ad.grad(loss), (PARAMS, X, X[0])),
    "grad by names": (lambda p, x, y: ad.grad(loss, ("params", "x"))(p, x=x, y=y), (PARAMS, X, X[0])),
    "grad with aux": (ad.grad(with_aux, has_aux=True), (X,)),
    "jvp with aux": (lambda x: ad.jvp(with_aux, (x,), (x,), has_aux=True), (X,)),
    "jacfwd with aux": (ad.jacfwd(with_aux, has_aux=True), (X,)),
    "jvp of the gradient of mse_loss": (
        lambda x: ad.jvp(ad.grad(lambda x: mse_loss(x, x.cos())), (x,), (x,))[1],
        (X,),
    ),
    "vmap of hessian of logdet": (
        ad.vmap(ad.hessian(torch.logdet, mode="forward-over-reverse")),
        (torch.diag_embed(BATCH.exp()) + 0.1,),
    ),
    "hessian of attention": (ad.hessian(attending), (BATCH.expand(1, 1, 4, 3),)),
    "jacfwd of attention": (ad.jacfwd(attending), (BATCH.expand(1, 1, 4, 3),)),
    "grad of grad of attention": (
        ad.grad(lambda x: ad.grad(attending)(x).sin().sum()),
        (BATCH.expand(1, 1, 4, 3),),
    ),
    "mixed Hessian of layer_norm": (
        ad.hessian(through(lambda x: functional_nn.layer_norm(x, (3,))), mode="reverse-over-forward"),
        (BATCH,),
    ),
    "vmap of hessian of batch_norm": (
        ad.vmap(ad.hessian(through(lambda x: functional_nn.batch_norm(x, None, None, training=True)))),
        (torch.stack([BATCH, BATCH.exp()]),),
    ),
    "vmap of jacfwd of instance_norm": (
        ad.vmap(ad.jacfwd(through(functional_nn.instance_norm))),
        (BATCH.expand(2, 2, 4, 3) * X,),
    ),
    "forward over reverse of logcumsumexp": (
        ad.hessian(through(lambda x: x.logcumsumexp(0)), mode="forward-over-reverse"),
        (BATCH,),
    ),
    "jacfwd of cdist": (ad.jacfwd(through(lambda x: torch.cdist(x, x.exp()))), (BATCH,)),
    "third derivative": (ad.vmap(ad.grad(ad.grad(ad.grad(lambda x: x.sin() * x**3)))), (X,)),
    "holomorphic": (ad.jacfwd(lambda z: z**3, holomorphic=True), (torch.complex(X, X.cos()),)),
    "hessian_eigenvalues, restricted": (
        ad.hessian_eigenvalues(loss, 1, iterations=2),
        ({"w": torch.linspace(-1, 1, 20), "b": X[1], "power": 2}, torch.linspace(0, 2, 20), X[0]),
    ),
    "vmap": (ad.vmap(vector, out_dims=1), (BATCH,)),
    "vmap in chunks": (ad.vmap(ad.hessian(scalar), chunk_size=3), (BATCH,)),
    "vmap in chunks of a learnt size": (ad.vmap(ad.hessian(scalar), chunk_size="auto"), (BATCH,)),
    "vmap with a fallback": (ad.vmap(scalar, fallback="loop"), (BATCH,)),
    "vmap of vmap": (ad.vmap(ad.vmap(ad.hessian(scalar))), (torch.stack([BATCH, BATCH.exp()]),)),
    "per-sample gradients": (ad.vmap(ad.grad(loss), (None, 0, 0)), (PARAMS, BATCH, BATCH[:, 0])),
    "per-sample Hessians": (ad.vmap(ad.hessian(loss), (None, 0, 0)), (PARAMS, BATCH, BATCH[:, 0])),
    "per-sample Hessians of a dataclass": (
        ad.vmap(ad.hessian(of_line), (None, 0, 0)),
        (LINE, BATCH, BATCH[:, 0]),
    ),
    "functional_call": (ad.vmap(ad.hessian(of_linear), (None, 0)), (WEIGHTS, BATCH)),
    "buffers": (ad.grad(of_norm, has_aux=True), ({"weight": X}, BATCH)),
    "buffers of samples": (
        ad.vmap(ad.grad(of_norm, has_aux=True), (None, 0)),
        ({"weight": X}, torch.stack([BATCH, BATCH.exp()])),
    ),
    "checkpoint": (ad.grad(ad.checkpoint(scalar)), (X,)),
    "training step through Hessians": (step, (STATE, BATCH)),
    "functional.vjp": legacy("vjp", vector, X),
    "functional.jvp": legacy("jvp", vector, X),
    "functional.vhp": legacy("vhp", scalar, X),
    "functional.hvp": legacy("hvp", scalar, X),
    "functional.jacobian": legacy("jacobian", vector),
    "functional.jacobian, forward": legacy("jacobian", vector, strategy="forward-mode"),
    "functional.hessian": legacy("hessian", scalar),
    "functional.hessian, forward": legacy("hessian", scalar, outer_jacobian_strategy="forward-mode"),
    "functional.vhp, strict": legacy("vhp", scalar, X, strict=True),
}
CASES_BY_INDUCTOR = (
    *("per-sample Hessians", "per-sample Hessians of a dataclass", "training step through Hessians"),
    *("functional.hessian", "functional.vhp"),
)


@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, backend) for name in CASES for backend in ("eager", "aot_eager")]
    + [pytest.param(name, *inductor.values, marks=inductor.marks) for name in CASES_BY_INDUCTOR],
)
def test_one_graph_gives_eagers_numbers(name: str, backend: str) -> None:
    func, arguments = CASES[name]
    assert_compiles_once(func, arguments, func(*arguments), backend)


def test_result_is_differentiated_by_what_is_outside() -> None:
    state = {name: param.clone().requires_grad_() for name, param in STATE.items()}
    value = torch.compile(residual, backend="aot_eager", fullgraph=True)(state, BATCH)
    value.backward()
    # No second derivative depends on the last bias.
    slopes = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in state.items()}
    assert_close(slopes, ad.grad(residual)(STATE, BATCH), loose=True)


@pytest.mark.parametrize("dynamic", [True, None])
def test_other_batch_sizes_recompile_at_most_once(dynamic: bool | None) -> None:
    compiled = torch.compile(
        ad.vmap(ad.hessian(scalar)), backend="aot_eager", fullgraph=True, dynamic=dynamic
    )
    batch = torch.cat([BATCH, BATCH + 1])
    for size in (3, 4) if dynamic is None else (4,):
        compiled(batch[:size].clone())
    with torch.compiler.set_stance("fail_on_recompile"):
        for size in (5, 8):
            assert_close(
                compiled(batch[:size].clone()), ad.vmap(ad.hessian(scalar))(batch[:size]), loose=True
            )


# Operators, made inside of what is compiled and outside of it.


def wave(params: dict[str, Any]) -> Tensor:
    return (params["w"].sin() * params["b"]).sum()


def waves(params: dict[str, Any]) -> dict[str, Tensor]:
    return {"y": params["w"] * params["b"], "z": params["w"][:2].sum()}


WAVE = {"w": X.double(), "b": torch.tensor(0.5, dtype=torch.float64)}
VECTOR = torch.tensor([1.0, -2.0, 0.25, 3.0], dtype=torch.float64)
TREE = {"w": VECTOR[:3], "b": VECTOR[3]}
FACTOR = torch.tensor(-0.5, dtype=torch.float64)


def curvature_of_wave(w: Tensor, b: Tensor) -> Tensor:
    """The Hessian of b sum sin w, in its four numbers."""
    mixed = w.cos()
    return torch.cat(
        [torch.cat([-b * w.sin().diag(), mixed[:, None]], 1), torch.cat([mixed, b.new_zeros(1)])[None]]
    )


def slope_of_waves(w: Tensor, b: Tensor) -> Tensor:
    """The Jacobian of (b w, w_0 + w_1), in its four numbers."""
    last = w.new_tensor([[1.0, 1.0, 0.0, 0.0]])
    return torch.cat([torch.cat([b * torch.eye(3, dtype=w.dtype), w[:, None]], 1), last])


H, J = curvature_of_wave(**WAVE), slope_of_waves(**WAVE)
MATRIX = torch.stack([VECTOR, VECTOR.sin()], 1)


def like_wave(vector: Tensor) -> dict[str, Tensor]:
    return {"w": vector[:3], "b": vector[3]}


# From an operator and the arguments to a result, and its closed form; both are given A = H, and A = J, which is square
# but not symmetric.
PRODUCTS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "vector": (lambda A, v, c: A @ v, lambda A, v, c: A @ v),
    "vector on the left": (lambda A, v, c: v @ A, lambda A, v, c: v @ A),
    "matrix": (lambda A, v, c: A @ torch.stack([v, v.sin()], 1), lambda A, v, c: A @ MATRIX),
    "matrix on the left": (lambda A, v, c: torch.stack([v, v.sin()]) @ A, lambda A, v, c: MATRIX.T @ A),
    "transpose": (lambda A, v, c: A.T @ v, lambda A, v, c: A.T @ v),
    "algebra": (
        lambda A, v, c: (c * A - A / 4 + A * c) @ v,
        lambda A, v, c: (c * A - A / 4 + A * c) @ v,
    ),
    "divided by a tensor": (lambda A, v, c: (A / c) @ v, lambda A, v, c: A / c @ v),
    "normal equations": (
        lambda A, v, c: (A.H @ A + 0.5) @ v,
        lambda A, v, c: A.T @ A @ v + 0.5 * v,
    ),
    "to_matrix": (lambda A, v, c: A.to_matrix(), lambda A, v, c: A),
    "matvec": (lambda A, v, c: A.H.matvec(v), lambda A, v, c: A.T @ v),
}
SQUARE_PRODUCTS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "tree": (lambda A, v, c: A @ like_wave(v), lambda A, v, c: like_wave(A @ v)),
    "tree on the left": (lambda A, v, c: like_wave(v) @ A, lambda A, v, c: like_wave(A @ v)),
    "damping by a tensor": (lambda A, v, c: (c + A - 2 * c) @ v, lambda A, v, c: A @ v - c * v),
    "subtracted from a tensor": (lambda A, v, c: (c - A) @ v, lambda A, v, c: c * v - A @ v),
    "block": (lambda A, v, c: A["w", "b"] @ v[3:], lambda A, v, c: A[:3, 3:] @ v[3:]),
    "diagonal": (lambda A, v, c: A.diagonal(), lambda A, v, c: like_wave(A.diagonal())),
}
OPERATORS: dict[str, tuple[Callable[..., Any], Tensor, dict[str, Any]]] = {
    "hessian": (ad.operators.hessian(wave), H, PRODUCTS | SQUARE_PRODUCTS),
    "jacobian": (ad.operators.jacobian(waves), J, PRODUCTS),
    "from_matrix": (
        lambda p: ad.operators.from_matrix(torch.cat([p["w"], p["b"][None]]).outer(VECTOR)),
        torch.cat([WAVE["w"], WAVE["b"][None]]).outer(VECTOR),
        PRODUCTS,
    ),
    "from_matvec": (
        lambda p: ad.operators.from_matvec(lambda v: v.flip(0) * p["b"], VECTOR),
        0.5 * torch.eye(4, dtype=torch.float64).flip(0),
        PRODUCTS,
    ),
}


def over_products(*cases: str) -> Any:
    """Each case is an operator and what is done with it; all by aot_eager, the marked ones by inductor as well."""
    parameters = []
    for case in cases:
        name, product = case.removesuffix(", inductor").split(": ")
        parameters.append(pytest.param(name, product, "aot_eager", id=f"{name}: {product}"))
        if case.endswith(", inductor"):
            parameters.append(
                pytest.param(
                    name, product, *inductor.values, marks=inductor.marks, id=f"{name}: {product}, inductor"
                )
            )
    return pytest.mark.parametrize(("name", "product", "backend"), parameters)


@over_products(
    *(f"hessian: {product}" for product in ("matrix", "matvec", *SQUARE_PRODUCTS)),
    *(
        f"jacobian: {product}"
        for product in ("vector, inductor", "vector on the left, inductor", "matrix on the left")
    ),
    *(
        f"jacobian: {product}"
        for product in ("transpose", "algebra", "divided by a tensor", "normal equations")
    ),
    "jacobian: to_matrix",
    "from_matrix: vector on the left",
    "from_matvec: vector on the left",
)
def test_product_with_operator_made_inside_compiles(name: str, product: str, backend: str) -> None:
    make, dense, table = OPERATORS[name]
    apply, expected = table[product]
    assert_compiles_once(
        lambda p, v, c: apply(make(p), v, c), (WAVE, VECTOR, FACTOR), expected(dense, VECTOR, FACTOR), backend
    )


@over_products(
    "hessian: tree",
    "hessian: damping by a tensor",
    "hessian: block",
    "jacobian: vector, inductor",
    "jacobian: vector on the left",
    "jacobian: normal equations",
    "from_matrix: matrix on the left",
    "from_matvec: vector on the left",
)
def test_product_with_operator_made_outside_compiles(name: str, product: str, backend: str) -> None:
    make, dense, table = OPERATORS[name]
    apply, expected = table[product]
    A = make(WAVE)
    assert_compiles_once(
        lambda v, c: apply(A, v, c), (VECTOR, FACTOR), expected(dense, VECTOR, FACTOR), backend
    )
    # What the tracer computed has not reached the operator.
    assert_close(apply(A, VECTOR, FACTOR), expected(dense, VECTOR, FACTOR), loose=True)


def test_operator_is_an_argument_of_what_is_compiled() -> None:
    A = ad.operators.jacobian(waves)(WAVE)
    compiled = torch.compile(lambda A, v: A @ v - v @ A, backend="aot_eager", fullgraph=True)
    assert_close(
        torch.cat([leaf.reshape(-1) for leaf in tree_leaves(compiled(A, VECTOR))]),
        J @ VECTOR - VECTOR @ J,
        loose=True,
    )


def test_derivative_of_a_product_with_an_operator_compiles() -> None:
    def slope(p: dict[str, Tensor]) -> Tensor:
        return (ad.operators.hessian(wave)(p) @ TREE)["b"]  # w . cos w, of which -w sin w is left

    expected = {"w": -VECTOR[:3] * WAVE["w"].sin(), "b": torch.zeros((), dtype=torch.float64)}
    assert_compiles_once(ad.grad(slope), (WAVE,), expected, "aot_eager")


# What cannot be traced.


def is_compiled_in_pieces(x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return cubic(x)


@pytest.mark.parametrize("every", [*FIRST, *SECOND], ids=lambda every: every.name)
def test_transform_of_what_breaks_the_graph_runs_uncompiled(every: Every) -> None:
    compiled = torch.compile(lambda x: every.apply(is_compiled_in_pieces, x), backend="aot_eager")
    for _ in range(2):
        assert_close(compiled(T), every.expected(T, W))


@ad.custom_vjp
def clipped(x: Tensor) -> Tensor:
    return x**3


clipped.defvjp(lambda x: (x**3, x), lambda x, c: (5 * x * c,))


@ad.custom_jvp
def pushed(x: Tensor) -> Tensor:
    return x**3


pushed.defjvp(lambda primals, tangents: (pushed(*primals), 5 * primals[0] * tangents[0]))

UNTRACED: dict[str, tuple[Callable[..., Any], Tensor, Tensor]] = {
    "custom_vjp": (ad.grad(lambda x: clipped(x).sum()), X, 5 * X),
    "custom_jvp": (ad.grad(lambda x: pushed(x).sum()), X, 5 * X),
    "custom_vjp in a batch": (ad.vmap(ad.grad(lambda x: clipped(x).sum())), BATCH, 5 * BATCH),
    "per_sample": (
        ad.per_sample(ad.grad(lambda x: (x**3).sum())),
        BATCH,
        3 * BATCH**2,
    ),
}


@pytest.mark.parametrize("name", UNTRACED)
def test_what_cannot_be_traced_says_so_and_runs_uncompiled(name: str) -> None:
    func, x, expected = UNTRACED[name]
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match=rf"{name.split(maxsplit=1)[0]}: torch\.compile traces"
    ):
        torch.compile(func, backend="eager", fullgraph=True)(x)
    assert_close(torch.compile(func, backend="eager")(x), expected)
    # The transform itself is none the worse for it.
    assert_compiles_once(ad.vmap(ad.grad(scalar)), (BATCH,), ad.vmap(ad.grad(scalar))(BATCH), "eager")


class SlopeOfCube(torch.autograd.Function):
    """A square whose backward is that of a cube."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * cotangent


@pytest.mark.parametrize("library", [ad, torch.func], ids=["autodiff", "torch.func"])
def test_torchs_tracer_does_not_see_a_backward(library: Any) -> None:
    """What docs/how_to/compile.md says; where this fails, torch has been mended."""
    slope = library.grad(lambda x: SlopeOfCube.apply(x) + 0 * x)
    curvature = library.grad(slope)
    x = X[0]
    assert (slope(x), curvature(x)) == (3 * x**2, 6 * x)
    compiled = [torch.compile(func, backend="aot_eager", fullgraph=True)(x) for func in (slope, curvature)]
    # From torch 2.15 on it calls backward, and takes what that gives for a constant.
    assert compiled == ([3 * x**2, 0] if has_torch("2.15") else [2 * x, 2])


def fails_in_the_function(x: Tensor) -> Tensor:
    raise ValueError(x.shape)


def fails_in_a_shape(x: Tensor) -> Tensor:
    return (x.sin() + torch.ones(7)).sum()


def failing_backend(graph: Any, inputs: Any) -> Any:
    raise ValueError(graph, inputs)


@pytest.mark.parametrize(
    "name", ["grad", "jvp", "linearize", "jacfwd", "hessian", "hvp-forward-over-reverse"]
)
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(
    ("func", "backend"),
    [
        (is_compiled_in_pieces, "inductor"),
        (fails_in_the_function, "aot_eager"),
        (fails_in_a_shape, "inductor"),
        (cubic, failing_backend),
    ],
)
def test_failed_compile_leaves_nothing_behind(name: str, batched: bool, func: Any, backend: Any) -> None:
    every = TRANSFORMS[name]
    derivative = ad.vmap(lambda x: every.apply(func, x)) if batched else lambda x: every.apply(func, x)
    with pytest.raises(Exception, match=r"."):
        torch.compile(derivative, backend=backend, fullgraph=True)(torch.stack([T, 2 * T]) if batched else T)
    assert _torch.is_eager()
    assert torch.is_grad_enabled()
    for after in ("jvp", "grad", "hessian"):
        assert_close(TRANSFORMS[after].apply(cubic, T), TRANSFORMS[after].expected(T, W))
