"""custom_vjp and custom_jvp: every transform goes by the rule, at every order, and what JAX allows is allowed."""

from __future__ import annotations

import functools
import itertools
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import autodiff as ad
from autodiff.errors import ArgnumsError, RuleError
from every_transform import EVERY, Every, T, W, X
from scenarios import assert_close

# A function whose rules say something else than its formula: derivatives of 5 sum w x^3 for the value sum w x^3.


def cubic_with_a_rule(kind: str, factor: float = 5.0) -> Any:
    """x -> w x^3, whose derivative is said to be ``factor`` times its own, in terms of differentiable operations."""
    if kind == "vjp":

        @ad.custom_vjp
        def cubed(x: Tensor) -> Tensor:
            return W * x**3

        cubed.defvjp(lambda x: (W * x**3, x), lambda x, c: (factor * 3 * W * x**2 * c,))
        return cubed

    @ad.custom_jvp
    def cubed(x: Tensor) -> Tensor:
        return W * x**3

    @cubed.defjvp
    def rule(primals: tuple[Tensor], tangents: tuple[Tensor]) -> tuple[Tensor, Tensor]:
        (x,), (t,) = primals, tangents
        return cubed(x), factor * 3 * W * x**2 * t

    return cubed


each_kind = pytest.mark.parametrize("kind", ["vjp", "jvp"])


@each_kind
@pytest.mark.parametrize("every", EVERY, ids=lambda every: every.name)
def test_every_transform_goes_by_the_rule(kind: str, every: Every) -> None:
    cubed = cubic_with_a_rule(kind)
    expected = every.expected(X, W) if every.name == "vmap" else every.expected(X, 5 * W)
    assert_close(every.apply(lambda x: cubed(x).sum(), X), expected)


ORDERS = {"grad": ad.grad, "jacfwd": ad.jacfwd, "jacrev": ad.jacrev, "torch grad": torch.func.grad}


@each_kind
@pytest.mark.parametrize("names", list(itertools.product(ORDERS, repeat=3)), ids="-".join)
def test_three_derivatives_in_any_order(kind: str, names: tuple[str, ...]) -> None:
    """The rule is a function like any other: third derivatives of 5 w x^3 are 30 w."""
    cubed = cubic_with_a_rule(kind)
    func: Any = lambda x: cubed(x).sum()
    for name in names:
        func = functools.partial(lambda x, inner: inner(x).sum(), inner=ORDERS[name](func))
    assert_close(func(X), 30 * W.sum())
    assert_close(ad.vmap(func)(torch.stack([X, 2 * X])), (30 * W.sum()).expand(2))


@each_kind
def test_plain_autograd_goes_by_the_rule(kind: str) -> None:
    cubed = cubic_with_a_rule(kind)
    x = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(cubed(x).sum(), x, create_graph=True)
    assert_close(slope, 15 * W * X**2)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    assert_close(curvature, 30 * W * X)
    assert not cubed(X).requires_grad


@each_kind
def test_plain_autograd_outside_of_vmap(kind: str) -> None:
    """A shared tensor's cotangents are summed over the batch."""
    cubed = cubic_with_a_rule(kind)
    x, scales = X.clone().requires_grad_(), torch.tensor([1.0, 2.0], dtype=torch.float64)
    ad.vmap(lambda s: (s * cubed(x)).sum())(scales).sum().backward()
    assert_close(x.grad, 3 * 15 * W * X**2)
    y = X.clone().requires_grad_()
    ad.vmap(lambda s: cubed(s * y).sum(), out_dims=0)(scales).sum().backward()
    assert_close(y.grad, 15 * W * X**2 * (1 + 8))


@each_kind
@pytest.mark.parametrize("chunk_size", [1, 2])
def test_in_batches_of_batches_with_moved_dims(kind: str, chunk_size: int) -> None:
    cubed = cubic_with_a_rule(kind)
    xs = torch.arange(24.0, dtype=torch.float64).view(3, 4, 2) / 10
    gradient = ad.vmap(
        ad.vmap(ad.grad(lambda x: cubed(x).sum()), in_dims=1, out_dims=1), in_dims=2, chunk_size=chunk_size
    )
    assert_close(gradient(xs), (15 * W[:, None, None] * xs**2).movedim(2, 0))


def test_value_and_sign_of_zero_are_the_functions_own() -> None:
    f = ad.custom_jvp(lambda x: x)
    f.defjvp(lambda primals, tangents: (primals[0], 2 * tangents[0]))
    value, slope = ad.value_and_grad(lambda x: f(x)[0])(torch.tensor([-0.0, 1.0]))
    assert torch.signbit(value)
    assert_close(slope, torch.tensor([2.0, 0.0]))
    assert f(torch.tensor([float("nan")]).requires_grad_()).isnan()


# Trees, static arguments, residuals, auxiliary outputs.


