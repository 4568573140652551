"""Jacobians by rows (reverse mode) or by columns (forward mode)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal, NamedTuple, Self, Unpack, overload

import torch
from torch import Tensor

from autodiff import checks
from autodiff._torch import compiling, traced_inline_only
from autodiff.core.batch import without_row_batch
from autodiff.core.call import Call, Lift, wraps
from autodiff.core.chunks import Sizes, sizes_for
from autodiff.core.forward import push
from autodiff.core.linearization import Linearization, linearize
from autodiff.core.products import (
    Blocks,
    Product,
    blocks_by_rows,
    blocks_from_columns,
    products,
    restricted_to_outputs,
)
from autodiff.core.randomness import remember_randomness
from autodiff.core.reverse import conjugated
from autodiff.core.seeds import StandardBasis, size_of, zeros
from autodiff.core.tape import FlatFunction
from autodiff.types import (
    A,
    Argnums,
    ChunkSize,
    JacfwdOptions,
    JacobianMode,
    JacobianOptions,
    JacrevOptions,
    P,
    Randomness,
    WithAux,
    Wrt,
)


class RowRange(NamedTuple):
    """Some rows of one output's blocks, from row ``first`` on: ``blocks[k]`` is ``[rows, *in_shape]``."""

    output: int
    first: int
    blocks: list[Tensor]


