"""The public functions that make operators of functions: each takes a function, and gives what makes the operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar

from autodiff import checks
from autodiff.core.memory import parse_bytes
from autodiff.core.progress import Progress
from autodiff.operators.data import Over
from autodiff.operators.derivatives import HessianOperator, JacobianOperator, Options
from autodiff.operators.operator import Operator
from autodiff.types import Argnums, Wrt

Made_co = TypeVar("Made_co", bound=Operator, covariant=True)


@dataclass(frozen=True)
class Maker(Generic[Made_co]):
    """What makes an operator at the arguments of the function."""

    kind: type[Made_co]
    options: Options

    def __call__(self, *args: Any, **kwargs: Any) -> Made_co:
        """The operator at these arguments; the function runs now, and its graph lives as long as the operator."""
        return self.unprepared(*args, **kwargs).prepared()

    def unprepared(self, *args: Any, **kwargs: Any) -> Made_co:
        """The same; the function runs when it is first needed."""
        return self.kind(self.options, args, kwargs)  # type: ignore[call-arg]

    def for_batch(self, number: int) -> Maker[Made_co]:
        """What makes the operator of one batch of a data set."""
        return replace(self, options=self.options.for_batch(number))

    @property
    def name_over(self) -> str:
        """The name of `over` in messages."""
        return f"operators.over({checks.shown_function(self.options.func)})"

    def over(
        self,
        batches: Any,
        *,
        reduction: Literal["mean", "sum"] = "mean",
        batch_size: int | Literal["auto"] | None = None,
        progress: bool = False,
        memory: int | str | None = None,
        check: bool = True,
    ) -> Over:
        r"""The operator over a data set: each product goes through its batches, and holds the graph of one at a time.

        .. math:: A v = \sum_b \frac{n_b}{N} A_b\, v, \qquad \text{with reduction="sum": } A v = \sum_b A_b\, v

        A batch holds the function's last arguments, as in ``loss(params, *batch)``. Under transforms, and where what
        it was made at requires grad, a product is differentiable to every order; derivatives go through the data set
        again, so that they too hold the graph of one batch.

        >>> import torch
        >>> from autodiff import operators
        >>> loss = lambda w, x, y: ((w * x - y) ** 2).mean()
        >>> x, y = torch.arange(5.0), torch.ones(5)
        >>> A = operators.hessian(loss).over((x, y), batch_size=2)(torch.tensor([1.0]))
        >>> A @ torch.tensor([1.0])  # 2 (0 + 1 + 4 + 9 + 16) / 5
        tensor([12.])
        >>> A.value, A.gradient
        (tensor(3.), tensor([8.]))

        Args:
            batches: a DataLoader, or any other iterable that starts anew each time; or, with ``batch_size``, tensors,
                a tree of which each leaf has its samples in the first dimension. A tuple or list is the arguments of
                a batch, anything else is one argument.
            reduction: ``"mean"`` where the function is a mean over a batch's samples: a batch of :math:`n_b` samples of
                all N counts :math:`n_b / N`. ``"sum"`` where it is a sum. A mean over a part of them, as with
                ``ignore_index`` or class weights, is neither: divide a sum.
            batch_size: how many samples of given tensors make a batch, or ``"auto"``: as many as fit into ``memory``,
                or into half of what is free; on a CPU as many as take 64 MiB, at most.
            progress: show a bar for each product.
            memory: the bytes that recorded batches may take, or a text such as ``"512MiB"``. As many batches as fit are
                recorded once and kept, the first ones first. None keeps no batch, unless there is only one: then the
                memory is that of one batch. Over kept batches a Hessian's product takes about half as long.
            check: refuse a data set or a function that would make products differ: when the operator is made, one
                product is computed twice and compared; for a mean, each batch's is compared with those of its parts.

        Returns:
            A function of the arguments that the batches do not hold, which returns the operator. Its ``value`` and
            ``gradient`` are over the data set, if one batch has them; the first of them goes through it once. Its
            products draw random numbers, such as the order of a DataLoader that shuffles, from the same state each
            time, and leave the generators of torch as they were.

        Raises:
            DataError: the data set is an iterator, exhausted, empty, or of another length than before; a batch holds
                tensors of different numbers of samples; the function is a sum where a mean is promised; it writes to
                tensors that it did not make; or one product is not the same when it is repeated, through dropout,
                shuffling, or BatchNorm in training mode.
            InPlaceError: in a product, if an argument or a given tensor was written in place in the meantime.
            OptionError: an option has another value, ``batches`` is neither tensors nor an iterable of batches, or this
                makes Jacobians, which are not added.
            ArgnumsError: when the operator is made, if the batches hold what is differentiated.
        """
        name = self.name_over
        if issubclass(self.kind, JacobianOperator):
            checks.raise_not_additive(name)
        checks.reduction(name, reduction)
        checks.data_set(name, batches, batch_size, check=check)
        if progress:
            Progress.check(name)
        limit = None if memory is None else parse_bytes(name, memory, left_out="keep no batch")
        return Over(self, batches, reduction, progress, limit, check, batch_size)

    def __repr__(self) -> str:
        return f"<{self.kind.__name__} of {checks.shown_function(self.options.func)}>"


def jacobian(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    has_aux: bool = False,
    holomorphic: bool = False,
    wrt: Wrt = None,
) -> Maker[JacobianOperator]:
    r"""Jacobian of a function as an operator: ``A @ v`` is a pushforward, ``A.H @ u`` a pullback.

    .. math:: A v = J_f(x)\, v, \qquad A^{\mathsf H} u = J_f(x)^{\mathsf H} u

    >>> import torch
    >>> from autodiff import operators
    >>> A = operators.jacobian(lambda x: x[0] * x[1:])(torch.tensor([2.0, 3.0, 5.0]))
    >>> A @ torch.tensor([1.0, 0.0, 1.0])
    tensor([3., 7.])

    Args:
        func: a function of trees that returns a tree of floating or complex tensors.
        argnums: which arguments to differentiate: a position, a parameter name, or a tuple of them.
        has_aux: whether ``func`` returns ``(output, aux)``; aux is the operator's ``aux``.
        holomorphic: differentiate a complex function of complex arguments, with one complex derivative.
        wrt: which leaves to differentiate: a pattern of places (``"last.*"``, ``"*bias"``), or a tuple of patterns.

    Returns:
        A function of ``func``'s arguments that runs it once and returns the operator, from trees like the selected
        argument to trees like the output. The output is its ``value``.

    Raises:
        DtypeError: complex tensors without ``holomorphic``, or real ones with it.
        OutputError: the output is empty, or holds something else than floating or complex tensors.
        ArgnumsError, LeafError: ``argnums`` or ``wrt`` does not fit the call, or selects nothing to differentiate.
    """
    return Maker(JacobianOperator, Options(func, argnums, has_aux, holomorphic, wrt))


def hessian(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    has_aux: bool = False,
    holomorphic: bool = False,
    wrt: Wrt = None,
) -> Maker[HessianOperator]:
    r"""Hessian of a scalar function as an operator: the gradient is recorded once, and pulled back for each product.

    .. math:: A v = \nabla^2 f(x)\, v

    >>> import torch
    >>> from autodiff import operators
    >>> A = operators.hessian(lambda x: (x**3).sum())(torch.tensor([1.0, 2.0]))
    >>> A @ torch.tensor([1.0, 10.0])
    tensor([  6., 120.])
    >>> A.value, A.gradient
    (tensor(9.), tensor([ 3., 12.]))

    Args:
        func: a function of trees that returns one real tensor of shape ``()``, or a complex one with ``holomorphic``.
        argnums: which arguments to differentiate: a position, a parameter name, or a tuple of them.
        has_aux: whether ``func`` returns ``(value, aux)``; aux is the operator's ``aux``.
        holomorphic: differentiate a complex function of complex arguments, with one complex derivative.
        wrt: which leaves to differentiate: a pattern of places (``"last.*"``, ``"*bias"``), or a tuple of patterns.

    Returns:
        A function of ``func``'s arguments that runs it once and returns the operator, which is symmetric, on trees
        like the selected argument. The value of the function is its ``value``, the gradient its ``gradient``.

    Raises:
        DtypeError: complex tensors without ``holomorphic``, or real ones with it.
        OutputError: the output is not one scalar tensor.
        ArgnumsError, LeafError: ``argnums`` or ``wrt`` does not fit the call, or selects nothing to differentiate.

    B. A. Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6 (1994).
    """
    return Maker(HessianOperator, Options(func, argnums, has_aux, holomorphic, wrt))
