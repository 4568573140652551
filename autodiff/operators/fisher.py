"""Fisher matrices: second moments of the gradients of log-likelihoods, expected under the model or found in data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from autodiff import checks
from autodiff._torch import fully_unwrapped
from autodiff.core import trees
from autodiff.core.call import Call
from autodiff.core.linearization import gradient
from autodiff.core.reverse import record
from autodiff.operators.derivatives import JacobianOperator, Options
from autodiff.operators.gauss_newton import BetweenJacobians, ModelOptions
from autodiff.operators.given import Matrix
from autodiff.operators.lazy import keeping, kept_outside_transforms
from autodiff.operators.likelihoods import likelihood_of
from autodiff.operators.linear_map import tree_class
from autodiff.operators.makers import Maker
from autodiff.operators.operator import Identity, Operator, Product, Wrapping
from autodiff.operators.space import Leaves, Space
from autodiff.operators.written import Arguments
from autodiff.transforms.grad import grad
from autodiff.transforms.vmap import Mapped, vmap
from autodiff.types import Argnums, Wrt

_NAME = "operators.empirical_fisher"
# The gradients of all samples are formed where they hold so few numbers: a heuristic. A product then takes 0.02 to 0.1
# ms instead of 0.5 to 0.7, and both ways take the same time from 2 million numbers on (MLPs with one hidden layer).
_FORMED = 2**20

# From the model's output and a generator to a target that is drawn for it.
Sample = Callable[[Any, torch.Generator], Any]


@dataclass(frozen=True, kw_only=True)
class FisherOptions(ModelOptions):
    """Options of a Fisher matrix: how often targets are drawn, by what, and the seed of the draws."""

    samples: int | None = None
    sample: Sample | None = None
    seed: int = 0

    def for_batch(self, number: int) -> FisherOptions:
        """The options for one batch of a data set: each draws its own numbers, the same ones in every product."""
        return replace(self, seed=(self.seed + 0x9E3779B97F4A7C15 * number) % 2**63)


@tree_class("args", "kwargs")
@dataclass(eq=False, repr=False)
class FisherOperator(BetweenJacobians):
    """The Fisher matrix of a model at a point."""

    options: FisherOptions
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    kind = "fisher"
    positive = True

    def between(self, output: Any) -> Operator:
        if self.options.samples is None:
            return self.hessian_of_loss(output)
        checks.untraced_call("operators.fisher")
        return self._sampled(output, self.options.samples)

    def _sampled(self, output: Any, samples: int) -> Operator:
        """The second moment of the loss's gradients in the output, at targets that are drawn."""
        one, target = self.options, self.args[-1]
        space = Space.of(output, "operators.fisher", "output")
        generator = torch.Generator(space.device).manual_seed(one.seed)
        likelihood = likelihood_of(one.loss)
        draws = []
        with torch.no_grad():
            for _ in range(samples):
                if one.sample is not None:
                    drawn = one.sample(output, generator)
                else:
                    assert likelihood is not None  # `fisher` has seen to that
                    drawn = likelihood.draw(output, target, generator)
                draws.append(drawn)
        gradients = vmap(grad(one.loss), (None, 0), fallback="loop")(output, _stacked(draws))
        found = trees.leaves(gradients)
        leaves = [found[i] for i in space.positions]
        if one.sample is not None or likelihood is None:
            terms: int | Tensor = _count_of_mean(one.loss, output, drawn)
        else:
            terms = likelihood.terms(output, target) if likelihood.mean else 1
        return SecondMoment(tuple(leaves), terms / samples, space)