def scaled(kind: str) -> Any:
    """(tree, power, name) -> {"out": a ** power * b, "name": name, "none": None}; derivatives doubled."""

    def func(tree: dict[str, Any], power: int, name: str = "f") -> dict[str, Any]:
        return {"out": (tree["a"] ** power * tree["b"][0],), "name": name, "none": None}

    if kind == "vjp":
        f = ad.custom_vjp(func)

        def fwd(tree: Any, power: int, name: str) -> tuple[Any, Any]:
            return func(tree, power, name), {"tree": tree, "power": power}

        def bwd(residuals: Any, c: Any) -> tuple[Any, None, None]:
            assert c["name"] is None
            assert c["none"] is None
            (a, b), power, c = (
                (residuals["tree"]["a"], residuals["tree"]["b"][0]),
                residuals["power"],
                c["out"][0],
            )
            of_b = (2 * a**power * c).sum() if b.dim() == 0 else 2 * a**power * c
            return {"a": 2 * power * a ** (power - 1) * b * c, "b": [of_b, None], "skip": None}, None, None

        f.defvjp(fwd, bwd)
        return f
    f = ad.custom_jvp(func)

    @f.defjvp
    def rule(primals: Any, tangents: Any) -> Any:
        (tree, power, name), (moved, of_power, of_name) = primals, tangents
        assert of_power is None
        assert of_name is None
        a, b = tree["a"], tree["b"][0]
        tangent = 2 * (power * a ** (power - 1) * b * moved["a"] + a**power * moved["b"][0])
        return func(tree, power, name), {"out": (tangent,), "name": None, "none": None}

    return f


@each_kind
def test_trees_and_static_arguments(kind: str) -> None:
    f, b = scaled(kind), torch.tensor(2.0, dtype=torch.float64)
    tree = {"a": X, "b": [b, 7], "skip": "text"}

    def total(tree: Any) -> Tensor:
        output = f(tree, power=3)
        assert output["name"] == "f"
        assert output["none"] is None
        return output["out"][0].sum()

    gradient = ad.grad(total)(tree)
    assert_close(gradient["a"], 12 * X**2)
    assert_close(gradient["b"][0], 2 * (X**3).sum())
    assert gradient["b"][1] is None
    assert gradient["skip"] is None
    hessian = ad.hessian(total)(tree)
    assert_close(hessian["a"]["a"], torch.diag(24 * X))
    tangent = ad.jvp(total, (tree,), ({"a": T, "b": [b, None], "skip": None},))[1]
    assert_close(tangent, (12 * X**2 * T).sum() + 4 * (X**3).sum())


@each_kind
@pytest.mark.parametrize("nondiff", [(0, 2), ("power", "name"), (0, "name")])
def test_nondiff_argnums_by_number_and_name(kind: str, nondiff: Any) -> None:
    def func(power: int, x: Tensor, name: str) -> Tensor:
        assert name == "n"
        return x**power

    if kind == "vjp":
        f = ad.custom_vjp(nondiff_argnums=nondiff)(func)

        def bwd(power: int, name: str, x: Tensor, c: Tensor) -> tuple[Tensor]:
            assert name == "n"
            return (7 * power * x ** (power - 1) * c,)

        f.defvjp(lambda power, x, name: (func(power, x, name), x), bwd)
    else:
        f = functools.partial(ad.custom_jvp, nondiff_argnums=nondiff)(func)

        @f.defjvp
        def rule(power: int, name: str, primals: Any, tangents: Any) -> Any:
            (x,), (t,) = primals, tangents
            return func(power, x, name), 7 * power * x ** (power - 1) * t

    assert_close(ad.grad(lambda x: f(3, name="n", x=x).sum())(X), 21 * X**2)
    assert_close(ad.vmap(ad.jacfwd(lambda x: f(2, x, "n").sum()))(X[:, None]), 14 * X[:, None])


def test_defjvps_takes_a_rule_for_each_argument() -> None:
    """The example of JAX's documentation: sin(x) y, and an argument without a derivative."""
    f = ad.custom_jvp(lambda x, y, z: torch.sin(x) * y)
    f.defjvps(lambda t, out, x, y, z: torch.cos(x) * t * y, lambda t, out, x, y, z: torch.sin(x) * t, None)
    gradients = ad.grad(lambda *a: f(*a).sum(), argnums=(0, 1, 2))(X, T, W)
    assert_close(gradients, (torch.cos(X) * T, torch.sin(X), torch.zeros_like(W)))


@each_kind
@pytest.mark.parametrize("names", list(itertools.product(ORDERS, repeat=2)), ids="-".join)
def test_a_rule_that_calls_its_function_with_a_captured_constant(kind: str, names: tuple[str, str]) -> None:
    """At every level the constant's tangent is a zero of that level."""
    if kind == "vjp":
        scaled = ad.custom_vjp(lambda w, x: w * x**3)
        scaled.defvjp(
            lambda w, x: (scaled(w, x), (w, x)),
            lambda r, c: (r[1] ** 3 * c, 3 * r[0] * r[1] ** 2 * c),
        )
    else:
        scaled = ad.custom_jvp(lambda w, x: w * x**3)
        scaled.defjvp(
            lambda p, t: (scaled(*p), 3 * p[0] * p[1] ** 2 * t[1] + p[1] ** 3 * t[0]),
        )
    func: Any = lambda x: scaled(W, x).sum()
    for name in names:
        func = functools.partial(lambda x, inner: inner(x).sum(), inner=ORDERS[name](func))
    assert_close(func(X), (6 * W * X).sum())
    assert_close(ad.vmap(func)(torch.stack([X, T])), torch.stack([(6 * W * X).sum(), (6 * W * T).sum()]))


