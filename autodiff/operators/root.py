"""Decorators around any solver, which make its answer differentiable in what it was asked about.

Provides `root`, `fixed_point` and `minimum`: an answer is known by a condition. Builds on `answers`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from autodiff.operators.answers import FixedPoint, Minimum, ZeroResidual, differentiable
from autodiff.operators.implicit import Solver
from autodiff.types import P, R


def root(
    residual: Callable[..., Any], *, solve: Solver | None = None, has_aux: bool = False, check: bool = True
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    r"""Make the roots that a solver finds differentiable, by the implicit function theorem.

    .. math:: F(x^*(\theta), \theta) = 0 \quad\Rightarrow\quad
        \frac{\partial x^*}{\partial \theta} =
        -\left(\frac{\partial F}{\partial x}\right)^{-1} \frac{\partial F}{\partial \theta}

    The solver is called with detached tensors, without grad mode and, unless ``vmap`` batches them, outside of all
    transforms: it may be a loop of any length, or SciPy. Its answer is differentiated by the residual alone, in both
    modes and at every order. A derivative takes one linear system with the Jacobian at the answer, or its transpose.

    >>> import torch
    >>> import autodiff as ad
    >>> @ad.operators.root(lambda x, a: x**2 - a)
    ... def square_root(start, a):
    ...     x = start
    ...     for _ in range(20):
    ...         x = (x + a / x) / 2
    ...     return x
    >>> ad.value_and_grad(lambda a: square_root(torch.tensor(1.0), a))(torch.tensor(4.0))
    (tensor(2.), tensor(0.2500))

    Args:
        residual: ``residual(x, *args, **kwargs)``, zero at the answer: a tree like x. It gets all the positional
            arguments of the solver behind the start, and of its keywords those that it has a parameter for. Tensors
            that it captures are found, and differentiated as well.
        solve: ``solve(A, b)``, which solves the linear systems: A is an operator, b a tensor ``[n]``, both constants;
            such as ``partial(operators.solve, method="gmres", rtol=1e-10)``. None factorises the matrix where it is
            small, and iterates where it is large.
        has_aux: whether the solver returns ``(answer, aux)``; aux is handed on as a constant.
        check: whether to compare the residual at an answer that is differentiated with what it is made of.

    Returns:
        A decorator of ``solver(start, *args, **kwargs)``, which returns an answer: a tree like ``start``. The answer
        does not depend on ``start``; its derivative is zero there.

    Raises:
        StructureError, ShapeError, DtypeError, LeafError: the answer is no tree like ``start``, or the residual none
            like the answer.
        SingularError: the Jacobian at the answer has no inverse.
        CaptureError: the residual captures a differentiated tensor, and hands it to a transform of its own.
        InPlaceError: the solver writes to an argument other than ``start``.

    Warns:
        ConvergenceWarning: the residual is not small at an answer that is differentiated.

    M. Blondel et al., "Efficient and modular implicit differentiation", NeurIPS 2022.
    """
    return lambda solver: differentiable(ZeroResidual(residual), solver, solve, has_aux, check)


def fixed_point(
    map: Callable[..., Any],  # noqa: A002  what it is called in mathematics
    *,
    solve: Solver | None = None,
    has_aux: bool = False,
    check: bool = True,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    r"""Make the fixed points that a solver finds differentiable, by the implicit function theorem.

    .. math:: x^*(\theta) = T(x^*(\theta), \theta) \quad\Rightarrow\quad
        \frac{\partial x^*}{\partial \theta} =
        \left(1 - \frac{\partial T}{\partial x}\right)^{-1} \frac{\partial T}{\partial \theta}

    It is :func:`autodiff.operators.root` of ``x - map(x, *args)``.

    >>> import torch
    >>> import autodiff as ad
    >>> halves = lambda x, a: (x + a) / 2
    >>> @ad.operators.fixed_point(halves)
    ... def iterate(start, a):
    ...     x = start
    ...     for _ in range(40):
    ...         x = halves(x, a)
    ...     return x
    >>> ad.jacobian(iterate, argnums=1)(torch.zeros(2), torch.tensor([3.0, 5.0]))
    tensor([[1., 0.],
            [0., 1.]])

    Args:
        map: ``map(x, *args, **kwargs)``, which is x at the answer: a tree like x. It gets what the residual of
            :func:`autodiff.operators.root` gets.
        solve: how the linear systems are solved, as there.
        has_aux: whether the solver returns ``(answer, aux)``.
        check: whether to compare ``x - map(x)`` at an answer that is differentiated with what it is made of.

    Returns:
        A decorator of ``solver(start, *args, **kwargs)``, as there.

    Raises:
        StructureError, ShapeError, DtypeError, LeafError: the answer is no tree like ``start``, or the map's value
            none like the answer.
        SingularError, CaptureError, InPlaceError: as there.

    Warns:
        ConvergenceWarning: the map moves an answer that is differentiated.
    """
    return lambda solver: differentiable(FixedPoint(map), solver, solve, has_aux, check)


def minimum(
    objective: Callable[..., Any], *, solve: Solver | None = None, has_aux: bool = False, check: bool = True
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    r"""Make the minima that a solver finds differentiable, by the implicit function theorem.

    .. math:: x^*(\theta) = \operatorname{argmin}_x f(x, \theta) \quad\Rightarrow\quad
        \frac{\partial x^*}{\partial \theta} =
        -\left(\frac{\partial^2 f}{\partial x^2}\right)^{-1} \frac{\partial^2 f}{\partial x\, \partial \theta}

    It is :func:`autodiff.operators.root` of the gradient, which has to be zero at the answer: a maximum or a saddle
    will do as well, a minimum at the border of a constraint will not.

    >>> import torch
    >>> import autodiff as ad
    >>> @ad.operators.minimum(lambda w, penalty: ((w - 3) ** 2).sum() + penalty * (w**2).sum())
    ... def fit(start, penalty):
    ...     return torch.full_like(start, 3.0) / (1 + penalty)  # by whatever means
    >>> ad.grad(lambda penalty: fit(torch.zeros(()), penalty))(torch.tensor(1.0))
    tensor(-0.7500)

    Args:
        objective: ``objective(x, *args, **kwargs)``, minimal at the answer: one real tensor of shape ``()``. It gets
            what the residual of :func:`autodiff.operators.root` gets.
        solve: how the linear systems are solved, as there; their matrix is the Hessian, which is symmetric.
        has_aux: whether the solver returns ``(answer, aux)``.
        check: whether to compare the gradient at an answer that is differentiated with what it is made of.

    Returns:
        A decorator of ``solver(start, *args, **kwargs)``, as there.

    Raises:
        OutputError: the objective does not return one real scalar tensor.
        DtypeError: ``start`` is complex.
        StructureError, ShapeError, LeafError: the answer is no tree like ``start``.
        SingularError, CaptureError, InPlaceError: as there.

    Warns:
        ConvergenceWarning: the gradient is not small at an answer that is differentiated.
    """
    return lambda solver: differentiable(Minimum(objective), solver, solve, has_aux, check)
