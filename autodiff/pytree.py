"""Classes as trees, trees as vectors, Jacobians as matrices. Builds on `checks` and `core`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor

from autodiff import checks
from autodiff.core import trees
from autodiff.core.call import is_differentiable

C = TypeVar("C", bound=type)

__all__ = ["from_matrix", "ravel", "register", "register_dataclass", "to_matrix"]


def register(
    cls: type,
    flatten: Callable[[Any], tuple[Sequence[Any], Any]],
    unflatten: Callable[[Any, Sequence[Any]], Any],
) -> None:
    """Make a class a container of trees, for autodiff, optree's "torch" namespace and torch.func.

    Args:
        cls: the class.
        flatten: takes an object to ``(children, metadata)``; children are trees, metadata is anything
            hashable that says what else the object is.
        unflatten: takes ``(metadata, children)`` to an object. It must accept children of any kind, so
            it should not validate them.

    Raises:
        ValueError: the class is registered already.

    >>> import torch
    >>> from autodiff import grad
    >>> class Line:
    ...     def __init__(self, slope, offset):
    ...         self.slope, self.offset = slope, offset
    >>> register(Line, lambda l: ((l.slope, l.offset), None), lambda _, children: Line(*children))
    >>> loss = lambda line: line.slope * 3.0 + line.offset
    >>> gradient = grad(loss)(Line(torch.tensor(2.0), torch.tensor(1.0)))
    >>> gradient.slope, gradient.offset
    (tensor(3.), tensor(1.))
    """
    trees.register(cls, flatten, unflatten)


def register_dataclass(cls: C) -> C:
    """Make a dataclass or an attrs class a container of trees, one child for each field.

    Usable as a decorator, above ``@dataclass``. Fields that hold no tensors pass through transforms as
    they are. A gradient is an object of the same class, made without ``__init__`` and ``__post_init__``,
    since it holds None where a field has no gradient.

    Args:
        cls: a dataclass or a class made by attrs.

    Returns:
        The class.

    Raises:
        TypeError: the class is neither.
        ValueError: the class is registered already.

    >>> import torch
    >>> from dataclasses import dataclass
    >>> from autodiff import grad
    >>> @register_dataclass
    ... @dataclass
    ... class Line:
    ...     slope: torch.Tensor
    ...     name: str
    >>> grad(lambda line: line.slope**2)(Line(torch.tensor(3.0), "first"))
    Line(slope=tensor(6.), name=None)
    """
    if "__dataclass_fields__" in vars(cls):  # not inherited: an undecorated subclass has other fields
        fields = tuple(field.name for field in dataclasses.fields(cls))
    elif hasattr(cls, "__attrs_attrs__"):
        fields = tuple(field.name for field in cls.__attrs_attrs__)
    else:
        raise TypeError(
            f"register_dataclass: expected a dataclass or an attrs class, got {cls!r}. Put it above "
            f"@dataclass, or use autodiff.pytree.register(cls, flatten, unflatten) for any other class."
        )

    def flatten(obj: Any) -> tuple[Sequence[Any], Any]:
        return tuple(getattr(obj, field) for field in fields), None

    def unflatten(_: Any, children: Sequence[Any]) -> Any:
        # Past __init__, __post_init__ and a frozen class's __setattr__: the children may be None.
        obj: Any = object.__new__(cls)
        for field, child in zip(fields, children, strict=True):
            object.__setattr__(obj, field, child)
        return obj

    trees.register(cls, flatten, unflatten, fields)
    return cls


def ravel(tree: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """All numbers of a tree's floating and complex leaves in one vector, and the way back.

    Args:
        tree: any tree with at least one floating or complex tensor.

    Returns:
        ``(vector, unravel)``: the vector has shape ``[P]`` and the leaves' common dtype;
        ``unravel(vector)`` gives a tree like the first one, leaves in their own shape and dtype, other
        leaves as they were. Both are differentiable.

    Raises:
        LeafError: there is no floating or complex tensor.
        ShapeError: ``unravel`` is given a tensor of another shape than ``[P]``.

    >>> import torch
    >>> vector, unravel = ravel({"w": torch.ones(2), "b": torch.zeros(())})
    >>> vector
    tensor([1., 1., 0.])
    >>> unravel(2 * vector)
    {'w': tensor([2., 2.]), 'b': tensor(0.)}
    """
    leaves, spec = trees.flatten(tree)
    where, tensors = zip(*_differentiable("ravel", tree, "tree"), strict=True)
    dtype = tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    vector = torch.cat([tensor.reshape(-1).to(dtype) for tensor in tensors])
    sizes, shapes, dtypes = zip(*((t.numel(), t.shape, t.dtype) for t in tensors), strict=True)

    def unravel(vector: Tensor) -> Any:
        checks.shape("unravel", "vector", vector, (sum(sizes),), "one number for each number of the tree")
        filled = list(leaves)
        parts = zip(where, vector.split(sizes), shapes, dtypes, strict=True)
        for position, part, shape, wanted in parts:
            filled[position] = part.reshape(shape).to(wanted)
        return trees.unflatten(spec, filled)

    return vector, unravel


def to_matrix(jacobian: Any, inputs: Any) -> Tensor:
    """A Jacobian or Hessian of trees as one matrix.

    Rows run over the output's numbers and columns over the inputs', both in tree order, leaf by leaf.

    Args:
        jacobian: what :func:`autodiff.jacrev`, :func:`autodiff.jacfwd` or :func:`autodiff.hessian` of a
            function returned. Wrap the call in :func:`autodiff.vmap` where there is a batch in front.
        inputs: the argument it was taken of (a tuple of them for a tuple of ``argnums``).

    Returns:
        A tensor of shape ``[M, N]``: M numbers in the output, N in the inputs' floating and complex
        leaves, those that ``wrt`` left out aside. For a Hessian of a scalar function M = N.

    Raises:
        StructureError, ShapeError: the Jacobian does not belong to these inputs.

    >>> import torch
    >>> from autodiff import hessian
    >>> params = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}
    >>> to_matrix(hessian(lambda p: p["b"] * p["w"].square().sum())(params), params)
    tensor([[6., 0., 2.],
            [0., 6., 4.],
            [2., 4., 0.]])
    """
    columns, in_spec = _differentiable("to_matrix", inputs, "inputs"), trees.structure(inputs)
    rows: list[Tensor] = []
    for number, row in enumerate(trees.subtrees(jacobian, in_spec)):
        blocks = trees.leaves(row)
        if all(block is None for block in blocks):
            continue
        if not rows:
            # Leaves that ``wrt`` left out have no block in any row.
            columns = [(at, leaf) for at, leaf in columns if blocks[at] is not None] or columns
        for position, leaf in columns:
            checks.jacobian_block("to_matrix", f"row {number} of jacobian", blocks[position], leaf.shape)
        strips = [
            blocks[position].reshape(_rows_of(blocks[position], leaf), leaf.numel())
            for position, leaf in columns
        ]
        rows.append(strips[0] if len(strips) == 1 else torch.cat(strips, dim=1))
    if not rows:
        checks.raise_jacobian_of_other_inputs("to_matrix", trees.structure(jacobian), in_spec)
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def from_matrix(matrix: Tensor, outputs: Any, inputs: Any) -> Any:
    """A matrix as the nested Jacobian that :func:`to_matrix` came from.

    Args:
        matrix: shape ``[M, N]``.
        outputs: a tree like the function's output, whose leaves have its shapes; for a Hessian of a
            scalar function, the inputs again.
        inputs: the argument that the Jacobian was taken of.

    Returns:
        A tree like ``outputs`` that holds at every leaf a tree like ``inputs``, with blocks of shape
        ``(*out_shape, *in_shape)``, and None where the inputs hold no floating or complex tensor.

    Raises:
        ShapeError: the matrix does not have one row for each output number and one column for each input number.

    >>> import torch
    >>> from_matrix(torch.eye(2), {"y": torch.zeros(2)}, (torch.zeros(()), torch.zeros(1)))
    {'y': (tensor([1., 0.]), tensor([[0.],
            [1.]]))}
    """
    columns = _differentiable("from_matrix", inputs, "inputs")
    rows = _differentiable("from_matrix", outputs, "outputs")
    heights, widths = [leaf.numel() for _, leaf in rows], [leaf.numel() for _, leaf in columns]
    expected = (sum(heights), sum(widths))
    checks.shape(
        "from_matrix", "matrix", matrix, expected, "a row for each output number, a column for each input"
    )
    in_spec, out_spec = trees.structure(inputs), trees.structure(outputs)
    outer: list[Any] = [None] * out_spec.num_leaves
    for (row, output), strip in zip(rows, matrix.split(heights), strict=True):
        inner: list[Any] = [None] * in_spec.num_leaves
        for (column, leaf), block in zip(columns, strip.split(widths, dim=1), strict=True):
            inner[column] = block.reshape((*output.shape, *leaf.shape))
        outer[row] = trees.unflatten(in_spec, inner)
    return trees.unflatten(out_spec, outer)


def _rows_of(block: Tensor, leaf: Tensor) -> int:
    # Not -1, which is ambiguous where the leaf holds no numbers.
    return prod(block.shape[: block.dim() - leaf.dim()])


def _differentiable(name: str, tree: Any, root: str) -> list[tuple[int, Tensor]]:
    """The differentiable leaves of a tree with their positions."""
    leaves, spec = trees.flatten(tree)
    found = [(i, leaf) for i, leaf in enumerate(leaves) if is_differentiable(leaf)]
    if not found:
        checks.raise_no_differentiable_leaf(name, spec, leaves, root)
    return found