def test_integer_and_batched_tensors_among_the_arguments() -> None:
    def at(x: Tensor, index: Tensor) -> Tensor:
        return x.index_select(0, index[None])[0]

    f = ad.custom_vjp(lambda x, index: at(x, index) ** 2)
    f.defvjp(
        lambda x, index: (at(x, index) ** 2, (x, index)),
        lambda r, c: ((torch.arange(3) == r[1]) * 2 * at(*r) * c, None),
    )
    indices = torch.tensor([2, 0])
    rows = ad.vmap(ad.grad(f), in_dims=(None, 0))(X, indices)
    assert_close(rows, torch.stack([torch.tensor([0, 0, 4.0]), torch.tensor([1.0, 0, 0])]).double())


def test_residuals_of_any_kind_and_several_outputs() -> None:
    f = ad.custom_vjp(lambda x: (x.sin(), {"n": 3, "cos": x.cos()}))

    def fwd(x: Tensor) -> Any:
        return f(x), (x.cos(), "text", [x.sin(), 4])

    f.defvjp(fwd, lambda r, c: (r[0] * c[0] - r[2][0] * c[1]["cos"],))
    out, pullback = ad.vjp(lambda x: (f(x)[0], f(x)[1]["cos"]), X)
    assert_close(out, (X.sin(), X.cos()))
    assert_close(pullback((T, W))[0], X.cos() * T - X.sin() * W)
    hessian = ad.hessian(lambda x: f(x)[1]["cos"].sum())(X)
    assert_close(hessian, -torch.diag(X.cos()))


def test_complex_arguments() -> None:
    z = torch.tensor([1 + 2j, -0.5j], dtype=torch.complex128)
    square = ad.custom_jvp(lambda z: z * z)
    square.defjvp(lambda p, t: (p[0] * p[0], 2 * p[0] * t[0]))
    for transform in (ad.jacrev, ad.jacfwd):
        assert_close(transform(square, holomorphic=True)(z), torch.diag(2 * z))


def test_static_and_bound_methods() -> None:
    class Model:
        factor = 3.0

        @ad.custom_jvp
        def scale(self, x: Tensor) -> Tensor:
            return self.factor * x

        @scale.defjvp
        def rule(primals: Any, tangents: Any) -> Any:  # noqa: N805  rules take no instance
            (model, x), (_, t) = primals, tangents
            return model.scale(x), 2 * model.factor * t

    assert_close(ad.grad(lambda x: Model().scale(x).sum())(X), torch.full_like(X, 6.0))


def test_name_and_docstring_are_the_functions() -> None:
    def squared(x: Tensor) -> Tensor:
        """The square."""
        return x**2

    f = ad.custom_vjp(squared)
    assert (f.__name__, f.__doc__) == ("squared", "The square.")


# What runs, and when.


def test_function_runs_once_and_residuals_only_where_a_rule_is_differentiated() -> None:
    ran: list[str] = []
    f = ad.custom_vjp(lambda x: (ran.append("f"), x**2)[1])
    f.defvjp(lambda x: (ran.append("fwd"), (x**2, x))[1], lambda x, c: (ran.append("bwd"), (2 * x * c,))[1])
    total = lambda x: f(x).sum()
    f(X)
    assert ran == ["f"]
    ran.clear()
    ad.grad(total)(X)
    assert ran == ["fwd", "bwd"]
    ran.clear()
    ad.vmap(ad.grad(total))(X[:, None])
    assert ran == ["fwd", "bwd"]
    ran.clear()
    ad.hessian(total)(X)
    assert sorted(set(ran)) == ["bwd", "fwd"]


def test_a_rule_that_forgets_its_graph() -> None:
    """The residuals of a long computation do not keep its graph: an implicit derivative costs no memory."""
    seen: list[bool] = []

    def fwd(a: Tensor) -> tuple[Tensor, Tensor]:
        root = torch.ones_like(a)
        for _ in range(30):
            root = (root + a / root) / 2
        seen.append(root.requires_grad)
        return root, root

    root = ad.custom_vjp(lambda a: fwd(a)[0])
    root.defvjp(fwd, lambda root, c: (c / (2 * root),))
    a = torch.tensor([2.0, 9.0], dtype=torch.float64)
    assert_close(ad.grad(lambda a: root(a).sum())(a), 0.5 / a.sqrt())
    assert seen == [False]


