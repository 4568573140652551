"""Checks of what the differentiated function returns or raises. Imports `leaves` and `errors`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor

from autodiff.checks.leaves import holomorphic_dtypes
from autodiff.errors import IndependenceError, OutputError, RuleError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from autodiff.core.trees import Spec


def aux_pair(name: str, output: object) -> None:
    if isinstance(output, tuple) and len(output) == 2:
        return
    came = f"a tuple of {len(output)}" if isinstance(output, tuple) else type(output).__name__
    raise OutputError(
        f"{name}: output of function f should be a tuple: (output, aux) if has_aux is True, got {came}. "
        f"Return a pair, or drop has_aux."
    )


def tensor_outputs(
    name: str, leaves: Sequence[Any], path: Callable[[int], str], *, any_dtype: bool = False
) -> None:
    """At least one output, all of them floating or complex tensors."""
    name = {"vjp": "vjp(f, *primals)", "jvp": "jvp(f, primals, tangents)"}.get(name, name)
    if not leaves:
        raise OutputError(
            f"{name}: Expected f to be a function that has non-empty output, got no leaf but None. Return "
            f"a tensor or a tree of tensors."
        )
    for index, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            raise OutputError(
                f"{name}: expected f(*primals) to return only tensors, got unsupported type {type(leaf)} "
                f"at {path(index)}. Return what is not to be differentiated through has_aux=True."
            )
        if not (any_dtype or leaf.is_floating_point() or leaf.is_complex()):
            raise OutputError(
                f"{name}: All outputs of f must be floating-point or complex Tensors, got Tensor with "
                f"dtype {leaf.dtype} at {path(index)}. Convert it, or return it through has_aux=True."
            )


def scalar_output(name: str, spec: Spec, leaves: Sequence[Any], holomorphic: bool = False) -> None:
    """One tensor of shape (), real, or with ``holomorphic`` complex."""
    if len(leaves) != 1 or not spec.is_leaf() or not isinstance(leaves[0], Tensor):
        came = spec.type if not spec.is_leaf() else type(leaves[0] if leaves else None)
        raise OutputError(
            f"{name}: Expected f(*args) to return a Tensor, got {came}. Return the loss alone, and "
            f"anything else through has_aux=True."
        )
    output = leaves[0]
    if output.dim() != 0:
        raise OutputError(
            f"{name}: Expected f(*args) to return a scalar Tensor, got tensor with {output.dim()} dims, "
            f"of shape {tuple(output.shape)}. Maybe you wanted to use the vjp or jacrev APIs instead?"
        )
    if holomorphic:
        holomorphic_dtypes(name, leaves, holomorphic, "outputs")
    elif output.is_complex():
        takes_option = name in ("grad", "value_and_grad", "grad_and_value")
        way_out = "pass holomorphic=True" if takes_option else "use jacrev with holomorphic=True"
        raise OutputError(
            f"{name}: grad can be implicitly created only for real scalar outputs but got {output.dtype}. "
            f"Return .real or .abs(), or {way_out}."
        )


def raise_independent(
    name: str, path_out: str, path_in: str, *, output: int | None = None, primal: int | None = None
) -> NoReturn:
    raise IndependenceError(
        f"{name}: with strict=True, {path_out} is independent of {path_in}: no operation connects them. "
        f"This is not allowed with strict=True; drop it to get zeros.",
        output=output,
        input=primal,
    )


def advise(name: str, error: RuntimeError, phrases: Sequence[str], way_out: str) -> None:
    """Add the way out to an error of torch's whose message holds one of the phrases."""
    note = f"{name}: {way_out}"
    if any(phrase in str(error) for phrase in phrases) and note not in getattr(error, "__notes__", ()):
        error.add_note(note)


def raise_nonlinear_backward(functions: Sequence[str]) -> NoReturn:
    raise RuleError(
        f"The pullback of this function is transposed (by linearize, jacobian, functional.jvp, or where an operation "
        f"has no forward mode), but the backward of {' or '.join(functions)} does not act as a linear function of the "
        f"cotangent. Expected no branch and no bound that depends on the cotangent, a solver that converges for each, "
        f"and no once_differentiable. Write such a backward, or use grad, vjp or jacrev."
    )
