"""Gauss-Newton matrices: the Hessian of a loss in the output of a model, between Jacobians of the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor

from autodiff import checks
from autodiff._torch import compiling, fully_unwrapped
from autodiff.core.seeds import generic_vector
from autodiff.operators.derivatives import HessianOperator, JacobianOperator, Options
from autodiff.operators.lazy import keeping, kept_outside_transforms
from autodiff.operators.likelihoods import likelihood_of
from autodiff.operators.linear_map import tree_class
from autodiff.operators.makers import Maker
from autodiff.operators.operator import Operator, Product, Wrapping
from autodiff.types import Argnums, Wrt


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """Options of operators between Jacobians of a model, ``func``, with the loss of its output."""

    loss: Callable[[Any, Any], Tensor]
    convex: bool = False


class BetweenJacobians(Wrapping):
    """J.H @ M @ J for the Jacobian J of a model and a matrix M on its outputs, which depends on the target."""

    options: ModelOptions
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    kind: str

    @property
    def name(self) -> str:
        loss, model = checks.shown_function(self.options.loss), checks.shown_function(self.options.func)
        return f"{self.kind} of {loss} of {model}"

    @property
    def operand(self) -> Product:  # type: ignore[override]
        """The product of the three."""
        return kept_outside_transforms(self, "_operand", self._composed)

    def prepared(self) -> Self:
        operand = self.operand
        operand.prepared()  # refuses arguments that were written
        return keeping(self, "_operand", operand)

    @property
    def cost(self) -> float:
        return 2.0

    @property
    def jacobian(self) -> JacobianOperator:
        """The Jacobian of the model, whose ``value`` is the model's output."""
        return cast("JacobianOperator", self.operand.factors[-1])

    @property
    def aux(self) -> Any:
        """The auxiliary output of the model, with ``has_aux``."""
        return self.jacobian.aux

    def _composed(self) -> Product:
        one, caller = self.options, f"operators.{self.kind}"
        checks.model_and_target(caller, self.args)
        model = Options(one.func, one.argnums, one.has_aux, wrt=one.wrt, caller=caller)
        jacobian = JacobianOperator(model, self.args[:-1], self.kwargs).prepared()
        return Product((jacobian.H, self.between(jacobian.value), jacobian))

    def hessian_of_loss(self, output: Any) -> HessianOperator:
        """The Hessian of the loss in the model's output."""
        loss = Options(self.options.loss, caller=f"operators.{self.kind}: loss")
        return HessianOperator(loss, (output, self.args[-1]), {}).prepared()

    def between(self, output: Any) -> Operator:
        """The matrix on the model's outputs."""
        raise NotImplementedError


def _check_convex(hessian: HessianOperator, loss: str) -> None:
    with torch.no_grad():
        vector = [generic_vector(spec, elsewhere=True) for spec in hessian.domain.leaves]
        one, other = hessian.domain.joined(vector), hessian.domain.joined(hessian.multiply(vector))
        rounding = 64 * torch.finfo(other.dtype).eps * one.norm() * other.norm()
        if fully_unwrapped(one @ other < -rounding).any():
            checks.raise_not_convex("operators.gauss_newton", loss)


@tree_class("args", "kwargs")
@dataclass(eq=False, repr=False)
class GaussNewtonOperator(BetweenJacobians):
    """The Gauss-Newton matrix of a loss of a model at a point."""

    options: ModelOptions
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    kind = "gauss_newton"

    def between(self, output: Any) -> Operator:
        hessian = self.hessian_of_loss(output)
        if self.options.convex and not compiling():
            _check_convex(hessian, checks.shown_function(self.options.loss))
        return hessian

    @property
    def positive(self) -> bool:
        return self.options.convex or likelihood_of(self.options.loss) is not None

    @property
    def value(self) -> Tensor:
        """The loss, of shape ``()``."""
        return self.loss_hessian.value

    @property
    def gradient(self) -> Any:
        """The gradient of the loss, a tree like the domain."""
        return self.jacobian.H @ self.loss_hessian.gradient

    @property
    def loss_hessian(self) -> HessianOperator:
        """The Hessian of the loss in the model's output."""
        return cast("HessianOperator", self.operand.factors[1])


def gauss_newton(
    model: Callable[..., Any],
    loss: Callable[[Any, Any], Tensor],
    argnums: Argnums = 0,
    *,
    has_aux: bool = False,
    convex: bool = False,
    wrt: Wrt = None,
) -> Maker[GaussNewtonOperator]:
    r"""Gauss-Newton matrix of a loss of a model: the Hessian without the second derivatives of the model.

    .. math:: A = J^\top \, \nabla^2 \ell(f)\, J, \qquad f = \operatorname{model}(\theta, x), \quad
        J = \partial f / \partial \theta

    The model runs once; a product is a pushforward, a product with the loss's Hessian in the output, and a pullback.

    >>> import torch
    >>> from autodiff import operators
    >>> model = lambda w, x: torch.exp(w * x)
    >>> squared = lambda output, target: 0.5 * ((output - target) ** 2).sum()
    >>> A = operators.gauss_newton(model, squared)(torch.zeros(2), torch.tensor([1.0, 3.0]), torch.zeros(2))
    >>> A.to_matrix()
    tensor([[1., 0.],
            [0., 9.]])

    Args:
        model: a function that takes all the arguments but the last, and returns a tree of floating tensors.
        loss: ``loss(output, target)``, which returns one real tensor of shape ``()``. The target is the last argument.
        argnums: which arguments of the model to differentiate: a position, a parameter name, or a tuple of them.
        has_aux: whether ``model`` returns ``(output, aux)``; aux is the operator's ``aux``.
        convex: promise that the loss is convex in the output, so that the operator is positive semidefinite. It is
            checked for one vector. Of cross entropy and squared error, as torch has them, it is known.
        wrt: which leaves to differentiate: a pattern of places (``"last.*"``, ``"*bias"``), or a tuple of patterns.

    Returns:
        A function of the model's arguments and the target that returns the operator, which is symmetric. The loss is
        its ``value``, its gradient ``gradient``, and its Hessian in the model's output ``loss_hessian``.

    Raises:
        ArgnumsError: there is no target; or ``argnums`` or ``wrt`` does not fit the call.
        OutputError: the loss is not one real scalar tensor, or the model's output is no tree of floating tensors.
        RuleError: the loss is promised to be convex, and is not.

    N. N. Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", Neural Computation 14
    (2002).
    """
    return Maker(
        GaussNewtonOperator, ModelOptions(model, argnums, has_aux, wrt=wrt, loss=loss, convex=convex)
    )