def test_implicit_derivative_of_second_order() -> None:
    """fwd uses the custom function itself, so that residuals are differentiated by the rule."""
    root = ad.custom_vjp(torch.sqrt)

    def fwd(a: Tensor) -> tuple[Tensor, Tensor]:
        value = root(a)
        return value, value

    root.defvjp(fwd, lambda value, c: (c / (2 * value),))
    a = torch.tensor([2.0, 9.0], dtype=torch.float64)
    assert_close(ad.hessian(lambda a: root(a).sum())(a), torch.diag(-0.25 * a**-1.5))
    assert_close(ad.vmap(ad.jacfwd(ad.grad(root)))(a), -0.25 * a**-1.5)


def test_random_residuals_repeat_at_second_order() -> None:
    f = ad.custom_vjp(lambda x: x)

    def fwd(x: Tensor) -> tuple[Tensor, Tensor]:
        mask = torch.rand_like(x)
        return mask * x**2, mask * x

    f.defvjp(fwd, lambda r, c: (2 * r * c,))
    torch.manual_seed(0)
    value, after = ad.value_and_grad(lambda x: f(x).sum())(X)[0], torch.rand(())
    torch.manual_seed(0)
    hessian, again = ad.hessian(lambda x: f(x).sum())(X), torch.rand(())
    mask = torch.diagonal(hessian) / 2
    assert_close((mask * X**2).sum(), value)
    assert_close(again, after)


# Wrong rules.


def wrong(bwd: Any = lambda r, c: (c,), fwd: Any = lambda x: (x, None)) -> Any:
    def identity(x: Tensor) -> Tensor:
        return x

    f = ad.custom_vjp(identity)
    f.defvjp(fwd, bwd)
    return f


def wrong_push(rule: Any) -> Any:
    def identity(x: Tensor) -> Tensor:
        return x

    f = ad.custom_jvp(identity)
    f.defjvp(rule)
    return f


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (ad.custom_vjp(lambda x: x), "custom_vjp: <lambda> is differentiated, but has no rule.*defvjp"),
        (ad.custom_jvp(lambda x: x), "custom_jvp: <lambda> is differentiated, but has no rule.*defjvp"),
        (wrong(fwd=lambda x: x), r"fwd of identity is expected to return \(output, residuals\), got Tensor"),
        (
            wrong(lambda r, c: c),
            r"bwd of identity is expected to return a tuple of 1.*got Tensor. Write \(c,\)",
        ),
        (wrong(lambda r, c: (c, c)), "got a tuple of 2"),
        (
            wrong(lambda r, c: ([c],)),
            r"structure of args, but cotangent\[0\] is a list of 1, but args\[0\] is a leaf",
        ),
        (
            wrong(lambda r, c: (c.sum(),)),
            r"for args\[0\] has shape \(\) and dtype torch.float64, but .* shape \(3,\)",
        ),
        (wrong(lambda r, c: (c.float(),)), "dtype torch.float32"),
        (wrong(lambda r, c: ("text",)), "has type str"),
        (
            wrong_push(lambda p, t: t[0]),
            r"jvp rule of identity is expected to return \(output, tangent\), got Tensor",
        ),
        (
            wrong_push(lambda p, t: (p[0], [t[0]])),
            "tangent that the rule of identity gives is expected to have the structure",
        ),
        (wrong_push(lambda p, t: (p[0], t[0][:2])), r"for output has shape \(2,\)"),
    ],
)
def test_wrong_rules_are_named(f: Any, message: str) -> None:
    with pytest.raises(RuleError, match=message):
        ad.grad(lambda x: f(x).sum())(X)
    with pytest.raises(RuleError, match=message):
        ad.vmap(ad.jacfwd(lambda x: f(x).sum()))(torch.stack([X, X]))


def test_none_is_a_zero_cotangent_and_a_zero_tangent() -> None:
    assert_close(ad.grad(lambda x: (wrong(lambda r, c: (None,))(x) + x).sum())(X), torch.ones_like(X))
    assert_close(
        ad.grad(lambda x: (wrong_push(lambda p, t: (p[0], None))(x) + x).sum())(X), torch.ones_like(X)
    )
    f = wrong_push(lambda p, t: (p[0], None))
    assert_close(ad.jvp(lambda x: f(x) + x, (X,), (T,))[1], T)
    assert_close(ad.vmap(ad.jacfwd(lambda x: f(x) * x))(X), X)


