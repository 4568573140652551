"""Compiled functions inside transforms: right in every mode, in every disguise, in this thread alone."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import glu

import autodiff as ad
from autodiff import _torch, functional
from autodiff.errors import BatchedPullError
from every_transform import FIRST, SECOND, Every, T, W, cubic
from scenarios import assert_close

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
X = torch.tensor([0.5, -0.75, 1.25, 0.25], dtype=torch.float64)
V = torch.tensor([1.0, 0.5, -2.0, 0.75], dtype=torch.float64)
BATCH = torch.stack([X, V, X.sin()])


@pytest.fixture(autouse=True)
def fresh_tracer() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def through_det(x: Tensor) -> Tensor:
    return torch.linalg.det(x.view(2, 2) @ x.view(2, 2).T + torch.eye(2, dtype=x.dtype))


def through_cumprod(x: Tensor) -> Tensor:
    return x.cumprod(0).square().sum()


def through_glu(x: Tensor) -> Tensor:
    return glu(x, 0).square().sum()


def through_eigvals(x: Tensor) -> Tensor:
    return torch.linalg.eigvals(x.view(2, 2)).abs().square().sum()


def jvp(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return ad.jvp(f, (x,), (V,))[1]


COMPOSITIONS: dict[str, Callable[[Any], Any]] = {
    "jvp": lambda f: jvp(f, X),
    "jacfwd": lambda f: ad.jacfwd(f)(X),
    "linearize": lambda f: ad.linearize(f, X)[1](V),
    "hvp": lambda f: ad.hvp(f, (X,), (V,))[1],
    "hessian": lambda f: ad.hessian(f)(X),
    "forward over reverse": lambda f: ad.hessian(f, mode="forward-over-reverse")(X),
    "reverse over forward": lambda f: ad.grad(lambda x: jvp(f, x))(X),
    "forward over forward": lambda f: jvp(lambda x: jvp(f, x), X),
    "vmap": lambda f: ad.vmap(f)(BATCH),
    "vmap of jvp": lambda f: ad.vmap(lambda x: jvp(f, x))(BATCH),
    "vmap of grad": lambda f: ad.vmap(ad.grad(f))(BATCH),
    "vmap of hessian": lambda f: ad.vmap(ad.hessian(f))(BATCH),
    "functional.hessian": lambda f: functional.hessian(f, X),
    "functional.jvp": lambda f: functional.jvp(f, X, V),
    "grad of what requires grad": lambda f: torch.autograd.grad(
        ad.grad(f)(x := X.clone().requires_grad_()).sin().sum(), x
    ),
    "hessian of a checkpoint": lambda f: ad.hessian(ad.checkpoint(f))(X),
    "per_sample": lambda f: ad.per_sample(ad.hessian(f))(BATCH),
}


@pytest.mark.parametrize("func", [through_det, through_cumprod, through_glu, through_eigvals])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_every_composition_is_that_of_the_function_itself(func: Any, backend: str) -> None:
    """``func`` is compared with finite differences in tests/ops; here with itself, after calls elsewhere."""
    compiled = torch.compile(func, backend=backend, fullgraph=True)
    compiled(X)
    for compose in COMPOSITIONS.values():
        assert_close(compose(compiled), compose(func))


@pytest.mark.parametrize("every", [*FIRST, *SECOND], ids=lambda every: every.name)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_every_transform_gives_its_closed_form(every: Every, backend: str) -> None:
    compiled = torch.compile(cubic, backend=backend, fullgraph=True)
    assert_close(every.apply(compiled, T), every.expected(T, W))
    samples = torch.stack([T, 1.5 * T])
    expected = torch.stack([every.expected(sample, W) for sample in samples])
    assert_close(ad.vmap(lambda x: every.apply(compiled, x))(samples), expected)


class Product(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumprod(0).sum()


def compiled_in_place() -> nn.Module:
    module = Product()
    module.compile(backend="aot_eager")
    return module


def compiled_inside() -> Callable[[Tensor], Tensor]:
    compiled = torch.compile(Product(), backend="aot_eager")
    return lambda x: 1 * compiled(x)


def compiled_twice() -> Callable[[Tensor], Tensor]:
    once = torch.compile(torch.cumprod, backend="aot_eager")
    return torch.compile(lambda x: once(x, 0).sum(), backend="aot_eager")


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.compile(Product(), backend="aot_eager"),
        compiled_in_place,
        compiled_inside,
        compiled_twice,
    ],
    ids=["module", "in place", "inside another function", "twice"],
)
def test_whatever_is_compiled_and_wherever(make: Callable[[], Callable[[Tensor], Tensor]]) -> None:
    func, x = make(), torch.tensor([2.0, 3.0])  # x + x y, whose Hessian is [[0, 1], [1, 0]]
    for _ in range(2):
        assert_close(ad.jvp(func, (x,), (torch.tensor([1.0, 10.0]),))[1], torch.tensor(24.0))
        assert_close(ad.hessian(func)(x), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        assert_close(ad.grad(func)(x), torch.tensor([4.0, 2.0]))


def test_gradient_outside_of_transforms_stays_compiled() -> None:
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(cubic, backend=backend)
    ad.hessian(compiled)(T)
    ad.vmap(compiled)(torch.stack([T, T]))
    assert not graphs
    ad.grad(compiled)(T)
    assert len(graphs) == 1
    ad.hessian(compiled)(T)
    with torch.compiler.set_stance("fail_on_recompile"):
        ad.grad(compiled)(T)


def test_other_threads_stay_compiled() -> None:
    calls, inside, go_on = [], threading.Event(), threading.Event()

    def backend(graph: Any, _: Any) -> Any:
        return lambda *args: calls.append(threading.get_ident()) or graph(*args)

    def waiting(x: Tensor) -> Tensor:
        inside.set()
        go_on.wait(60)
        return compiled(x)

    compiled = torch.compile(torch.sin, backend=backend)
    compiled(X)
    tangents: list[Tensor] = []
    thread = threading.Thread(target=lambda: tangents.append(ad.jvp(waiting, (X,), (V,))[1]))
    thread.start()
    assert inside.wait(60)
    compiled(X)
    go_on.set()
    thread.join()
    assert calls == [threading.get_ident()] * 2
    assert_close(tangents, [X.cos() * V])


def test_stance_of_the_process_goes_on_to_count() -> None:
    compiled = torch.compile(through_glu, backend="eager")
    ad.jvp(compiled, (X,), (V,))
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_close(jvp(compiled, X), jvp(through_glu, X))
        with pytest.raises(RuntimeError, match="fail_on_recompile"):
            compiled(X)
    assert_close(compiled(X), through_glu(X))


def test_nothing_is_left_behind_by_an_exception() -> None:
    def raising(x: Tensor) -> Tensor:
        raise ValueError(x.shape)

    for attempt in (ad.grad, ad.hessian, ad.jacfwd, ad.vmap, lambda f: ad.vmap(ad.hessian(f))):
        with pytest.raises(ValueError, match="Size"):
            attempt(torch.compile(raising, backend="eager"))(BATCH)
    assert not _torch.compiled.is_uncompiled()


def test_batch_of_cotangents_of_a_compiled_pullback_is_refused() -> None:
    _, pullback = ad.vjp(torch.compile(torch.sin, backend="aot_eager"), X)
    with pytest.raises(BatchedPullError, match=r"torch\.compile"):
        ad.vmap(pullback)(BATCH)
