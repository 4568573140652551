"""Composable function transforms for PyTorch, over any tree.

>>> import torch
>>> import autodiff as ad
>>> ad.hessian(lambda x: (x**3).sum())(torch.tensor([1.0, 2.0]))
tensor([[ 6.,  0.],
        [ 0., 12.]])
"""

# isort: off  the groups are what a reader looks for

# First derivatives.
from autodiff.transforms.grad import grad as grad
from autodiff.transforms.grad import value_and_grad as value_and_grad
from autodiff.transforms.grad import grad_and_value as grad_and_value
from autodiff.transforms.vjp import vjp as vjp
from autodiff.transforms.jvp import jvp as jvp
from autodiff.transforms.linearize import linearize as linearize
from autodiff.transforms.jacobian import jacrev as jacrev
from autodiff.transforms.jacobian import jacfwd as jacfwd
from autodiff.transforms.jacobian import jacobian as jacobian

# Second derivatives.
from autodiff.transforms.hessian import hessian as hessian
from autodiff.transforms.hessian import hvp as hvp
from autodiff.transforms.curvature import hessian_diagonal as hessian_diagonal
from autodiff.transforms.curvature import hessian_block_diagonal as hessian_block_diagonal
from autodiff.transforms.curvature import hessian_trace as hessian_trace

# Batches.
from autodiff.transforms.vmap import vmap as vmap

# Many samples, in bounded memory.
from autodiff.samples.api import per_sample as per_sample

# Custom derivatives, and memory for time.
from autodiff.transforms.custom import custom_vjp as custom_vjp
from autodiff.transforms.custom import custom_jvp as custom_jvp
from autodiff.transforms.checkpoint import checkpoint as checkpoint

# Modules as functions.
from autodiff.nn import functional_call as functional_call
from autodiff.nn import stack_module_state as stack_module_state
from autodiff.nn import sample_loss as sample_loss

# The API of torch.autograd.functional, trees, checks of derivatives, errors and types: modules of their own.
from autodiff import functional as functional
from autodiff import pytree as pytree
from autodiff import testing as testing
from autodiff import errors as errors
from autodiff import types as types

# What a torch.func user imports beside the transforms.
from torch.func import functionalize as functionalize
from torch.func import replace_all_batch_norm_modules_ as replace_all_batch_norm_modules_
from torch.func import debug_unwrap as debug_unwrap
from autodiff._torch import rearrange as rearrange

# What mends torch registers itself.
from autodiff import torch_fixes as torch_fixes

# Matrices that are never formed, loaded when they are first asked for.
import typing as typing

from autodiff.on_demand import __dir__ as __dir__
from autodiff.on_demand import __getattr__ as __getattr__

if typing.TYPE_CHECKING:
    from autodiff import operators as operators
    from autodiff.operators.hessian_eigenvalues import hessian_eigenvalues as hessian_eigenvalues