@each_kind
@pytest.mark.parametrize("outer", ["ground", "vmap", "grad", "jvp"])
def test_a_captured_tensor_that_is_differentiated_is_an_error(kind: str, outer: str) -> None:
    """JAX raises as well: no rule says what the derivative by it is."""

    def func(w: Tensor) -> Tensor:
        f = ad.custom_vjp(lambda x: w * x) if kind == "vjp" else ad.custom_jvp(lambda x: w * x)
        if kind == "vjp":
            f.defvjp(lambda x: (w * x, None), lambda r, c: (c,))
        else:
            f.defjvp(lambda p, t: (f(p[0]), t[0]))
        return ad.grad(lambda x: f(x).sum())(w).sum()

    calls = {
        "ground": lambda: func(X.clone().requires_grad_()),
        "vmap": lambda: ad.vmap(ad.grad(func))(torch.stack([X, X])),
        "grad": lambda: ad.grad(func)(X),
        "jvp": lambda: ad.jvp(func, (X,), (T,)),
    }
    with pytest.raises(RuleError, match="captures a tensor that is differentiated, but is not an argument"):
        calls[outer]()


@each_kind
def test_nondiff_tensors_are_constants(kind: str) -> None:
    f = ad.custom_vjp(lambda x, y: x * y, (1,)) if kind == "vjp" else ad.custom_jvp(lambda x, y: x * y, (1,))
    if kind == "vjp":
        f.defvjp(lambda x, y: (x * y, None), lambda y, r, c: (y * c,))
    else:
        f.defjvp(lambda y, p, t: (f(p[0], y), y * t[0]))
    assert_close(ad.grad(lambda x: f(x, W).sum())(X), W)
    assert_close(
        ad.vmap(ad.grad(lambda x, y: f(x, y).sum()))(torch.stack([X, X]), torch.stack([W, T])),
        torch.stack([W, T]),
    )
    with pytest.raises(
        RuleError, match=r"nondiff\[0\] of <lambda> is differentiated, but listed in nondiff_argnums"
    ):
        ad.grad(lambda y: f(X, y).sum())(W)


@pytest.mark.parametrize("value", [-1, 2, 1.5, "other", True, (0, "other")])
def test_nondiff_argnums_must_name_parameters(value: Any) -> None:
    with pytest.raises(ArgnumsError, match="nondiff_argnums are positions from 0 on or names"):
        ad.custom_vjp(lambda x, y: x, value)


def test_keyword_only_parameters_have_no_place_in_a_rule() -> None:
    f = ad.custom_jvp(lambda x, *, scale: scale * x)
    f.defjvp(lambda p, t: (p[0], t[0]))
    with pytest.raises(RuleError, match=r"is called with \['scale'\] by keyword"):
        f(X, scale=2.0)


@each_kind
def test_an_exception_in_a_rule_comes_out_as_it_is(kind: str) -> None:
    class StopError(Exception):
        pass

    def stop(*_: Any) -> Any:
        raise StopError

    f = wrong(stop) if kind == "vjp" else wrong_push(stop)
    for transform in (ad.grad, ad.jacfwd, ad.hessian):
        with pytest.raises(StopError):
            transform(lambda x: f(x).sum())(X)
        with pytest.raises(StopError):
            ad.vmap(transform(lambda x: f(x).sum()))(torch.stack([X, X]))


@each_kind
def test_writing_to_a_differentiated_argument_is_an_error(kind: str) -> None:
    """The value would be that of the written argument, and whoever uses it too gets a wrong derivative."""
    double = lambda x: x.mul_(2)
    f = ad.custom_vjp(double) if kind == "vjp" else ad.custom_jvp(double)
    if kind == "vjp":
        f.defvjp(lambda x: (double(x), None), lambda r, c: (2 * c,))
    else:
        f.defjvp(lambda p, t: (p[0], 2 * t[0]))

    def func(x: Tensor) -> Tensor:
        y = x * 1
        return (f(y) + y).sum()

    for call in (lambda: ad.grad(func)(X), lambda: ad.vmap(ad.jacfwd(func))(X[None])):
        with pytest.raises(RuleError, match="wrote in place to an argument that is differentiated"):
            call()


def test_nondiff_argnums_may_name_arguments_without_a_name() -> None:
    f = ad.custom_jvp(lambda x, *rest: x * rest[0], 1)
    f.defjvp(lambda y, primals, tangents: (primals[0] * y, 7 * y * tangents[0]))
    assert_close(ad.grad(lambda x: f(x, 2.0).sum())(X), torch.full_like(X, 14.0))


@each_kind
def test_rules_do_not_keep_the_output(kind: str) -> None:
    """Only what the rules ask for stays with the graph."""
    kept: list[Any] = []

    def squared(x: Tensor) -> Tensor:
        y = x * x
        kept.append(weakref.ref(y))
        return y

    f = ad.custom_vjp(squared) if kind == "vjp" else ad.custom_jvp(squared)
    if kind == "vjp":
        f.defvjp(lambda x: (squared(x), x), lambda x, c: (2 * x * c,))
    else:
        f.defjvp(lambda p, t: (squared(p[0]), 2 * p[0] * t[0]))
    out = f(X.clone().requires_grad_())
    assert [one() for one in kept] == [None]
    out.sum().backward()


# A rule is transposed where it is not trivial, and refused where it is not linear.

A = torch.tensor([[4.0, 1.0, 0.5], [1.0, 3.0, -1.0], [0.5, -1.0, 5.0]], dtype=torch.float64)
INVERSE = torch.linalg.inv(A)


