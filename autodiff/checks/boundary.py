"""Floor 1: every check at the boundary. The first parameter is the public name the user called.

Each message has four beats: the name and the leaf's path, what was expected, what came, the way
out. Words by which torch.func's own messages are recognised are kept. Imports `trees` and `errors`.
"""

from __future__ import annotations

from types import GeneratorType
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor, nn

from autodiff._torch import compiling, stop_tracing
from autodiff.core import trees
from autodiff.errors import (
    ArgnumsError,
    DtypeError,
    IndependenceError,
    LeafError,
    OptionError,
    OutputError,
    ShapeError,
    StructureError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from autodiff.core.trees import Spec

# Those that differentiate one scalar once.
_FIRST = ("grad", "value_and_grad", "grad_and_value")
_PASSIVE_KINDS = (bool, int, float, complex, str, bytes, type(None))


# Options.


def chunk_size(name: str, size: object) -> None:
    if size is None or size == "auto" or (isinstance(size, int) and not isinstance(size, bool) and size > 0):
        return
    rule = "chunk_size should be None or" if name == "vmap" else "`chunk_size` should be"
    raise OptionError(
        f"{name}: {rule} greater than 0. (got {size!r}) None takes everything in one batch, a smaller int "
        f"takes less memory, and 'auto' learns what fits."
    )


def positive(name: str, option: str, value: object, meaning: str) -> None:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return
    raise OptionError(f"{name}: {option} is a positive int, got {value!r}. {meaning}")


def eigenvalue_count(name: str, k: int, size: int) -> None:
    if k > size:
        raise OptionError(
            f"{name}: k={k} eigenvalues are asked for, where the Hessian has {size}: one for each number of the "
            f"differentiated leaves. Pass a smaller k, or differentiate more leaves by argnums or wrt."
        )


def not_traced(name: str) -> None:
    if compiling():
        stop_tracing(
            f"{name}: torch.compile traces the call. Expected a call outside of what is compiled: it measures memory, "
            f"which no tracer can. Compile with fullgraph=False, which runs it uncompiled, or compile vmap of the "
            f"function, and call that in chunks of one size."
        )


def randomness(name: str, value: str) -> None:
    allowed(name, "randomness", value, ("error", "different", "same"), opening="Only allowed values")


def allowed(name: str, option: str, value: object, choices: Sequence[str | None], opening: str = "") -> None:
    if value in choices:
        return
    listed = ", ".join(repr(choice) for choice in choices)
    raise OptionError(f"{name}: {opening or 'the allowed values'} for {option} are {listed}. Got {value!r}.")


def argnums(name: str, value: object) -> None:
    """Only ints, names and non-empty tuples of them, each once."""
    picks = value if isinstance(value, tuple) else (value,)
    if isinstance(value, tuple) and not value:
        raise ArgnumsError(
            f"{name}: argnums must be non-empty, got (). Name at least one argument, as in argnums=0."
        )
    for pick in picks:
        if isinstance(pick, bool) or not isinstance(pick, int | str):
            several = "argnum must be int" if picks is value else "argnums must be int or Tuple[int, ...]"
            raise ArgnumsError(
                f"{name}: {several}, or the name of a parameter, got: {type(pick)}. Write argnums=0, "
                f"argnums='w' or argnums=(0, 'w')."
            )


def wrt(name: str, value: object) -> None:
    """A pattern, or a non-empty tuple of them."""
    patterns = value if isinstance(value, tuple) else (value,)
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise OptionError(
            f"{name}: wrt is a pattern of leaves' places, or a tuple of patterns, got {value!r}. Write "
            f"wrt='last.*' or wrt=('0.weight', '2.*')."
        )


def wrt_matches(name: str, pattern: str, places: Sequence[str]) -> NoReturn:
    shown = ", ".join(map(repr, places[:8])) + (", ..." if len(places) > 8 else "")
    raise ArgnumsError(
        f"{name}: wrt={pattern!r} matches no leaf that can be differentiated. Their places are {shown}. "
        f"A * stands for any text, as in wrt='last.*'."
    )


def argnum_in_range(name: str, pick: int, count: int) -> NoReturn:
    raise ArgnumsError(
        f"{name}: Got argnum={pick}, but only {count} positional inputs. argnums counts positional "
        f"arguments from 0; a keyword argument is picked by its name, as in argnums='w'."
    )


def argname_known(name: str, pick: str, known: Sequence[str]) -> NoReturn:
    listed = ", ".join(repr(one) for one in known) or "none"
    raise ArgnumsError(
        f"{name}: argnums={pick!r} names no argument of this call. The function's arguments are "
        f"{listed}. Pass the argument, or correct the name."
    )


def argnums_unique(name: str, value: object) -> NoReturn:
    raise ArgnumsError(
        f"{name}: argnums elements must be unique, got {value}. Each argument is differentiated once; "
        f"remove the repetition."
    )


# Leaves.


def no_differentiable_leaf(name: str, spec: Spec, leaves: Sequence[Any], root: str) -> NoReturn:
    """Name the leaf that came in place of a floating or complex tensor."""
    opening = (
        f"{name}: {root} has no leaf to differentiate. Expected at least one Tensor of floating-point or "
        f"complex dtype"
    )
    if not leaves:
        raise LeafError(
            f"{opening}, got an empty {spec.type.__name__ if spec.type else 'tree'}. "
            f"Pass a tensor, or pick another argument with argnums."
        )
    where = trees.paths(spec, root)
    for path, leaf in zip(where, leaves, strict=True):
        if not isinstance(leaf, Tensor) and not isinstance(leaf, _PASSIVE_KINDS):
            unregistered(name, path, leaf)
    path, leaf = where[0], leaves[0]
    if isinstance(leaf, Tensor):
        raise LeafError(
            f"{opening}, got {path} of dtype {leaf.dtype}: only Tensors of floating point and complex "
            f"dtype can require gradients. Convert it, as in {path}.float(), or pick another argument "
            f"with argnums."
        )
    raise LeafError(
        f"{opening}, got {path} of type {type(leaf).__name__}: Thing passed to transform API must be "
        f"Tensor, or a tree of them, and {root} to only contain Tensors where it is differentiated. Write "
        f"torch.tensor({leaf!r}) for a number."
    )


def unregistered(name: str, path: str, leaf: object) -> NoReturn:
    cls = type(leaf)
    opening = (
        f"{name}: {path} is of class {cls.__qualname__}, where a tensor is needed: Thing passed to transform API "
        f"must be Tensor"
    )
    if isinstance(leaf, nn.Module):
        raise LeafError(
            f"{opening}, or a tree of them. Differentiate dict(module.named_parameters()), and call the module "
            f"with them by autodiff.functional_call."
        )
    if isinstance(leaf, GeneratorType):
        raise LeafError(f"{opening}, or a tree of them. Make a dict or a list of what it generates.")
    if hasattr(leaf, "__array_interface__"):
        raise LeafError(f"{opening}, or a tree of them. Write torch.from_numpy({path}).")
    raise LeafError(
        f"{opening}, or a container that is registered as a tree. Register it once: "
        f"autodiff.pytree.register_dataclass({cls.__qualname__}), or autodiff.pytree.register("
        f"{cls.__qualname__}, flatten, unflatten) for a class that is no dataclass."
    )


def complex_pairing(name: str, tensors: Sequence[Tensor], holomorphic: bool | None, kind: str) -> None:
    """Real everywhere by default, complex everywhere with ``holomorphic=True``, anything with None."""
    if holomorphic is None:
        return
    for position, tensor in enumerate(tensors):
        if holomorphic and not tensor.is_complex():
            raise DtypeError(
                f"{name}: holomorphic=True expects all {kind} to be complex, got {tensor.dtype} at "
                f"flattened {kind[:-1]} idx: {position}. Convert it to complex, or drop holomorphic."
            )
        if not holomorphic and tensor.is_complex():
            raise DtypeError(
                f"{name}: Expected all {kind} to be real but received complex tensor at flattened "
                f"{kind[:-1]} idx: {position}. For a holomorphic function pass holomorphic=True; "
                f"otherwise use torch.view_as_real of it."
            )


def real(name: str, tensors: Sequence[Tensor], path: Callable[[int], str]) -> None:
    for position, tensor in enumerate(tensors):
        if tensor.is_complex():
            raise DtypeError(
                f"{name}: expected real tensors wherever it differentiates, got {path(position)} of dtype "
                f"{tensor.dtype}. Pass torch.view_as_real of it, or leave it out by argnums or wrt."
            )


# Outputs of the differentiated function.


def has_aux_pair(name: str, output: object) -> None:
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
    if output.is_complex() != holomorphic:
        if holomorphic:
            complex_pairing(name, leaves, holomorphic, "outputs")
        way_out = "pass holomorphic=True" if name in _FIRST else "use jacrev with holomorphic=True"
        raise OutputError(
            f"{name}: grad can be implicitly created only for real scalar outputs but got {output.dtype}. "
            f"Return .real or .abs(), or {way_out}."
        )


def depends(
    name: str, path_out: str, path_in: str, *, output: int | None = None, primal: int | None = None
) -> NoReturn:
    raise IndependenceError(
        f"{name}: with strict=True, {path_out} is independent of {path_in}: no operation connects them. "
        f"The output of f is independent of the inputs. This is not allowed with strict=True; drop it "
        f"to get zeros.",
        output=output,
        input=primal,
    )


# Tangents and cotangents.


def tuple_of_primals(name: str, primals: object) -> None:
    if not isinstance(primals, tuple):
        raise StructureError(
            f"{name}: Expected primals to be a tuple, got {type(primals).__name__}. E.g. it should be "
            f"valid to call f(*primals). Write (x,) for one primal x."
        )


def same_structure(name: str, kind: str, spec: Spec, tree: Any, reference: str) -> list[Any]:
    """The leaves of ``tree`` in the order of ``spec``; an error where the structures differ."""
    leaves = trees.match(spec, tree)
    if leaves is not None:
        return leaves
    came = trees.structure(tree)
    raise StructureError(
        f"{name}: Expected pytree structure of {kind} to be the same as pytree structure of {reference} (to "
        f"have the same python structure, or the same argspec as the {reference}), but "
        f"{trees.difference(came, kind, spec, reference)} Give one of the {kind} for each leaf of {reference}. "
        f"{kind}: {came}, {reference}: {spec}"
    )


def like_leaf(name: str, kind: str, path: str, value: object, model_path: str, model: Tensor) -> None:
    """A tangent or cotangent is a tensor of its leaf's shape and dtype."""
    rule = f"A {kind} must match its {'output' if kind == 'cotangent' else 'primal'} leaf for leaf."
    if not isinstance(value, Tensor):
        if isinstance(value, _PASSIVE_KINDS):
            raise LeafError(
                f"{name}: {path} is of type {type(value).__name__}, but {model_path} is a tensor of "
                f"shape {tuple(model.shape)}. {rule} Write torch.zeros_like({model_path}) for zero."
            )
        unregistered(name, path, value)
    if value.shape != model.shape:
        opening = "Mismatch in shape: " if kind == "cotangent" else _flattened(name, "shape")
        raise ShapeError(
            f"{name}: {opening}{path} has shape {tuple(value.shape)}, but {model_path} has shape "
            f"{tuple(model.shape)}. {rule}"
        )
    if value.dtype != model.dtype and not _castable(kind, value.dtype, model.dtype):
        opening = "" if kind == "cotangent" else _flattened(name, "dtype")
        raise DtypeError(
            f"{name}: {opening}{path} has dtype {value.dtype}, but {model_path} has dtype {model.dtype}. {rule} "
            f"Convert it, as in {path}.to({model_path}.dtype)."
        )


def _flattened(name: str, what: str) -> str:
    """How torch.func.linearize begins; the other transforms name the leaf at once."""
    return f"a tangent in flattened pytree doesn't match the {what}: " if name == "linearize" else ""


def _castable(kind: str, came: torch.dtype, wanted: torch.dtype) -> bool:
    # The engine converts a real cotangent to its output's real dtype, and programs rely on it. A
    # tangent is not converted by torch: a float64 tangent of a float32 primal gives float64 results.
    return kind == "cotangent" and came.is_floating_point and wanted.is_floating_point


def advise(name: str, error: RuntimeError, words: Sequence[str], way_out: str) -> None:
    """Add the way out to an error of torch's that is known by its words."""
    note = f"{name}: {way_out}"
    if any(word in str(error) for word in words) and note not in getattr(error, "__notes__", ()):
        error.add_note(note)


# Matrices.


def shape(name: str, path: str, tensor: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if tensor.shape != expected:
        raise ShapeError(
            f"{name}: {path} has shape {tuple(tensor.shape)}, but {expected} is expected: {meaning}. "
            f"Reshape it, or pass the tree that it belongs to."
        )


def block(name: str, path: str, value: object, in_shape: Sequence[int]) -> None:
    """A block of a Jacobian ends in its input's shape."""
    if isinstance(value, Tensor) and tuple(value.shape[value.dim() - len(in_shape) :]) == tuple(in_shape):
        return
    came = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
    raise ShapeError(
        f"{name}: {path} has {came}, but a block that ends in the input's shape {tuple(in_shape)} is "
        f"expected. Pass the inputs that the Jacobian was taken of, and wrap the call in vmap for a batch."
    )


def jacobian_of_inputs(name: str, came: Spec, expected: Spec) -> NoReturn:
    raise StructureError(
        f"{name}: jacobian has structure {came}, which holds no tree like the inputs, {expected}. Pass "
        f"the inputs that the Jacobian was taken of: a tuple of them for a tuple of argnums."
    )
