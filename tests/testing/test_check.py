"""check_grads and its kin pass what is right, and fail what is wrong with the right leaf and the right numbers."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

import autodiff as ad
from autodiff.errors import (
    DerivativeError,
    DtypeError,
    LeafError,
    OptionError,
    OutputError,
    ShapeError,
    StructureError,
)
from autodiff.testing import check_grads, check_jvp, check_vjp
from scenarios import SCENARIOS, Scenario, assert_close, map_tree

if TYPE_CHECKING:
    from collections.abc import Callable

F = nn.functional


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def failure(check: Callable[..., None], *args: Any, **kwargs: Any) -> DerivativeError:
    with pytest.raises(DerivativeError) as caught:
        check(*args, **kwargs)
    return caught.value


# A cube by an autograd Function whose rules can be broken one by one.


def cube(
    backward: Callable[[Tensor, Tensor], Tensor] = lambda x, g: 3 * x**2 * g,
    jvp: Callable[[Tensor, Tensor], Tensor] = lambda x, t: 3 * x**2 * t,
) -> Callable[[Tensor], Tensor]:
    """x^3 with these rules, of the point and of a cotangent or tangent."""

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x**3

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return backward(ctx.saved_tensors[0], g)

        @staticmethod
        def jvp(ctx: Any, t: Tensor) -> Tensor:
            return jvp(ctx.saved_tensors[0], t)

    return Cube.apply


X = torch.tensor([0.5, -1.0, 2.0])


# Right derivatives pass.


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scenarios_pass_to_third_order(scenario: Scenario, dtype: torch.dtype) -> None:
    primal = map_tree(lambda leaf: leaf.to(dtype), scenario.primal, scenario.primal)
    check_grads(scenario.func, (primal,), 3 if dtype is torch.float64 else 2)


class Pair(NamedTuple):
    first: Any
    second: Any


@ad.pytree.register_dataclass
@dataclass
class Block:
    weight: Any
    name: str
    rest: Any


def of_tree(p: Any) -> Any:
    w, x = p["block"].weight, p["pair"].second[0]
    chosen = w[p["index"]] * p["factor"]
    return OrderedDict(y=[chosen * x.sin(), None], z=Pair(x.exp().sum() * w.sum(), w[:, None] * x))


TREE = {
    "block": Block(randn(2, seed=1), "name", None),
    "pair": Pair("text", [randn(3, seed=2)]),
    "index": torch.tensor([1, 0, 1]),
    "factor": 2.5,
}


def test_tree_with_passive_leaves_and_several_outputs_passes() -> None:
    check_grads(of_tree, (TREE,))
    check_grads(lambda x, p, name: of_tree(p)["y"][0] * x, (randn(3), TREE, "any"))


Z = randn(3, seed=4, dtype=torch.complex64)


@pytest.mark.parametrize(
    ("f", "primal"),
    [
        (lambda z: z.exp() * z, Z),
        (lambda z: {"a": z.conj() * z.sin(), "b": z.abs()}, Z),
        (lambda z: (z * z.conj()).real.sum(), Z),
        (lambda x: torch.complex(x.sin(), x**2), X),
    ],
    ids=["holomorphic", "not holomorphic", "C to R", "R to C"],
)
def test_complex_functions_pass(f: Callable[..., Any], primal: Tensor) -> None:
    check_grads(f, (primal,))


@pytest.mark.parametrize(
    "f",
    [
        lambda a: a.softmax(-1),
        lambda a: a.logsumexp(0),
        lambda a: torch.linalg.inv(a @ a.mT + torch.eye(2, dtype=a.dtype)),
        lambda a: F.gelu(a).cumsum(0),
        lambda a: a.sort(1)[0].prod(1),
    ],
)
def test_operations_of_torch_pass(f: Callable[..., Any]) -> None:
    check_grads(f, (randn(2, 3),))


@pytest.mark.parametrize(
    ("f", "x"),
    [
        (torch.log, [1e-3, 1.0, 1e5]),
        (torch.sin, [1e-3, 1.0, 1e3]),
        (torch.exp, [-30.0, 0.0, 30.0]),
        (lambda x: x**5, [0.0, 1e-4, 0.1, 1e2]),
        (lambda x: x**5, [0.0]),
        (lambda x: 1e8 + x**2, [0.0, 1e-3, 1.0, 1e2]),
        (lambda x: 1e8 + x**2, [0.0, 1e-3, 0.1]),
        (lambda x: 1e-7 * x.sin(), [0.0, 1.0]),
    ],
)
def test_steps_suit_numbers_of_any_size(f: Callable[[Tensor], Tensor], x: list[float]) -> None:
    check_grads(f, (torch.tensor(x, dtype=torch.float64),))


def test_module_as_a_function_of_its_parameters_passes() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    parameters = dict(module.named_parameters())
    before = copy.deepcopy(parameters)
    check_grads(lambda p, x: ad.functional_call(module, p, x), (parameters, randn(5, 3, dtype=torch.float32)))
    assert all(torch.equal(parameters[key], before[key]) and parameters[key].grad is None for key in before)


def test_empty_leaf_and_no_element_pass() -> None:
    check_grads(lambda x, y: (x.sum() + y, x * 2), (torch.zeros(0, 3), X))


def test_options_pass_through() -> None:
    check_grads(lambda x, scale: (x**2 * scale, "aux"), [X], kwargs={"scale": torch.ones(3)}, has_aux=True)
    seen: list[torch.dtype] = []
    check_grads(lambda x, s: seen.append(s.dtype) or x, (X,), 1, kwargs={"s": torch.ones(3)})
    assert set(seen) == {torch.float64}


# Wrong derivatives fail, and are named.

TWICE = {"backward": lambda x, g: 6 * x**2 * g, "jvp": lambda x, t: 6 * x**2 * t}


@pytest.mark.parametrize(("rule", "mode"), [("backward", "rev"), ("jvp", "fwd")])
def test_rule_wrong_by_a_factor_fails_in_its_mode_alone(rule: str, mode: str) -> None:
    f = cube(**{rule: TWICE[rule]})
    other = "fwd" if mode == "rev" else "rev"
    check_grads(f, (X,), 1, other)
    for modes in (mode, (mode,), ("fwd", "rev")):
        error = failure(check_grads, f, (X,), 1, modes)
        assert (error.mode, error.order, error.output, error.input) == (mode, 1, "output", "args[0]")
        assert error.derivative == pytest.approx(2 * error.finite_difference, rel=1e-6)
        assert isinstance(error, AssertionError)


@pytest.mark.parametrize("off", [3e-6, 1e-9])
def test_small_errors_fail_where_the_tolerance_is_smaller(off: float) -> None:
    f = cube(jvp=lambda x, t: 3 * x**2 * t * (1 + off))
    if off < 1e-6:
        check_grads(f, (X,), 1, "fwd")
    tight = {"rtol": off / 10, "atol": 0.0, "eps": 1e-3}
    check_grads(cube(), (X,), 1, **tight)
    assert failure(check_grads, f, (X,), 1, "fwd", **tight).mode == "fwd"
    if off > 1e-6:
        failure(check_grads, f, (X,), 1, "fwd")
        check_grads(f, (X,), 1, "fwd", rtol=1e-4)
        check_grads(f, (X,), 1, "fwd", atol=1e-3)


WRONG = {
    # name: f, order, modes; expected mode, order, output, input, and derivative / finite difference
    "backward in one leaf": (
        lambda p, q: {"a": p["w"][0] * 2, "b": p["w"][1].sin() + cube(TWICE["backward"])(q)},
        *(1, "rev", "rev", 1, "output['b']", "args[1]", 2.0),
    ),
    "jvp in one leaf": (
        lambda p, q: [q.sin(), (cube(jvp=TWICE["jvp"])(p["w"][1]),)],
        *(1, ("rev", "fwd"), "fwd", 1, "output[1][0]", "args[0]['w'][1]", 2.0),
    ),
    "detached": (
        lambda p, q: (p["w"][0].detach() * q, p["w"][1] * q),
        *(1, "rev", "rev", 1, "output[0]", "args[0]['w'][0]", 0.0),
    ),
    "detached, forward": (
        lambda p, q: (q, p["w"][1].detach() * p["w"][1]),
        *(1, "fwd", "fwd", 1, "output[1]", "args[0]['w'][1]", 0.5),
    ),
    "backward's derivative": (
        lambda p, q: {"a": p["w"][0] + cube(lambda x, g: 3 * x.detach() ** 2 * g)(q)},
        *(2, "rev", "rev", 2, "the cotangent of args[1]", "args[1]", 0.0),
    ),
    "backward's derivative by the cotangent": (
        lambda p, q: cube(lambda x, g: 3 * x**2 * g.detach())(q),
        *(2, "rev", "rev", 2, "the cotangent of args[1]", "cotangents1[0]", 0.0),
    ),
    "jvp of backward": (
        lambda p, q: cube(lambda x, g: 1.5 * x**2 * g + 1.5 * x.detach() ** 2 * g)(p["w"][1]),
        *(2, "rev", "rev", 2, "the cotangent of args[0]['w'][1]", "args[0]['w'][1]", 0.5),
    ),
    "backward of jvp": (
        lambda p, q: {"a": q.sin(), "b": cube(jvp=lambda x, t: 3 * x.detach() ** 2 * t)(p["w"][1])},
        *(2, ("fwd", "rev"), "fwd", 2, "the tangent of output['b']", "args[0]['w'][1]", 0.0),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_leaf_is_named_with_both_numbers(name: str) -> None:
    f, order, modes, *expected, ratio = WRONG[name]
    args = ({"w": [randn(3, seed=1), randn(3, seed=2)]}, randn(3, seed=3))
    error = failure(check_grads, f, args, order, modes)
    assert [error.mode, error.order, error.output, error.input] == expected
    assert error.derivative == pytest.approx(ratio * error.finite_difference, rel=1e-6)
    text = str(error)
    assert text.startswith(f"check_grads: the derivative of {error.output}")
    for part in (
        error.input,
        f"{error.derivative:.9g}",
        f"{error.finite_difference:.9g}",
        f"order {order}",
        f"mode '{error.mode}'",
    ):
        assert part in text
    if order == 2:
        check_grads(f, args, 1, modes)


def test_second_order_rules_pass_where_they_are_right() -> None:
    check_grads(cube(), (X,), 3, "rev")
    check_grads(cube(), (X,), 1, "fwd")


def test_derivative_that_ends_after_the_first_fails() -> None:
    """once_differentiable gives zeros without an error where the engine is asked for the inputs."""

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 3 * ctx.saved_tensors[0] ** 2 * g

    check_grads(Cube.apply, (X,), 1, "rev")
    with pytest.raises((DerivativeError, RuntimeError)):
        check_grads(Cube.apply, (X,), 2, "rev")


def test_rule_wrong_in_a_small_leaf_does_not_hide_behind_a_large_one() -> None:
    def f(p: Any) -> Tensor:
        return 1e9 * p["large"].sin().sum() + cube(TWICE["backward"])(p["small"]).sum()

    error = failure(check_grads, f, ({"large": randn(3, seed=1), "small": X},), 1, "rev", atol=0.0, eps=1e-3)
    assert error.input == "args[0]['small']"
    assert error.derivative == pytest.approx(2 * error.finite_difference, rel=1e-3)


def test_rule_that_is_not_linear_fails_for_all_leaves_together() -> None:
    def f_jvp(primals: Any, tangents: Any) -> Any:
        (x, y), (t, u) = primals, tangents
        return x * y, x * u + y * t + t * u

    error = failure(check_jvp, torch.mul, f_jvp, (X, X + 1))
    assert (error.input, error.output) == ("all inputs", "output")

    def f_vjp(x: Tensor) -> Any:
        return (x, 2 * x), lambda cts: (cts[0] + 2 * cts[1] + cts[0] * cts[1],)

    error = failure(check_vjp, lambda x: (x, 2 * x), f_vjp, (X,))
    assert (error.input, error.output) == ("args[0]", "all outputs")


def test_element_is_named() -> None:
    off = torch.zeros(2, 3)
    off[1, 2] = 0.5

    def f_jvp(primals: Any, tangents: Any) -> Any:
        return primals[0].sin(), tangents[0] * (primals[0].cos() + off)

    assert "the derivative of output at [1, 2] with respect to args[0], by f_jvp" in str(
        failure(check_jvp, torch.sin, f_jvp, (randn(2, 3),))
    )


def test_conjugate_is_told_from_its_opposite() -> None:
    check_vjp(lambda z: z**2, lambda z: (z**2, lambda g: (2 * z.conj() * g,)), (Z,))
    assert failure(check_vjp, lambda z: z**2, lambda z: (z**2, lambda g: (2 * z * g,)), (Z,)).mode == "rev"
    check_jvp(lambda z: z**2, lambda p, t: (p[0] ** 2, 2 * p[0] * t[0]), (Z,))
    error = failure(check_jvp, lambda z: z**2, lambda p, t: (p[0] ** 2, 2 * p[0].conj() * t[0]), (Z,))
    assert isinstance(error.derivative, complex)
    assert abs(error.derivative) == pytest.approx(abs(error.finite_difference), rel=1e-6)


def test_numbers_are_those_of_the_closed_form() -> None:
    """f(w, b) = w^2 b: the finite difference along a tangent (t, 0) is 2 w t b, whatever f_jvp says."""
    seen: list[Any] = []
    w, b = torch.tensor(1.5, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64)

    def f_jvp(primals: Any, tangents: Any) -> Any:
        seen.append(tangents[0])
        return primals[0]["w"] ** 2 * primals[0]["b"], torch.tensor(7.25, dtype=torch.float64)

    error = failure(check_jvp, lambda p: p["w"] ** 2 * p["b"], f_jvp, ({"w": w, "b": b, "n": "text"},))
    assert seen[0]["b"] == 0
    assert seen[0]["n"] is None
    assert error.finite_difference == pytest.approx(float(2 * w * seen[0]["w"] * b), rel=1e-9)
    assert error.derivative == 7.25
    assert (error.input, error.order, error.mode) == ("args[0]['w']", 1, "fwd")


def test_numbers_of_a_pullback_are_inner_products() -> None:
    """f(x) = A x: the finite difference is c.A t, with the cotangent c that the pullback is given."""
    a = randn(2, 3, seed=6)
    seen: list[Tensor] = []

    def pullback(cotangent: Tensor) -> tuple[Tensor]:
        seen.append(cotangent)
        return (torch.ones(3, dtype=torch.float64),)

    x = randn(3, seed=7)
    error = failure(check_vjp, lambda x: a @ x, lambda x: (a @ x, pullback), (x,), seed=2)
    generator = torch.Generator().manual_seed(2)
    t = torch.randn(3, dtype=torch.float64, generator=generator) * x.abs().clamp(0.01, 10)
    assert error.finite_difference == pytest.approx(float(seen[0] @ a @ t), rel=1e-8)
    assert error.derivative == pytest.approx(float(t.sum()), rel=1e-12)


def test_nan_and_infinity_are_reported_as_such() -> None:
    def hidden(x: Tensor) -> Tensor:
        return torch.where(x > 2.5, torch.sqrt(x - 2.5), torch.zeros_like(x))

    error = failure(check_grads, hidden, (torch.tensor([2.0, 3.0]),), 1, "rev")
    assert error.derivative != error.derivative
    assert "but is nan. A rule divides by zero there" in str(error)

    error = failure(check_grads, torch.sqrt, (torch.zeros(2),), 1)
    assert error.finite_difference != error.finite_difference
    assert "f is not finite around args" in str(error)

    text = str(failure(check_grads, lambda x: {"y": x / x}, (torch.tensor([1.0, 0.0]),)))
    assert text.startswith("check_grads: output['y'] is expected to be finite, got nan in it")

    nans = failure(check_jvp, torch.sin, lambda p, t: (p[0].sin(), t[0] / 0), (X,))
    assert abs(nans.derivative) == float("inf")


def test_kink_fails() -> None:
    check_grads(torch.relu, (X,))
    error = failure(check_grads, torch.relu, (torch.tensor([1.0, 0.0]),), 1)
    assert "at [1]" in str(error)
    assert "kink" in str(error)


# float64.


def test_function_runs_in_double() -> None:
    seen: set[torch.dtype] = set()

    def f(x: Tensor, z: Tensor) -> Tensor:
        seen.update((x.dtype, z.dtype))
        return x * z.real

    check_grads(f, (X, Z))
    assert seen == {torch.float64, torch.complex128}


def test_captured_float32_is_explained() -> None:
    with pytest.raises(RuntimeError) as caught:
        check_grads(nn.Linear(3, 2), (X,))
    assert any("Capture module.double()" in note for note in caught.value.__notes__)
    check_grads(nn.Linear(3, 2).double(), (X,))


def test_float32_inside_is_compared_at_its_tolerance() -> None:
    check_grads(lambda x: x.float().sin(), (X,))
    check_grads(lambda x: {"a": x.float().exp(), "b": x}, (X,))
    check_grads(lambda x: 1e4 + x.float() ** 2, (X / 100,))
    f = cube(lambda x, g: 3.01 * x**2 * g)
    assert failure(check_grads, lambda x: f(x.float()), (X,), 1).mode == "rev"
    with pytest.raises(
        DtypeError, match=r"output\['y'\] is expected in float64 or float32, got torch.float16"
    ):
        check_grads(lambda x: {"y": x.half()}, (X,))


# What is left as it was.


def test_random_functions_see_the_same_numbers_and_leave_one_run() -> None:
    def f(x: Tensor) -> Tensor:
        return F.dropout(x.sin(), 0.5) * torch.rand_like(x)

    torch.manual_seed(3)
    f(X.double())
    expected = torch.rand(2)
    for check in (
        partial(check_grads, f, (X,)),
        partial(check_vjp, f, partial(ad.vjp, f), (X,)),
        partial(check_jvp, f, partial(ad.jvp, f), (X,)),
    ):
        torch.manual_seed(3)
        check()
        assert_close(torch.rand(2), expected)
    torch.manual_seed(3)
    failure(check_grads, lambda x: f(x) * x.detach(), (X,))
    assert_close(torch.rand(2), expected)


def test_own_random_state_plays_no_part() -> None:
    errors = []
    for state in (1, 2):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        errors.append(failure(check_grads, cube(TWICE["backward"]), (X,), 1, "rev").finite_difference)
        assert torch.equal(torch.get_rng_state(), before)
    assert errors[0] == errors[1]
    assert (
        failure(check_grads, cube(TWICE["backward"]), (X,), 1, "rev", seed=1).finite_difference != errors[0]
    )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_mode_is_irrelevant(mode: Callable[[], Any]) -> None:
    with mode():
        check_grads(of_tree, (TREE,))
        assert failure(check_grads, cube(TWICE["backward"]), (X,), 1, "rev").mode == "rev"
        wrong = cube(lambda x, g: 3 * x.detach() ** 2 * g)
        assert failure(check_grads, wrong, (X,), 2, "rev").order == 2


def test_inputs_stay_as_they_were() -> None:
    tracked = X.double().requires_grad_()
    before = copy.deepcopy([TREE["block"].weight, *TREE["pair"].second])
    check_grads(lambda x, p: of_tree(p)["y"][0] * x, (tracked, TREE))
    assert tracked.grad is None
    assert torch.equal(tracked.detach(), X.double())
    assert_close([TREE["block"].weight, *TREE["pair"].second], before)

    def writes(x: Tensor, count: Tensor) -> Tensor:
        count += 1
        return x.mul_(2).sin()

    x, count = X.double(), torch.tensor(3)
    check_grads(writes, (x, count), 1, "fwd")
    assert torch.equal(x, X.double())
    assert count == 3


# Custom rules.


def test_products_of_transforms_pass() -> None:
    f = lambda x, p: (of_tree(p)["y"][0] * x, {"s": x.sum()})
    args = (randn(3), TREE)
    check_vjp(f, partial(ad.vjp, f), args)
    check_jvp(f, partial(ad.jvp, f), args)
    check_vjp(torch.sin, partial(torch.func.vjp, torch.sin), (X,))
    check_jvp(torch.sin, partial(torch.func.jvp, torch.sin), (X,))


def test_none_stands_for_zero() -> None:
    f = lambda x, y: (x * 2, y.detach() * 0)
    check_vjp(f, lambda x, y: ((x * 2, y * 0), lambda g: (2 * g[0], None)), (X, X))
    check_jvp(f, lambda p, t: ((p[0] * 2, p[1] * 0), (2 * t[0], None)), (X, X))
    assert failure(check_vjp, torch.sin, lambda x: (x.sin(), lambda g: (None,)), (X,)).derivative == 0


def test_products_with_aux() -> None:
    f = lambda x: (x.sin(), "aux")
    check_vjp(f, partial(ad.vjp, f, has_aux=True), (X,), has_aux=True)
    check_jvp(f, partial(ad.jvp, f, has_aux=True), (X,), has_aux=True)


@pytest.mark.parametrize("name", ["f_jvp", "f_vjp"])
def test_value_beside_a_derivative_is_the_functions(name: str) -> None:
    value = lambda x: {"y": x.sin() + torch.tensor([0.0, 0.5, 0.0])}
    f = lambda x: {"y": x.sin()}
    if name == "f_jvp":
        error = failure(check_jvp, f, lambda p, t: (value(*p), {"y": p[0].cos() * t[0]}), (X,))
    else:
        error = failure(check_vjp, f, lambda x: (value(x), lambda g: (x.cos() * g["y"],)), (X,))
    assert (
        f"output['y'] at [1], as {name} gives it, is expected to be f's own -0.841470985, but is -0.341470985"
        in str(error)
    )
    assert error.output == "output['y']"


@pytest.mark.parametrize(
    ("f_jvp", "kind", "match"),
    [
        (
            lambda p, t: p[0].sin(),
            OutputError,
            r"f_jvp is expected to return \(output, tangents_out\), got Tensor",
        ),
        (
            lambda p, t: (p[0].sin(), [t[0]]),
            StructureError,
            "tangents_out is a list of 1, but output is a leaf",
        ),
        (lambda p, t: (p[0].sin(), t[0][:1]), ShapeError, r"tangents_out has shape \(1,\)"),
        (lambda p, t: (p[0].sin()[:1], t[0]), ShapeError, r"value has shape \(1,\)"),
        (lambda p, t: (p[0].sin(), t[0].float()), DtypeError, "tangents_out has dtype torch.float32"),
    ],
)
def test_what_f_jvp_returns_is_checked(f_jvp: Any, kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=f"check_jvp: .*{match}"):
        check_jvp(torch.sin, f_jvp, (X,))


@pytest.mark.parametrize(
    ("pullback", "kind", "match"),
    [
        (lambda g: g, StructureError, "cotangents is a leaf, but args is a tuple of 1"),
        (lambda g: (g[:1],), ShapeError, r"cotangents\[0\] has shape \(1,\), but args\[0\] has shape \(3,\)"),
        (lambda g: (g * 1j,), DtypeError, r"cotangents\[0\] has dtype torch.complex128"),
    ],
)
def test_what_a_pullback_returns_is_checked(pullback: Any, kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=f"check_vjp: .*{match}"):
        check_vjp(torch.sin, lambda x: (x.sin(), pullback), (X,))


# Wrong calls.


@pytest.mark.parametrize(
    ("f", "args", "options", "kind", "match"),
    [
        (torch.sin, X, {}, StructureError, r"to be a tuple, got Tensor.*Write \(x,\)"),
        (
            torch.sin,
            (X.int(),),
            {},
            LeafError,
            r"args has no leaf to differentiate.*args\[0\] of dtype torch.int32",
        ),
        (torch.sin, (), {}, LeafError, "no leaf to differentiate"),
        (lambda x: {"a": 3}, (X,), {}, OutputError, r"unsupported type <class 'int'> at output\['a'\]"),
        (lambda x: None, (X,), {}, OutputError, "non-empty output"),
        (lambda x: [x.int()], (X,), {}, OutputError, r"floating-point or complex Tensors.*at output\[0\]"),
        (torch.sin, (X,), {"has_aux": True}, OutputError, r"\(output, aux\)"),
        (torch.sin, (X,), {"modes": "forward"}, OptionError, "modes are 'fwd', 'rev'. Got 'forward'"),
        (torch.sin, (X,), {"modes": ()}, OptionError, r"Got \(\)"),
        (torch.sin, (X,), {"order": 0}, OptionError, "order is a positive int"),
        (torch.sin, (X,), {"eps": 0.0}, OptionError, "eps is a finite number"),
        (torch.sin, (X,), {"rtol": -1.0}, OptionError, "rtol is a finite number from 0 on, got -1.0"),
        (torch.sin, (X,), {"atol": float("nan")}, OptionError, "atol is a finite number"),
    ],
)
def test_wrong_call_is_explained(
    f: Any, args: Any, options: dict[str, Any], kind: type[Exception], match: str
) -> None:
    with pytest.raises(kind, match=f"(?s)check_grads: .*{match}"):
        check_grads(f, args, **options)


def test_mode_that_torch_lacks_raises_torchs_error() -> None:
    f = lambda x: functional.multi_margin_loss(x, torch.tensor([0, 1]))
    with pytest.raises(NotImplementedError) as caught:
        check_grads(f, (randn(2, 3),), 1)
    assert "check_grads: raised while jvp of f ran." in caught.value.__notes__
    check_grads(f, (randn(2, 3),), 1, "rev")
