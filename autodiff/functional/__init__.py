"""The API of ``torch.autograd.functional``, over linearizations and the transforms.

>>> import torch
>>> from autodiff.functional import hessian
>>> hessian(lambda x: (x**3).sum(), torch.tensor([1.0, 2.0]))
tensor([[ 6.,  0.],
        [ 0., 12.]])
"""

from autodiff.functional.matrices import hessian as hessian
from autodiff.functional.matrices import jacobian as jacobian
from autodiff.functional.vector_products import hvp as hvp
from autodiff.functional.vector_products import jvp as jvp
from autodiff.functional.vector_products import vhp as vhp
from autodiff.functional.vector_products import vjp as vjp