def conjugate_gradients(b: Tensor, *, tolerance: float | None = 1e-13, iterations: int = 50) -> Tensor:
    """Solves A x = b; for b = 0 it stops at once."""
    x, r = torch.zeros_like(b), b
    p, rr = r, r @ r
    for _ in range(iterations):
        if tolerance is not None and rr.sqrt() < tolerance:
            break
        step = rr / (p @ (A @ p))
        x, r = x + step * p, r - step * (A @ p)
        rr, before = r @ r, rr
        p = r + rr / before * p
    return x


def identity_with(kind: str, linear: Any) -> Any:
    """x -> x, whose tangents, or cotangents, are sent through ``linear``."""
    if kind == "vjp":
        f = ad.custom_vjp(lambda x: x.clone())
        f.defvjp(lambda x: (x.clone(), x), lambda x, c: (linear(c),))
        return f
    f = ad.custom_jvp(lambda x: x.clone())
    f.defjvp(lambda p, t: (p[0].clone(), linear(t[0])))
    return f


# What each gives for f(x) with the Jacobian ``slope``, a symmetric matrix.
TRANSPOSING: dict[str, tuple[str, Any, Any]] = {
    "grad": ("jvp", lambda f: ad.grad(lambda x: f(x) @ W)(X), lambda slope: slope @ W),
    "vjp": ("jvp", lambda f: ad.vjp(f, X)[1](W)[0], lambda slope: slope @ W),
    "jacrev": ("jvp", lambda f: ad.jacrev(f)(X), lambda slope: slope),
    "jacobian of few": (
        "both",
        lambda f: ad.jacobian(lambda s: f(s * X))(torch.ones((), dtype=T.dtype)),
        lambda slope: slope @ X,
    ),
    "linearize": ("both", lambda f: ad.linearize(f, X)[1](T), lambda slope: slope @ T),
    "linearize twice": (
        "both",
        lambda f: ad.linearize(lambda x: ad.linearize(f, x * x)[1](x), X)[1](T),
        lambda slope: slope @ T,
    ),
    "functional.jvp": (
        "vjp",
        lambda f: ad.functional.jvp(f, X, T)[1],
        lambda slope: slope @ T,
    ),
    "functional.jvp, strict": (
        "jvp",
        lambda f: ad.functional.jvp(lambda x: f(x) * x, X, T, strict=True)[1],
        lambda slope: X * (slope @ T) + X * T,
    ),
    "jvp": ("vjp", lambda f: ad.jvp(f, (X,), (T,))[1], lambda slope: slope @ T),
    "jacfwd": ("vjp", lambda f: ad.jacfwd(f)(X), lambda slope: slope),
    "vmap of jvp": (
        "vjp",
        lambda f: ad.vmap(lambda t: ad.jvp(f, (X,), (t,))[1])(torch.stack([T, W])),
        lambda slope: torch.stack([T, W]) @ slope,
    ),
    "jvp of grad": (
        "jvp",
        lambda f: ad.jvp(ad.grad(lambda x: f(x * x) @ W), (X,), (T,))[1],
        lambda slope: 2 * T * (slope @ W),
    ),
    "hessian": (
        "jvp",
        lambda f: ad.hessian(lambda x: f(x).square().sum() / 2)(X),
        lambda slope: slope @ slope,
    ),
    "forward over reverse": (
        "vjp",
        lambda f: ad.hessian(lambda x: f(x).square().sum() / 2, mode="forward-over-reverse")(X),
        lambda slope: slope @ slope,
    ),
    "grad of linearize": (
        "both",
        lambda f: ad.grad(lambda x: ad.linearize(lambda x: f(x * x), x)[1](T) @ W)(X),
        lambda slope: 2 * T * (slope @ W),
    ),
    "torch.func.jvp": ("vjp", lambda f: torch.func.jvp(f, (X,), (T,))[1], lambda slope: slope @ T),
    "torch.autograd": (
        "jvp",
        lambda f: torch.autograd.grad(f(leaf := X.clone().requires_grad_()) @ W, leaf)[0],
        lambda slope: slope @ W,
    ),
}
KINDS_AND_NAMES = [
    (kind, name)
    for name, (kinds, *_) in TRANSPOSING.items()
    for kind in ("jvp", "vjp")
    if kinds in (kind, "both")
]
each_transposed = pytest.mark.parametrize(("kind", "name"), KINDS_AND_NAMES)


@each_transposed
@pytest.mark.parametrize(
    "options", [{}, {"iterations": 3, "tolerance": None}], ids=["until it converges", "three steps"]
)
def test_a_solver_that_starts_from_zero_as_a_rule(kind: str, name: str, options: Any) -> None:
    """At a zero vector it does nothing, or divides by zero, and has no derivative: only elsewhere is it A^-1."""
    _, run, expected = TRANSPOSING[name]
    f = identity_with(kind, functools.partial(conjugate_gradients, **options))
    for _ in range(2):
        assert_close(run(f), expected(INVERSE))


