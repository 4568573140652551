"""Higher-order operators inside transforms, compared with the Python that they stand for, and by finite differences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch._higher_order_ops import associative_scan, scan
from torch._higher_order_ops import map as hop_map
from torch.nn.attention.flex_attention import flex_attention

import autodiff as ad
from autodiff import functional
from scenarios import assert_close

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
X = torch.tensor([0.5, -0.75, 1.25], dtype=torch.float64)
V = torch.tensor([1.0, 0.5, -2.0], dtype=torch.float64)
W = torch.tensor([0.3, 0.7, -0.4], dtype=torch.float64)
BATCH = torch.stack([X, -V, X.cos()])
YES, THREE = torch.tensor(True), torch.tensor(3)


@pytest.fixture(autouse=True)
def fresh_tracer() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def loop(step: Callable[[Any, Any], Any], carry: Any, xs: Any) -> Any:
    ys = []
    for x in xs:
        carry, y = step(carry, x)
        ys.append(y)
    return carry, torch.stack(ys)


def step(carry: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return (carry * x).sin() + carry, (carry * x * x).cos()


def power(x: Tensor, times: int) -> Tensor:
    for _ in range(times):
        x = (x * W).sin() + x
    return x


# What is written with the operator, and what it means.
CASES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "cond": (
        lambda x: torch.cond(x.sum() > 0, lambda x: x.sin() * x, lambda x: x**3, (x,)).sum(),
        lambda x: torch.where(x.sum() > 0, x.sin() * x, x**3).sum(),
    ),
    "cond of what is computed": (
        lambda x: torch.cond(YES, lambda y: y.sin(), lambda y: y.cos(), (x * x,)).sum(),
        lambda x: (x * x).sin().sum(),
    ),
    "cond with captured tensors": (
        lambda x: torch.cond(YES, lambda y: (x.sin() * y).sum(), lambda y: (y**3 * x).sum(), (W,)),
        lambda x: (x.sin() * W).sum(),
    ),
    "cond of a vector": (
        lambda x: torch.cond(YES, lambda y: y.sin() * y.sum(), lambda y: y.exp(), (x,)),
        lambda x: x.sin() * x.sum(),
    ),
    "while_loop": (
        lambda x: torch.while_loop(
            lambda i, _: i < 3, lambda i, y: (i + 1, (y * W).sin() + y), (torch.tensor(0), x)
        )[1].prod(),
        lambda x: power(x, 3).prod(),
    ),
    "while_loop of no steps": (
        lambda x: torch.while_loop(lambda i, _: i < 0, lambda i, y: (i + 1, y.sin()), (torch.tensor(0), x))[
            1
        ].prod(),
        torch.prod,
    ),
    "scan": (
        lambda x: sum(part.sum() for part in scan(step, x[0], x * 1.0)),
        lambda x: sum(part.sum() for part in loop(step, x[0], x)),
    ),
    "scan of trees, reversed": (
        lambda x: scan(
            lambda c, x: ({"c": step(c["c"], x["x"])[0]}, {"y": step(c["c"], x["x"])[1], "x": x["x"] ** 2}),
            {"c": x[0]},
            {"x": x * 1.0},
            reverse=True,
        )[1]["y"].prod(),
        lambda x: loop(step, x[0], x.flip(0))[1].prod(),
    ),
    "scan with captured tensors": (
        lambda x: scan(lambda c, w: (c * x.sin().sum() + w, c * w), X[0] * 1.0, W)[1].sum(),
        lambda x: loop(lambda c, w: (c * x.sin().sum() + w, c * w), X[0], W)[1].sum(),
    ),
    "map": (
        lambda x: hop_map(lambda row, y: (row * y).sin() * row, W, x).prod(0).sum(),
        lambda x: torch.stack([(row * x).sin() * row for row in W]).prod(0).sum(),
    ),
    "associative_scan": (
        lambda x: associative_scan(torch.mul, x.exp(), 0, combine_mode="generic").sin().sum(),
        lambda x: x.exp().cumprod(0).sin().sum(),
    ),
}


def jvp(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return ad.jvp(f, (x,), (V,))[1]


FIRST: dict[str, Callable[[Any], Any]] = {
    "grad": lambda f: ad.grad(lambda x: f(x).sum())(X),
    "jvp": lambda f: jvp(f, X),
    "linearize": lambda f: ad.linearize(f, X)[1](V),
    "jacrev": lambda f: ad.jacrev(f)(X),
    "jacfwd": lambda f: ad.jacfwd(f)(X),
    "jacobian": lambda f: ad.jacobian(f)(X),
    "functional.jvp": lambda f: functional.jvp(f, X, V),
}
HIGHER: dict[str, Callable[[Any], Any]] = {
    "hvp": lambda f: ad.hvp(lambda x: f(x).sum(), (X,), (V,))[1],
    "hessian": lambda f: ad.hessian(lambda x: f(x).sum())(X),
    "forward over reverse": lambda f: ad.hessian(lambda x: f(x).sum(), mode="forward-over-reverse")(X),
    "reverse over forward": lambda f: ad.grad(lambda x: jvp(f, x).sum())(X),
    "forward over forward": lambda f: jvp(lambda x: jvp(f, x), X),
    "third": lambda f: ad.jacfwd(ad.hessian(lambda x: f(x).sum()))(X),
    "vmap": lambda f: ad.vmap(f)(BATCH),
    "vmap of jvp": lambda f: ad.vmap(lambda x: jvp(f, x))(BATCH),
    "vmap of hessian": lambda f: ad.vmap(ad.hessian(lambda x: f(x).sum()))(BATCH),
    "hessian of a checkpoint": lambda f: ad.hessian(ad.checkpoint(lambda x: f(x).sum()))(X),
    "of what requires grad": lambda f: torch.autograd.grad(
        ad.grad(lambda x: f(x).sum())(x := X.clone().requires_grad_()).sin().sum(), x
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_composition_is_that_of_python(name: str) -> None:
    func, meaning = CASES[name]
    assert_close(func(X), meaning(X))
    for compose in (*FIRST.values(), *HIGHER.values()):
        assert_close(compose(func), compose(meaning))


@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_those_of_finite_differences(name: str) -> None:
    ad.testing.check_grads(CASES[name][0], (X,), order=2)


def test_loops_stop_sample_by_sample() -> None:
    def halvings(x: Tensor) -> Tensor:
        return torch.while_loop(lambda y: (y > 1).all(), lambda y: (y / 2,), (x,))[0]

    samples = torch.tensor([0.5, 3.0, 9.0])
    assert_close(ad.vmap(halvings)(samples), torch.tensor([0.5, 0.75, 0.5625]))
    assert_close(ad.vmap(ad.grad(halvings))(samples), torch.tensor([1.0, 0.25, 0.0625]))


def test_mixed_derivative_by_a_captured_tensor() -> None:
    w = W.clone().requires_grad_()
    slope = ad.grad(lambda x: torch.cond(YES, lambda y: (y**2 * w**3).sum(), lambda y: y.sum(), (x,)))(X)
    slope.sum().backward()
    assert_close(w.grad, 6 * X * W**2)


def test_flexible_attention() -> None:
    q = torch.linspace(-1, 1, 256).reshape(1, 1, 16, 16)

    def func(x: Tensor) -> Tensor:
        return flex_attention(q * x[0], q * x[1], q.sin() * x[2]).square().sum()

    def meaning(x: Tensor) -> Tensor:
        weights = (q * x[0] @ (q * x[1]).mT / 4).softmax(-1)
        return (weights @ (q.sin() * x[2])).square().sum()

    x, v = X.float(), V.float()
    for compose in (
        lambda f: ad.jvp(f, (x,), (v,))[1],
        lambda f: ad.jacfwd(f)(x),
        lambda f: ad.vmap(f)(BATCH.float()),
    ):
        torch.testing.assert_close(compose(func), compose(meaning), rtol=1e-4, atol=1e-3)
    # torch: "FlexAttention does not support backward on CPU"
    with pytest.raises(NotImplementedError, match="CPU"):
        ad.grad(func)(x)


def test_torch_func_is_as_it_was() -> None:
    """Outside of our transforms torch's own kernels run, and raise."""
    func = CASES["cond of what is computed"][0]
    assert_close(func(X), CASES["cond of what is computed"][1](X))
    with pytest.raises(Exception, match=r"."):
        torch.func.jvp(func, (X,), (V,))
