"""Matrices that are never formed: Jacobians, Hessians and their relatives as linear operators on trees.

>>> import torch
>>> from autodiff import operators
>>> A = operators.hessian(lambda x: (x**3).sum())(torch.tensor([1.0, 2.0]))
>>> A @ torch.tensor([1.0, 1.0])
tensor([ 6., 12.])
"""

# isort: off  the groups are what a reader looks for

# What every operator is, and what it maps.
from autodiff.operators.operator import Operator as Operator
from autodiff.operators.space import Space as Space

# Operators of functions.
from autodiff.operators.makers import jacobian as jacobian
from autodiff.operators.makers import hessian as hessian
from autodiff.operators.gauss_newton import gauss_newton as gauss_newton
from autodiff.operators.fisher import fisher as fisher
from autodiff.operators.fisher import empirical_fisher as empirical_fisher

# Operators that are given.
from autodiff.operators.given import identity_like as identity_like
from autodiff.operators.given import from_matrix as from_matrix
from autodiff.operators.given import from_matvec as from_matvec

# Linear equations.
from autodiff.operators.solve import solve as solve
from autodiff.operators.solve import SolveInfo as SolveInfo

# Preconditioners.
from autodiff.operators.preconditioners import jacobi as jacobi
from autodiff.operators.preconditioners import block_jacobi as block_jacobi
from autodiff.operators.preconditioners import nystrom as nystrom

# Eigenvalues and singular values.
from autodiff.operators.eigsh import eigsh as eigsh
from autodiff.operators.svds import svds as svds

# Solutions that are differentiated by what holds for them.
from autodiff.operators.root import root as root
from autodiff.operators.root import fixed_point as fixed_point
from autodiff.operators.root import minimum as minimum

# Numbers and functions of an operator, estimated by random vectors. Of a tree, diagonal makes the diagonal operator.
from autodiff.operators.estimators import trace as trace
from autodiff.operators.estimators import diagonal as diagonal
from autodiff.operators.estimators import logdet as logdet
from autodiff.operators.estimators import frobenius_norm as frobenius_norm
from autodiff.operators.estimators import Estimate as Estimate
from autodiff.operators.spectral_density import spectral_density as spectral_density
from autodiff.operators.spectral_density import SpectralDensity as SpectralDensity
