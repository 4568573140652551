"""What torch.autograd.functional promises at its boundary, and its messages where it refuses.

Provides `Contract`: inputs, ``v`` and outputs checked, connected or cut off as ``create_graph`` says.
Imports `core` for trees; the derivatives themselves are the business of the modules beside it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from autodiff._torch import GradMode, compiling, is_eager
from autodiff.core import trees
from autodiff.core.call import Call, is_differentiable
from autodiff.core.rules import is_tracked
from autodiff.core.tape import inside_derivative
from autodiff.errors import (
    IndependenceError,
    LeafError,
    OptionError,
    OutputError,
    ShapeError,
    StrictModeError,
    StructureError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from autodiff.types import R


_OUTPUT_DETACHED = (
    "Output {output} of the user-provided function does not require gradients. The outputs must be computed "
    "in a differentiable manner from the input when running in strict mode."
)
# The transform that does the same and composes.
_TRANSFORMS = {name: name for name in ("vjp", "jvp", "hvp", "hessian")} | {"vhp": "hvp", "jacobian": "jacrev"}
_ONE_INPUT = "the input to the user-provided function is a single Tensor with a single element."


class Contract:
    """One call: its arguments as the transforms take them, and its results as the caller wants them.

    A tuple of inputs means several arguments; any other tree is one.
    """

    __slots__ = ("args", "create_graph", "must_be_constant", "name", "several", "strict")

    def __init__(self, name: str, inputs: Any, create_graph: bool, strict: bool) -> None:
        # Without a graph the results are constants. A transform around the call would take their derivative for zero.
        self.must_be_constant = not (create_graph or compiling()) and inside_derivative()
        create_graph = create_graph or self.must_be_constant
        self.name, self.create_graph, self.strict = name, create_graph, strict
        self.several = isinstance(inputs, tuple)
        self._refuse_bare_leaves("inputs", inputs)
        self.args: tuple[Any, ...] = (
            tuple([_map(self._entering, arg) for arg in inputs])
            if self.several
            else (_map(self._entering, inputs),)
        )

    # On the way in.

    @property
    def argnums(self) -> tuple[int, ...] | int:
        """All arguments, by position; results are nested as the inputs were."""
        return tuple(range(len(self.args))) if self.several else 0

    def modes(self) -> AbstractContextManager[Any]:
        """Grad mode as ``create_graph`` says, and no inference mode, which would cut every graph."""
        return torch.set_grad_enabled(self.create_graph) if compiling() else GradMode(self.create_graph)

    def _entering(self, leaf: Any) -> Any:
        """An input that is connected to the caller's, or cut off from it."""
        if not is_differentiable(leaf):
            return leaf
        if not compiling() and leaf.is_inference():
            with torch.inference_mode(mode=False):
                leaf = leaf.clone()
        if not self.create_graph:
            return leaf.detach()
        # Without a leaf that requires grad, no result would carry a grad_fn. Inside a transform the
        # transform decides what is tracked.
        if leaf.requires_grad or self.must_be_constant or not is_eager():
            return leaf
        return leaf.detach().requires_grad_()

    def call(self, func: Callable[..., Any]) -> Call:
        """The call, whose output is checked where it is made."""
        return Call(self.name, self.checked(func), self.args, {}, None if self.several else 0, has_aux=False)

    def call_of_scalar(self, func: Callable[..., Any]) -> Call:
        """The call of a function of one number, as a scalar; the output as it is becomes aux."""
        return Call(self.name, self.scalar(func), self.args, {}, None if self.several else 0, has_aux=True)

    def checked(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """``func`` with its output checked where it is made."""

        def returning(*args: Any) -> Any:
            output = func(*args)
            self._refuse_bare_leaves("outputs of the user-provided function", output)
            if self.strict:
                self._refuse_independent_outputs(output)
            return output

        returning.__wrapped__ = func  # type: ignore[attr-defined]
        return returning

    def scalar(self, func: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor]]:
        """``func``, checked to return one number, as a scalar; the output as it is becomes aux."""
        checked = self.checked(func)

        def returning(*args: Any) -> tuple[Tensor, Tensor]:
            output = checked(*args)
            self._refuse_several_numbers(output)
            return (output if output.dim() == 0 else output.squeeze()), output

        returning.__wrapped__ = func  # type: ignore[attr-defined]
        return returning

    def _refuse_bare_leaves(self, what: str, tree: Any) -> None:
        """Legacy's TypeError for what is no tensor and no tree either."""
        if isinstance(tree, Tensor):
            return
        several = isinstance(tree, tuple)
        for index, one in enumerate(tree if several else (tree,)):
            if not isinstance(one, Tensor) and trees.is_leaf(one):
                place = f"value at index {index}" if several else f"given {what}"
                raise LeafError(
                    f"The {what} given to {self.name} must be either a Tensor or a tuple of Tensors but the "
                    f"{place} has type {type(one)}."
                )

    def _refuse_independent_outputs(self, output: Any) -> None:
        for index, leaf in enumerate(trees.leaves(output)):
            if isinstance(leaf, Tensor) and not leaf.requires_grad:
                self.refuse(_OUTPUT_DETACHED, output=index)

    def _refuse_several_numbers(self, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise OutputError(f"The function given to {self.name} should return a single Tensor")
        if output.numel() != 1:
            raise OutputError(
                f"The Tensor returned by the function given to {self.name} should contain a single element"
            )

    # The vector.

    def input_vector(self, v: Any) -> list[Tensor]:
        """The leaves of a vector that is like the inputs."""
        return self.vector(v, self.args if self.several else self.args[0], self.several, _ONE_INPUT)

    def vector(
        self, v: Any, like: Any, several: bool, whose: str, *, of: Callable[[Any], bool] = is_differentiable
    ) -> list[Tensor]:
        """The leaves of ``v`` where ``like`` has leaves of that kind; ones where v may be left out."""
        if v is None:
            only = like[0] if several and len(like) == 1 else like
            if not isinstance(only, Tensor) or only.numel() != 1:
                raise OutputError(f"The vector v can only be None if {whose}")
            return [torch.ones_like(only)]
        if not several and isinstance(v, Tensor) and isinstance(like, Tensor):
            return [self._vector_leaf(v, like, "")] if of(like) else []
        self._refuse_bare_leaves("v", v)
        if several != isinstance(v, tuple):
            # Legacy takes a tensor for a tuple of one, and a tuple of one for a tensor.
            v = (v,) if several else v[0] if len(v) == 1 else v
        if several and len(v) != len(like):
            raise StructureError(f"v is a tuple of invalid length: should be {len(like)} but got {len(v)}.")
        if not several and isinstance(v, tuple):
            raise StructureError("The given v should contain a single Tensor.")
        leaves, spec = trees.flatten(like)
        given = trees.match(spec, v)
        if given is None:
            raise StructureError(
                f"{self.name}: v has structure {trees.structure(v)}, but {spec} is expected. Give one leaf "
                f"for each leaf."
            )
        pairs = zip(given, leaves, strict=True)
        return [
            self._vector_leaf(leaf, model, f"Entry {index} in " if several else "")
            for index, (leaf, model) in enumerate(pairs)
            if of(model)
        ]

    def _vector_leaf(self, leaf: object, model: Tensor, opening: str) -> Tensor:
        if not isinstance(leaf, Tensor):
            raise LeafError(
                f"{self.name}: {opening}v is of type {type(leaf).__name__}, where a tensor of shape "
                f"{tuple(model.shape)} is expected."
            )
        if leaf.shape != model.shape:
            raise ShapeError(f"{opening}v has invalid size: should be {model.size()} but got {leaf.size()}.")
        if leaf.requires_grad and not self.create_graph:
            leaf = leaf.detach()
        return leaf.to(model.dtype) if leaf.dtype != model.dtype and not leaf.is_complex() else leaf

    # On the way out.

    def leaving(self, results: R) -> R:
        """The results; inside a transform that differentiates them, without ``create_graph``, an error instead."""
        if self.must_be_constant and any(map(is_tracked, filter(is_differentiable, trees.leaves(results)))):
            raise OptionError(
                f"functional.{self.name}: the result depends on what a transform around this call differentiates, but "
                f"is a constant without create_graph=True: its derivative would be zero. Expected create_graph=True, "
                f"or autodiff.{_TRANSFORMS[self.name]} in its place; where a constant is meant, torch.no_grad() around "
                f"the call."
            )
        return results

    # Strict.

    def refuse_constants(self, tree: Any, message: str) -> None:
        """Legacy's last strict check: a result that is to be differentiated again has to allow it."""
        leaves = [leaf for leaf in trees.leaves(tree) if leaf is not None]
        for index, leaf in enumerate(leaves):
            if not leaf.requires_grad:
                self.refuse(message, input=index)

    def refuse(self, message: str, *, input: int | None = None, output: int | None = None) -> NoReturn:  # noqa: A002
        """Legacy's words, which number tensors; in other trees a leaf is named by its path."""
        place: Any = input
        if input is not None and not all(isinstance(arg, Tensor) for arg in self.args):
            leaves, spec = trees.flatten(self.args if self.several else self.args[0])
            differentiated = [i for i, leaf in enumerate(leaves) if is_differentiable(leaf)]
            place = trees.paths(spec, "inputs")[differentiated[input]]
        raise StrictModeError(
            message.format(input=place, output=output), output=output, input=input
        ) from None

    def words(self, message: str) -> _LegacyWords:
        """Inside this context, a transform's error about independence comes out in legacy's words."""
        return _LegacyWords(self, message)


class _LegacyWords(AbstractContextManager[None]):
    __slots__ = ("_contract", "_message")

    def __init__(self, contract: Contract, message: str) -> None:
        self._contract, self._message = contract, message

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, IndependenceError) and not isinstance(error, StrictModeError):
            self._contract.refuse(self._message, input=error.input, output=error.output)


def _map(change: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return change(tree)
    leaves, spec = trees.flatten(tree)
    return trees.unflatten(spec, [change(leaf) for leaf in leaves])