NONLINEAR: dict[str, Any] = {
    "one step of a solver": functools.partial(conjugate_gradients, iterations=1),
    "square": lambda t: t**2,
    "affine": lambda t: 2 * t + 0.1,
    "constant": torch.ones_like,
    "abs": torch.abs,
    "relu": torch.relu,
    "where": lambda t: torch.where(t > 0, 2 * t, 3 * t),
    "bounded": lambda t: t.clamp(-5, 5),
    "bounded from below": lambda t: t.clamp(-0.1, 0.1),
    "bounded norm": lambda t: t / t.norm().clamp(min=20.0),
    "unit": lambda t: t / t.norm(),
    "sorted": lambda t: W * t.sort().values,
    "largest": lambda t: torch.zeros_like(t).scatter(0, t.argmax(0, keepdim=True), t.max()),
    "rounded": lambda t: t.round(),
}
# Branches of Python's leave no trace in a graph, and do not go under vmap.
BRANCHING: dict[str, Any] = {
    "a branch": lambda t: t if t.norm() < 20 else 20 * t / t.norm(),
    "a sign": lambda t: t if t[0] > 0 and t[1] > 0 else 2 * t,
    "a count": lambda t: sum((t / 2**i for i in range(min(int(t.norm()), 40))), 0 * t),
}
BRANCHES_ARE_SEEN = "grad", "vjp", "jvp", "jvp of grad", "torch.func.jvp", "torch.autograd"


@pytest.mark.parametrize(
    ("kind", "name", "rule"),
    [
        pytest.param(kind, name, rule, id=f"{kind}-{name}-{shown}")
        for kind, name in KINDS_AND_NAMES
        for shown, rule in (NONLINEAR | (BRANCHING if name in BRANCHES_ARE_SEEN else {})).items()
    ],
)
def test_a_rule_that_is_not_linear_is_refused(kind: str, name: str, rule: Any) -> None:
    f, (_, run, _) = identity_with(kind, rule), TRANSPOSING[name]
    for _ in range(2):  # what was refused is refused again
        with pytest.raises(RuleError, match="not act as a linear function"):
            run(f)


@each_transposed
@pytest.mark.parametrize(
    "rule",
    [
        lambda t: A @ t,
        lambda t: torch.linalg.solve(A, t),
        lambda t: torch.where(W > 1, t, 0.0) + 0 * t.sum(),
        lambda t: torch.fft.ifft(torch.fft.fft(t)).real,
        lambda t: (t[None] * torch.eye(3, dtype=t.dtype)).sum(1),
        lambda t: torch.zeros_like(t) - t,
        lambda t: torch.stack([t[0], t[2], t[1]]),
        lambda t: 1e-9 * t,
        lambda t: 1e9 * t,
        lambda t: 0 * t,
    ],
)
def test_a_linear_rule_is_not_refused(kind: str, name: str, rule: Any) -> None:
    """Its matrix is its own transpose."""
    _, run, expected = TRANSPOSING[name]
    slope = torch.stack([rule(row) for row in torch.eye(3, dtype=torch.float64)])
    assert_close(run(identity_with(kind, rule)), expected(slope))


@each_kind
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64, torch.complex128]
)
def test_linear_rules_of_all_dtypes_are_taken_and_others_refused(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    drawn = torch.randn(42, 40, dtype=torch.complex64)
    matrix, x, v = ((drawn if dtype.is_complex else drawn.real).to(dtype) / 4).split((40, 1, 1))
    x, v = x[0], v[0]
    products = {
        "vjp": (lambda f: ad.jvp(f, (x,), (v,))[1], lambda c: matrix.mH @ c, matrix @ v),
        "jvp": (lambda f: ad.vjp(f, x)[1](v)[0], lambda t: matrix @ t, matrix.mH @ v),
    }
    run, rule, expected = products[kind]
    tolerance = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(run(identity_with(kind, rule)), expected, rtol=tolerance, atol=tolerance)
    # Linear where it is seen as a pair of real numbers.
    mirrored = identity_with(kind, lambda t: t.conj() * 2)
    assert_close(run(mirrored), v.conj() * 2)
    for nonlinear in (lambda t: t * t.abs(), lambda t: rule(t) + 0.1 * t.norm()):
        with pytest.raises(RuleError, match="not act as a linear function"):
            run(identity_with(kind, nonlinear))


@each_kind
def test_an_ill_conditioned_rule_in_single_precision(kind: str) -> None:
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(30, 30))[0]
    matrix = q * torch.logspace(0, 5, 30) @ q.T
    f = identity_with(kind, lambda t: torch.linalg.solve(matrix, t))
    for _ in range(5):
        v = torch.randn(30)
        given = ad.jvp(f, (v,), (v,))[1] if kind == "vjp" else ad.vjp(f, v)[1](v)[0]
        assert given.isfinite().all()