def _count_of_mean(loss: Callable[[Any, Any], Tensor], output: Any, target: Any) -> int:
    """The number of samples where the loss is a mean over them, 1 where it is a sum."""
    leaves = [leaf for leaf in trees.leaves((output, target)) if isinstance(leaf, Tensor)]
    counts = {leaf.shape[0] if leaf.dim() else None for leaf in leaves}
    (count,) = counts if len(counts) == 1 else (None,)
    if count is None:
        checks.raise_not_over_samples("operators.fisher", checks.shown_function(loss))
    if count <= 1:
        return 1
    with torch.no_grad():
        parts = []
        for part in (slice(0, 1), slice(1, None)):
            output_part, target_part = (_narrowed(tree, part) for tree in (output, target))
            parts.append(loss(output_part, target_part))
        whole, (first, rest) = loss(output, target), parts
        tolerance = 64 * count * torch.finfo(whole.dtype).eps * (first.abs() + rest.abs())
        is_sum = fully_unwrapped((whole - first - rest).abs() <= tolerance).all()
        is_mean = fully_unwrapped(
            (count * whole - first - (count - 1) * rest).abs() <= count * tolerance
        ).all()
    if not is_sum and not is_mean:
        checks.raise_not_over_samples("operators.fisher", checks.shown_function(loss))
    return 1 if is_sum else count


def _stacked(draws: Sequence[Any]) -> Any:
    """Trees with the draws in front of each tensor."""
    first, spec = trees.flatten(draws[0])
    columns = zip(*map(trees.leaves, draws), strict=True)
    return trees.unflatten(
        spec,
        [
            torch.stack(column) if isinstance(one, Tensor) else one
            for one, column in zip(first, columns, strict=True)
        ],
    )


def _narrowed(tree: Any, part: slice) -> Any:
    leaves, spec = trees.flatten(tree)
    return trees.unflatten(spec, [leaf[part] if isinstance(leaf, Tensor) else leaf for leaf in leaves])


@tree_class("gradients", "factor")
@dataclass(eq=False, repr=False)
class SecondMoment(Operator):
    """A sum of outer products of gradients with themselves, for each sample on its own.

    # gradients: [draws, samples, ...] for each leaf of the space, whose first dimension counts the samples
    """

    gradients: tuple[Tensor, ...]
    factor: Any
    space: Space

    name = "second moment"
    symmetric = positive = True

    @property
    def domain(self) -> Space:
        return self.space

    @property
    def codomain(self) -> Space:
        return self.space

    def multiply(self, vectors: Leaves, *, adjoint: bool = False, count: int | None = None) -> Leaves:
        del adjoint
        vectors = self.space.dense(vectors, count)
        # weights: [..., draws, samples]
        weights = self.factor * sum(
            torch.einsum(
                "snd,...nd->...sn",
                flat,
                vector.reshape((*vector.shape[: count is not None], *flat.shape[1:])),
            )
            for flat, vector in zip(self._flat, vectors, strict=True)
        )
        products = [torch.einsum("snd,...sn->...nd", flat, weights) for flat in self._flat]
        return [product.reshape(vector.shape) for product, vector in zip(products, vectors, strict=True)]

    @property
    def _flat(self) -> list[Tensor]:
        return [g.reshape((*g.shape[:2], g[0, 0].numel() if g.numel() else 0)) for g in self.gradients]


