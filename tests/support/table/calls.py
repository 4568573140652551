"""How a transform is called and on what: keywords, names, trees, dtypes, modes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import autodiff
from scenarios import assert_close
from table.row import WRONG, Section

if TYPE_CHECKING:
    from collections.abc import Callable

CALLS = Section("How a transform is called, and on what")
X, T = torch.tensor([[0.5, -1.0, 2.0], [1.0, -2.0, 0.25]], dtype=torch.float64)


@CALLS.row(
    "`functional.jacobian` under `inference_mode`",
    torch="zeros",
    fails=WRONG,
    ours="right",
    issue="pytorch#128264",
)
def functional_jacobian_in_inference_mode(library: Any) -> None:
    with torch.inference_mode():
        jacobian = library.functional.jacobian(torch.sin, X)
    assert_close(jacobian.clone(), torch.diag(X.cos()))


@CALLS.row(
    "`hessian(chunk_size=)`, `jacfwd(chunk_size=)`",
    torch="TypeError",
    fails="TypeError: .*unexpected keyword argument 'chunk_size'",
    ours="works",
    over={
        "hessian": (lambda x: (x**3).sum(), torch.diag(6 * X)),
        "jacfwd": (torch.sin, torch.diag(X.cos())),
    },
    issue="functorch#680",
)
def chunk_size(library: Any, case: tuple[Callable[[Tensor], Tensor], Tensor]) -> None:
    func, expected = case
    transform = library.hessian if func is not torch.sin else library.jacfwd
    assert_close(transform(func, chunk_size=2)(X), expected)


@autodiff.pytree.register_dataclass
@dataclass
class Params:
    w: Tensor
    power: int


LEAVES: dict[str, tuple[Any, Callable[[Any], Tensor], Callable[[Any], Any]]] = {
    "dataclass": (Params(X, 3), lambda p: p.w, lambda p: [p.w, p.power]),
    "None": ([X, None], lambda p: p[0], list),
    "int": ([X, 3], lambda p: p[0], list),
    "str": ([X, "cubic"], lambda p: p[0], list),
    "int tensor": ([X, torch.tensor(3)], lambda p: p[0], list),
}


@CALLS.row(
    "leaves that are a dataclass, None, an int, a str, a tensor of ints",
    torch="RuntimeError or ValueError",
    fails="(ValueError: Thing passed to transform API|RuntimeError: only Tensors of floating point)",
    ours="works; what has no derivative has None in its place",
    over=LEAVES,
    issue="pytorch#99311",
)
def leaves_of_a_tree(library: Any, case: tuple[Any, Any, Any]) -> None:
    tree, tensor_of, parts = case
    gradient = library.grad(lambda p: (tensor_of(p) ** 3).sum())(tree)
    assert_close(parts(gradient), [3 * X**2, None])


@CALLS.row(
    "aux that is a string",
    torch="RuntimeError",
    fails="RuntimeError: Expected tensors, got unsupported type",
    ours="works",
    issue="functorch#333",
)
def aux_of_strings(library: Any) -> None:
    gradient, aux = library.grad(lambda x: ((x**3).sum(), "aux"), has_aux=True)(X)
    assert_close((gradient, aux), (3 * X**2, "aux"))


def product(x: Tensor, w: Tensor) -> Tensor:
    return (x * w**3).sum()


@CALLS.row(
    '`argnums="w"`, and arguments by keyword alone',
    torch="RuntimeError",
    fails="RuntimeError: .*argnum",
    ours="works",
    over={
        "name": (lambda library: library.grad(product, argnums="w")(T, X), 3 * T * X**2),
        "name, by keyword": (lambda library: library.grad(product, argnums="w")(T, w=X), 3 * T * X**2),
        "by keyword": (lambda library: library.grad(product)(x=T, w=X), X**3),
    },
    issue="functorch#70",
)
def arguments_by_name(library: Any, case: tuple[Any, Tensor]) -> None:
    compute, expected = case
    assert_close(compute(library), expected)


@CALLS.row(
    "`jacfwd` of a float32 tensor without dimensions, times a Python float",
    torch="float64",
    fails="AssertionError: The values for attribute 'dtype' do not match",
    ours="float32",
    issue="pytorch#90065",
)
def dtype_of_forward_mode(library: Any) -> None:
    assert_close(library.jacfwd(lambda x: x * 2.5)(torch.tensor(1.0)), torch.tensor(2.5))


@CALLS.row(
    "the first `jvp` of a process under `python -W error`",
    torch="DeprecationWarning, a FutureWarning from 2.15 on",
    fails="(Deprecation|Future)Warning: ",
    ours="no warning",
    alone=("-W", "error"),
)
def first_jvp_without_warnings(library: Any) -> None:
    assert_close(library.jvp(torch.sin, (X,), (T,))[1], X.cos() * T)


def tripled_vjp(library: Any) -> Callable[[Tensor], Tensor]:
    cube = library.custom_vjp(lambda x: x**3)
    cube.defvjp(lambda x: (x**3, x), lambda x, cotangent: (5 * 3 * x**2 * cotangent,))
    return cube


def tripled_jvp(library: Any) -> Callable[[Tensor], Tensor]:
    cube = library.custom_jvp(lambda x: x**3)
    cube.defjvp(lambda primals, tangents: (primals[0] ** 3, 5 * 3 * primals[0] ** 2 * tangents[0]))
    return cube


@CALLS.row(
    "`custom_vjp`, `custom_jvp`: custom derivatives in every transform",
    torch="absent",
    fails="AttributeError: .*has no attribute 'custom_",
    ours="works",
    over={"custom_vjp": tripled_vjp, "custom_jvp": tripled_jvp},
    issue="pytorch#87222",
)
def custom_rules(library: Any, make: Callable[[Any], Callable[[Tensor], Tensor]]) -> None:
    """The rule says five times the derivative, so that one sees whose it is."""
    cube = make(library)

    def func(x: Tensor) -> Tensor:
        return cube(x).sum()

    assert_close(library.grad(func)(X), 15 * X**2)
    assert_close(library.jvp(func, (X,), (T,))[1], (15 * X**2 * T).sum())
    assert_close(library.vmap(library.hessian(func))(X[None])[0], torch.diag(30 * X))