@dataclass(kw_only=True, eq=False)
class Jacobian:
    """A function of ``func``'s arguments that gives its Jacobian, and how it is made.

    ``holomorphic=None`` takes any dtypes, with torch's own convention.
    """

    name: str
    func: Callable[..., Any]
    argnums: Argnums = 0
    mode: JacobianMode = "reverse"
    has_aux: bool = False
    chunk_size: ChunkSize = None
    holomorphic: bool | None = False
    strict: bool = False
    randomness: Randomness = "same"
    wrt: Wrt = None

    def public(self) -> Self:
        """Itself, with its options checked and its function's name and signature."""
        checks.chunk_size(self.name, self.chunk_size)
        checks.randomness(self.name, self.randomness)
        return wraps(self.func)(self)  # type: ignore[return-value]

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """As a method: the instance is the first argument."""
        return self if instance is None else MethodType(self, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The Jacobian at these arguments."""
        call = self.call(args, kwargs)
        blocks, aux = self.blocks(call)
        nested = self.nested(call, blocks)
        return (nested, call.aux(aux)) if self.has_aux else nested

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """One call, its arguments checked."""
        call = Call(self.name, self.func, args, kwargs, self.argnums, self.has_aux, self.wrt)
        checks.holomorphic_dtypes(self.name, call.primals, self.holomorphic, "inputs")
        return call

    def nested(self, call: Call, blocks: Sequence[Sequence[Any]]) -> Any:
        """The blocks in trees.

        # J: [tree(out), tree(in), *out_shape, *in_shape]
        """
        return call.like_output([call.like_arguments(of_output) for of_output in blocks])

    @traced_inline_only
    def blocks(self, call: Call) -> tuple[Blocks, list[Any]]:
        """A block for each output and primal, and the leaves of aux."""
        if self.mode == "forward" and not compiling():
            sizes = sizes_for(self.chunk_size, call.primals)
            return self.by_columns(call, self.flat_function(call), call.primals, sizes)
        linearized = self.linearization(call)
        return self.by_rows(call, linearized), linearized.aux

    def some_rows(self, call: Call, start: int, stop: int) -> tuple[list[Tensor], list[RowRange]]:
        """The outputs, and rows ``start`` to ``stop``, counted over all outputs, by pulls."""
        linearized = self.linearization(call)
        row_ranges, offset, pull = [], 0, self.puller(linearized)
        for position, output in enumerate(linearized.outputs):
            first, last = max(start - offset, 0), min(stop - offset, output.numel())
            if first < last:
                pull_one = restricted_to_outputs(
                    pull, slice(position, position + 1), len(linearized.outputs), is_last=False
                )
                sizes = linearized.batchable(sizes_for(self.chunk_size, call.primals))
                rows = products(pull_one, StandardBasis([output], first, last), sizes)
                pairs = zip(rows, call.primals, strict=True)
                blocks = [
                    zeros(like, (last - first, *like.shape)) if one is None else one for one, like in pairs
                ]
                row_ranges.append(RowRange(position, first, blocks))
            offset += output.numel()
        return linearized.outputs, row_ranges

    # What a Hessian does in its own way.

    def flat_function(self, call: Call) -> FlatFunction:
        """The function whose Jacobian this is, between leaves, which checks its outputs."""

        def checked(leaves: Sequence[Tensor], lift: Lift | None) -> tuple[list[Any], list[Any]]:
            outputs, aux = call.evaluate(leaves, lift)
            self.check_outputs(call, outputs)
            return outputs, aux

        return checked

    def linearization(self, call: Call) -> Linearization:
        """That function, evaluated once."""
        linearized = linearize(
            self.flat_function(call), call.primals, higher_order=self.mode != "reverse", origin=call.func
        )
        self.check_dependence(call, linearized, call.path_of_output)
        return linearized

    def path_of_output(self, call: Call, position: int) -> str:
        """The place of one of its outputs, written as code."""
        return call.path_of_output(position)

    # The two ways.

    def by_rows(self, call: Call, linearized: Linearization) -> Blocks:
        """The blocks from one evaluation, by pulls, or by the pullback's pullback."""
        return self.blocks_of(linearized, call.primals, self.mode, sizes_for(self.chunk_size, call.primals))

    def blocks_of(
        self, linearized: Linearization, primals: Sequence[Tensor], mode: JacobianMode, sizes: Sizes
    ) -> Blocks:
        """As `by_rows`: "auto" takes whichever needs fewer products. Traced, forward mode is here too; see `push`."""
        fewer_inputs = mode == "auto" and size_of(primals) < size_of(linearized.outputs)
        if mode == "forward" or (fewer_inputs and not linearized.is_differentiable_once()):
            pushforward = linearized.jvp()

            def pushed(tangents: Sequence[Tensor | None], *, last: bool) -> list[Tensor | None]:
                del last
                return pushforward(tangents)

            return blocks_from_columns(
                products(pushed, StandardBasis(primals), sizes), linearized.outputs, primals
            )
        if size_of(linearized.outputs) > 1:
            sizes = linearized.batchable(sizes)
        return blocks_by_rows(self.puller(linearized), linearized, primals, sizes)

    def by_columns(
        self, call: Call, flat: FlatFunction, primals: Sequence[Tensor], sizes: Sizes
    ) -> tuple[Blocks, list[Any]]:
        """The blocks by pushes through the function, which runs once for every chunk, and the leaves of aux."""
        outputs: list[Any] = []
        aux: list[Any] = []

        def pushed(tangents: Sequence[Tensor], *, last: bool) -> list[Tensor | None]:
            del last
            if rewind is not None:
                rewind()
            result = push(flat, primals, tangents)
            for position, tangent in enumerate(result.tangents if self.strict else ()):
                if tangent is None:
                    path = self.path_of_output(call, position)
                    checks.raise_independent(call.name, path, call.root, output=position)
            outputs[:] = result.outputs
            aux[:] = without_row_batch(result.aux, tangents)
            return result.tangents

        draws: Randomness = "error" if self.randomness == "error" else "same"
        # Every chunk has to see the same random numbers.
        rewind = None if self.chunk_size is None else remember_randomness()
        columns = products(pushed, StandardBasis(primals), sizes, draws)
        return blocks_from_columns(columns, outputs, primals), aux

    def puller(self, linearized: Linearization) -> Product:
        """A pull through a function that has been evaluated."""

        def pull(cotangents: Sequence[Tensor | None], *, last: bool) -> list[Tensor | None]:
            pulled = linearized.vjp(cotangents, last=last)
            return conjugated(pulled) if self.holomorphic else pulled

        return pull

    def check_outputs(self, call: Call, outputs: Sequence[Any]) -> None:
        """Check the outputs of the call."""
        checks.tensor_outputs(call.name, outputs, call.path_of_output, any_dtype=self.holomorphic is None)
        checks.holomorphic_dtypes(call.name, outputs, self.holomorphic, "outputs")

    def check_dependence(
        self, call: Call, linearized: Linearization, path_of_output: Callable[[int], str]
    ) -> None:
        """If strict, raise for the first output that no operation connects to a primal."""
        outputs = linearized.outputs
        for position in range(len(outputs) if self.strict else 0):
            cotangents = [torch.ones_like(one) if at == position else None for at, one in enumerate(outputs)]
            for index, pulled in enumerate(linearized.vjp(cotangents, create_graph=False)):
                if pulled is None:
                    paths = path_of_output(position), call.path_of_primal(index)
                    checks.raise_independent(call.name, *paths, output=position, primal=index)


@overload
def jacrev(
    func: WithAux[P, A], argnums: Argnums = 0, *, has_aux: Literal[True], **kw: Unpack[JacrevOptions]
) -> WithAux[P, A]: ...
@overload
def jacrev(
    func: Callable[P, Any], argnums: Argnums = 0, *, has_aux: bool = False, **kw: Unpack[JacrevOptions]
) -> Callable[P, Any]: ...
def jacrev(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    has_aux: bool = False,
    chunk_size: ChunkSize = None,
    holomorphic: bool = False,
    strict: bool = False,
    wrt: Wrt = None,
    _preallocate_and_copy: bool = False,
) -> Callable[..., Any]:
    r"""Jacobian by reverse mode: one evaluation, then a pull for every number of the output.

    .. math:: \operatorname{jacrev}(f)(x)_{ij} = \partial f_i / \partial x_j

    >>> import torch
    >>> jacrev(lambda x: x[0] * x[1:])(torch.tensor([2.0, 3.0, 5.0]))
    tensor([[3., 2., 0.],
            [5., 0., 2.]])

    Args:
        func: a function of trees that returns a tree of floating or complex tensors.
        argnums: which arguments to differentiate: a position, a parameter name, or a tuple of them.
        has_aux: whether ``func`` returns ``(output, aux)``.
        chunk_size: how many rows to pull in one batch; None pulls all, 1 pulls row by row without vmap, ``"auto"``
            learns from the first rows how many fit in half of the free memory. The function runs once in any case.
        holomorphic: differentiate a complex function of complex arguments, with one complex derivative.
        strict: raise where an output does not depend on a leaf, instead of giving zeros.
        wrt: which leaves to differentiate: a pattern of places (``"last.*"``, ``"*bias"``), or a tuple of patterns.

    Returns:
        A function of ``func``'s arguments that returns a tree like the output, holding at every leaf a
        tree like the selected argument (a tuple of trees for a tuple of ``argnums``), holding at every
        floating leaf a block of shape ``(*out_shape, *in_shape)`` and the input's dtype, and None at
        other leaves. With ``has_aux`` it returns ``(jacobian, aux)``.

    Raises:
        OptionError: ``chunk_size`` is not a positive int, ``"auto"`` or None.
        DtypeError: complex tensors without ``holomorphic``, or real ones with it.
        OutputError: the output is empty, or holds something else than floating or complex tensors.
        ArgnumsError, LeafError: ``argnums`` or ``wrt`` does not fit the call, or selects nothing to differentiate.
        IndependenceError: ``strict`` and an output is independent of a leaf.
    """
    # Code that wraps torch.func.jacrev passes it on. Chunks are always preallocated here.
    del _preallocate_and_copy
    return Jacobian(
        name="jacrev",
        func=func,
        argnums=argnums,
        mode="reverse",
        has_aux=has_aux,
        chunk_size=chunk_size,
        holomorphic=holomorphic,
        strict=strict,
        wrt=wrt,
    ).public()


@overload
def jacfwd(
    func: WithAux[P, A], argnums: Argnums = 0, *, has_aux: Literal[True], **kw: Unpack[JacfwdOptions]
) -> WithAux[P, A]: ...
@overload
def jacfwd(
    func: Callable[P, Any], argnums: Argnums = 0, has_aux: bool = False, **kw: Unpack[JacfwdOptions]
) -> Callable[P, Any]: ...
def jacfwd(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    has_aux: bool = False,
    *,
    randomness: Randomness = "same",
    chunk_size: ChunkSize = None,
    holomorphic: bool = False,
    strict: bool = False,
    wrt: Wrt = None,
) -> Callable[..., Any]:
    r"""Jacobian by forward mode: a push for every number of the input, all in one evaluation.

    .. math:: \operatorname{jacfwd}(f)(x)_{ij} = \partial f_i / \partial x_j

    >>> import torch
    >>> jacfwd(lambda x: x[0] * x[1:])(torch.tensor([2.0, 3.0, 5.0]))
    tensor([[3., 2., 0.],
            [5., 0., 2.]])

    Args:
        func: a function of trees that returns a tree of floating or complex tensors.
        argnums: which arguments to differentiate: a position, a parameter name, or a tuple of them.
        has_aux: whether ``func`` returns ``(output, aux)``.
        randomness: ``"same"`` lets ``func`` draw random numbers; one draw serves all columns, also with
            ``"different"``, since all columns are derivatives of one function. ``"error"`` forbids it.
        chunk_size: how many columns to push in one batch; None pushes all, ``"auto"`` learns how many
            fit. The function runs once for every chunk, with the same random numbers.
        holomorphic: differentiate a complex function of complex arguments, with one complex derivative.
        strict: raise where an output does not depend on the selected arguments.
        wrt: which leaves to differentiate: a pattern of places (``"last.*"``, ``"*bias"``), or a tuple of patterns.

    Returns:
        What :func:`jacrev` returns, with blocks of the output's dtype.

    Raises:
        OptionError: ``chunk_size`` is not a positive int, ``"auto"`` or None, or ``randomness`` is unknown.
        DtypeError: complex tensors without ``holomorphic``, or real ones with it.
        OutputError: the output is empty, or holds something else than floating or complex tensors.
        ArgnumsError, LeafError: ``argnums`` or ``wrt`` does not fit the call, or selects nothing to differentiate.
        IndependenceError: ``strict`` and an output is independent of the arguments.
    """
    return Jacobian(
        name="jacfwd",
        func=func,
        argnums=argnums,
        mode="forward",
        has_aux=has_aux,
        chunk_size=chunk_size,
        holomorphic=holomorphic,
        strict=strict,
        randomness=randomness,
        wrt=wrt,
    ).public()


@overload
def jacobian(
    func: WithAux[P, A], argnums: Argnums = 0, *, has_aux: Literal[True], **kw: Unpack[JacobianOptions]
) -> WithAux[P, A]: ...
@overload
def jacobian(
    func: Callable[P, Any], argnums: Argnums = 0, *, has_aux: bool = False, **kw: Unpack[JacobianOptions]
) -> Callable[P, Any]: ...
def jacobian(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    mode: JacobianMode = "auto",
    has_aux: bool = False,
    chunk_size: ChunkSize = None,
    holomorphic: bool = False,
    strict: bool = False,
    wrt: Wrt = None,
) -> Callable[..., Any]:
    r"""Jacobian by the mode that needs fewer products.

    .. math:: \operatorname{jacobian}(f)(x)_{ij} = \partial f_i / \partial x_j

    ``"auto"`` evaluates ``func`` once and then takes whichever is smaller: a pull for each number of
    the output, or, by the pullback of the pullback, a push for each number of the input.

    >>> import torch
    >>> jacobian(lambda t: torch.stack([t, t**2, t**3]))(torch.tensor(2.0))
    tensor([ 1.,  4., 12.])

    Args:
        func: a function of trees that returns a tree of floating or complex tensors.
        argnums: which arguments to differentiate: a position, a parameter name, or a tuple of them.
        mode: ``"auto"``, ``"reverse"`` (:func:`jacrev`) or ``"forward"`` (:func:`jacfwd`).
        has_aux: whether ``func`` returns ``(output, aux)``.
        chunk_size: how many rows or columns to compute in one batch; ``"auto"`` learns how many fit.
        holomorphic: differentiate a complex function of complex arguments, with one complex derivative.
        strict: raise where an output does not depend on a leaf, instead of giving zeros.
        wrt: which leaves to differentiate: a pattern of places (``"last.*"``, ``"*bias"``), or a tuple of patterns.

    Returns:
        What :func:`jacrev` returns.

    Raises:
        OptionError: ``mode`` is unknown, or ``chunk_size`` is not a positive int, ``"auto"`` or None.
        DtypeError: complex tensors without ``holomorphic``, or real ones with it.
        OutputError: the output is empty, or holds something else than floating or complex tensors.
        ArgnumsError, LeafError: ``argnums`` or ``wrt`` does not fit the call, or selects nothing to differentiate.
        IndependenceError: ``strict`` and an output is independent of a leaf.
    """
    checks.choice("jacobian", "mode", mode, ("auto", "reverse", "forward"))
    return Jacobian(
        name="jacobian",
        func=func,
        argnums=argnums,
        mode=mode,
        has_aux=has_aux,
        chunk_size=chunk_size,
        holomorphic=holomorphic,
        strict=strict,
        wrt=wrt,
    ).public()