def fisher(
    model: Callable[..., Any],
    loss: Callable[[Any, Any], Tensor],
    samples: int | None = None,
    argnums: Argnums = 0,
    *,
    sample: Sample | None = None,
    generator: torch.Generator | None = None,
    has_aux: bool = False,
    wrt: Wrt = None,
) -> Maker[FisherOperator]:
    r"""Fisher matrix of a model whose loss is a negative log-likelihood.

    .. math:: A = \frac 1 N \sum_n J_n^\top \, \mathbb E_{y \sim p(y \mid f_n)}
        \bigl[ \nabla \ell(f_n, y) \, \nabla \ell(f_n, y)^\top \bigr] \, J_n

    For a loss that is a sum over samples, the factor 1/N is left out. For cross entropy and the squared error it is
    exact: there the expectation is the loss's Hessian in the output. With ``samples``, it is the mean over so many
    targets drawn from the model's prediction, whose gradients are never formed.

    >>> import torch
    >>> from autodiff import operators
    >>> A = operators.fisher(lambda w, x: w * x, torch.nn.functional.mse_loss)
    >>> A(torch.tensor(1.0), torch.tensor([1.0, 3.0]), torch.zeros(2)).to_matrix()  # 2 (1 + 9) / 2
    tensor([[10.]])

    Args:
        model: a function that takes all the arguments but the last, and returns a tensor or a tree of them.
        loss: ``loss(output, target)``, which returns one real tensor of shape ``()``, a mean or a sum over samples.
            Without ``sample`` it is one of ``cross_entropy``, ``mse_loss`` and ``binary_cross_entropy_with_logits`` of
            torch.nn.functional, a partial of one with keywords, or its module, without weights. A squared error is
            the likelihood of a Gaussian of variance 1/2.
        samples: how often targets are drawn; None computes the expectation. Drawn targets are constants: a derivative
            of the operator is that at these targets, and no estimate of the derivative of the expectation.
        argnums: which arguments of the model to differentiate: a position, a parameter name, or a tuple of them.
        sample: ``sample(output, generator)`` draws a target for any other loss; first dimensions count the samples.
        generator: from which the seed of the draws is taken; None takes torch's global one. An operator draws the same
            targets each time that it is evaluated.
        has_aux: whether ``model`` returns ``(output, aux)``; aux is the operator's ``aux``.
        wrt: which leaves to differentiate: a pattern of places (``"last.*"``, ``"*bias"``), or a tuple of patterns.

    Returns:
        A function of the model's arguments and the target that returns the operator, which is positive semidefinite.

    Raises:
        OptionError: the loss is none of those that are known, and there is no ``sample``; or ``samples`` is not a
            positive int.
        ArgnumsError: there is no target; or ``argnums`` or ``wrt`` does not fit the call.
        OutputError: the loss is neither a mean nor a sum over samples, or the model's output is no tree of tensors.

    F. Kunstner, L. Balles and P. Hennig, "Limitations of the empirical Fisher approximation" (NeurIPS 2019).
    """
    if samples is not None:
        checks.positive_int("operators.fisher", "samples", samples, "None computes the expectation.")
    if sample is not None and samples is None:
        checks.raise_samples_missing("operators.fisher")
    if sample is None and likelihood_of(loss) is None:
        checks.raise_unknown_likelihood("operators.fisher", checks.shown_function(loss))
    seed = 0 if samples is None else int(torch.randint(2**62, (), generator=generator))
    options = FisherOptions(
        model, argnums, has_aux, wrt=wrt, loss=loss, samples=samples, sample=sample, seed=seed
    )
    return Maker(FisherOperator, options)


@dataclass(frozen=True, kw_only=True)
class EmpiricalOptions(Options):
    """Options of an empirical Fisher matrix."""

    in_dims: Any
    reduction: Literal["mean", "sum"]