@each_kind
def test_one_sample_of_a_batch_is_enough_to_refuse(kind: str) -> None:
    """The rule bounds its vector in the last sample alone, and the batch is inside a batch."""

    def rule(bound: Tensor, t: Tensor) -> Tensor:
        return torch.minimum(t, bound)

    if kind == "vjp":
        f = ad.custom_vjp(lambda x, bound: x * 1, nondiff_argnums=1)
        f.defvjp(lambda x, bound: (x * 1, None), lambda bound, _, c: (rule(bound, c),))
        run = lambda x, bound: ad.jvp(lambda x: f(x, bound), (x,), (x,))[1]
    else:
        f = ad.custom_jvp(lambda x, bound: x * 1, nondiff_argnums=1)
        f.defjvp(lambda bound, p, t: (p[0] * 1, rule(bound, t[0])))
        run = lambda x, bound: ad.grad(lambda x: f(x, bound).sum())(x)
    bounds = torch.full((2, 3), 1e9, dtype=torch.float64)
    xs = torch.rand(2, 3, 4, dtype=torch.float64)
    batched = ad.vmap(ad.vmap(run))
    assert_close(batched(xs, bounds), xs if kind == "vjp" else torch.ones_like(xs))
    bounds[-1, -1] = 1.0
    with pytest.raises(RuleError, match="not act as a linear function"):
        batched(xs, bounds)


@each_kind
def test_a_rule_that_draws_random_numbers_is_linear_for_each_draw(kind: str) -> None:
    f = identity_with(kind, lambda t: t * torch.rand(3, dtype=t.dtype))
    run = (lambda: ad.jvp(f, (X,), (W,))[1]) if kind == "vjp" else (lambda: ad.grad(lambda x: f(x) @ W)(X))
    torch.manual_seed(0)
    for _ in range(3):
        state = torch.get_rng_state()
        result, after = run(), torch.rand(())
        torch.set_rng_state(state)
        assert_close(result, W * torch.rand(3, dtype=torch.float64))
        assert_close(after, torch.rand(()))


@each_kind
def test_no_random_numbers_are_drawn_for_the_check(kind: str) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    run = TRANSPOSING["linearize"][1]
    run(identity_with(kind, lambda t: A @ t))
    assert torch.equal(torch.get_rng_state(), before)


@each_kind
def test_infinite_slopes_are_not_judged(kind: str) -> None:
    """As of sqrt at zero: the others are as they should be."""
    slopes = torch.tensor([2.0, float("inf"), float("nan")], dtype=torch.float64)
    f = identity_with(kind, lambda t: slopes * t)
    result = ad.jvp(f, (X,), (W,))[1] if kind == "vjp" else ad.grad(lambda x: f(x) @ W)(X)
    torch.testing.assert_close(result, slopes * W, equal_nan=True)


def test_a_linear_rule_is_compared_once_and_a_solver_each_time() -> None:
    """The nodes of the graph show that a product with a constant is linear."""
    ran: list[int] = []
    solves = (lambda t: A @ t, 1, 1), (conjugate_gradients, 2, 2)
    for solve, *counts in solves:
        f = identity_with("jvp", lambda t, solve=solve: (ran.append(1), solve(t))[1])
        first, again = [], []
        for ran_now in (first, again):
            ran.clear()
            ad.grad(lambda x, f=f: f(x) @ W)(X)
            ran_now += ran
        assert [len(first), len(again)] == [2, counts[1]]


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@each_kind
def test_rules_are_traced_without_a_check(kind: str, mode: str) -> None:
    """There are no numbers to compare; later calls compare them."""
    f = identity_with(kind, lambda t: A.to(t.device) @ t)
    run = (
        (lambda x: ad.jvp(f, (x,), (x,))[1]) if kind == "vjp" else ad.grad(lambda x: f(x).square().sum() / 2)
    )
    if mode != "real":
        f = identity_with(kind, lambda t: 3 * t)
    traced = make_fx(run, tracing_mode=mode)(X)
    slope = A if mode == "real" else 3 * torch.eye(3, dtype=A.dtype)
    expected = slope @ T
    assert_close(traced(T), expected)
    assert_close(run(T), expected)


def test_an_autograd_function_whose_backward_solves() -> None:
    """linearize and the jacobian of few inputs transpose it too, and torch.autograd.functional.jvp at zero."""

    class Solve(torch.autograd.Function):
        @staticmethod
        def forward(b: Tensor) -> Tensor:
            return INVERSE @ b

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, c: Tensor) -> Tensor:
            return conjugate_gradients(c)

    class Bounded(Solve):
        @staticmethod
        def backward(ctx: Any, c: Tensor) -> Tensor:
            return c.clamp(-5, 5)

    for name in ("linearize", "jacobian of few", "functional.jvp", "linearize twice", "grad of linearize"):
        _, run, expected = TRANSPOSING[name]
        assert_close(run(Solve.apply), expected(INVERSE))
        with pytest.raises(RuleError, match="the backward of Bounded does not act as a linear"):
            run(Bounded.apply)