@tree_class("args", "kwargs")
@dataclass(eq=False, repr=False)
class EmpiricalFisherOperator(Wrapping):
    """The second moment of the gradients of the losses of samples."""

    options: EmpiricalOptions
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    positive = True

    @property
    def name(self) -> str:
        return f"empirical_fisher of {checks.shown_function(self.options.func)}"

    @property
    def _evaluated(self) -> tuple[Tensor, Any, Product, Arguments]:
        return kept_outside_transforms(self, "_evaluation", self._evaluate)

    def prepared(self) -> Self:
        return keeping(self, "_evaluation", self._current)

    @property
    def _current(self) -> tuple[Tensor, Any, Product, Arguments]:
        """What was evaluated, refused where an argument was written in place since."""
        evaluated = self._evaluated
        evaluated[3].refuse_written(self.name)
        return evaluated

    @property
    def values(self) -> Tensor:
        """The losses of the samples, of shape ``[N]``."""
        return self._evaluated[0]

    @property
    def aux(self) -> Any:
        """The auxiliary output of all samples, with ``has_aux``."""
        return self._evaluated[1]

    @property
    def operand(self) -> Product:  # type: ignore[override]
        """The product of the gradients' matrix with its transpose."""
        return self._current[2]

    def _evaluate(self) -> tuple[Tensor, Any, Product, Arguments]:
        one = self.options
        in_dims = one.in_dims
        if in_dims is None:
            shared = one.argnums if isinstance(one.argnums, tuple) else (one.argnums,)
            in_dims = tuple(None if i in shared else 0 for i in range(len(self.args)))
        space = Space.of_arguments(self._call(one.func, self.args, self.kwargs))
        count = Mapped(one.func, in_dims, 0, self.args, self.kwargs, _NAME).size
        if count * space.size <= _FORMED:
            values, aux, gradients = vmap(self._of_sample, in_dims)(*self.args, **self.kwargs)
            columns: Operator = Matrix(space.joined_columns(gradients, count), Space.of(values), space)
        else:
            losses = Options(vmap(one.func, in_dims), one.argnums, one.has_aux, wrt=one.wrt, caller=_NAME)
            jacobian = JacobianOperator(losses, self.args, self.kwargs).prepared()
            values, columns = jacobian.value, jacobian.H
            aux = jacobian.aux if one.has_aux else None
        checks.losses_of_samples(_NAME, values)
        scale = 1 / max(count, 1) if one.reduction == "mean" else 1
        product = Product((columns, scale * Identity(columns.domain), columns.H))
        return values, aux, product, Arguments(self.args, self.kwargs)

    def _call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        return Call(_NAME, func, args, kwargs, self.options.argnums, self.options.has_aux, self.options.wrt)

    def _of_sample(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Any, list[Tensor]]:
        """The loss of a sample, its aux and its gradient."""
        call = self._call(self.options.func, args, kwargs)
        tape = record(call.evaluate, call.primals, origin=call.func)
        slope = gradient(call)(tape)
        return tape.outputs[0], call.aux(tape.aux) if call.has_aux else None, slope


def empirical_fisher(
    per_sample_loss: Callable[..., Any],
    in_dims: Any = None,
    argnums: Argnums = 0,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    has_aux: bool = False,
    wrt: Wrt = None,
) -> Maker[EmpiricalFisherOperator]:
    r"""Empirical Fisher matrix: the mean over samples of outer products of their gradients.

    .. math:: A = \frac 1 N \sum_n \nabla \ell_n \, \nabla \ell_n^\top

    A product is a pushforward and a pullback through the losses of all samples. Their gradients are formed only where
    they hold fewer than a million numbers together, which is faster there.

    >>> import torch
    >>> from autodiff import operators
    >>> loss = lambda w, x, y: 0.5 * (w * x - y) ** 2
    >>> A = operators.empirical_fisher(loss)(torch.tensor(1.0), torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0]))
    >>> A.to_matrix()  # (1^2 + 4^2) / 2
    tensor([[8.5000]])

    Args:
        per_sample_loss: a function of one sample that returns one real tensor of shape ``()``.
        in_dims: which dimension of each leaf of the arguments counts the samples: an int, a tree that begins the
            structure of the arguments, with None for what all samples share, or a dict by names. None shares what is
            differentiated, and takes dimension 0 of all else.
        argnums: which arguments to differentiate: a position, a parameter name, or a tuple of them.
        reduction: ``"mean"``, or ``"sum"`` without the factor 1/N.
        has_aux: whether the function returns ``(loss, aux)``; aux of all samples is the operator's ``aux``.
        wrt: which leaves to differentiate: a pattern of places (``"last.*"``, ``"*bias"``), or a tuple of patterns.

    Returns:
        A function of all samples' arguments that returns the operator, which is positive semidefinite. The losses
        of the samples are its ``values``, of shape ``[N]``.

    Raises:
        OptionError: ``reduction`` has no documented value.
        OutputError: the function does not return one scalar tensor for each sample.
        BatchError: ``in_dims`` does not fit the arguments.
        ArgnumsError, LeafError: ``argnums`` or ``wrt`` does not fit the call, or selects nothing to differentiate.
    """
    checks.choice(_NAME, "reduction", reduction, ("mean", "sum"))
    options = EmpiricalOptions(
        per_sample_loss, argnums, has_aux, wrt=wrt, in_dims=in_dims, reduction=reduction
    )
    return Maker(EmpiricalFisherOperator, options)
