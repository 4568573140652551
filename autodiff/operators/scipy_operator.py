"""An operator as SciPy's: NumPy arrays in and out, of one dtype, on the CPU. Imports `checks` and `errors`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from autodiff import checks
from autodiff.errors import DtypeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_IN_NUMPY = (torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128)


def scipy_operator(operator: Any) -> Any:
    """``operator`` as a ``scipy.sparse.linalg.LinearOperator``."""
    try:
        import numpy as np  # noqa: PLC0415  optional
        from scipy.sparse.linalg import LinearOperator  # noqa: PLC0415  optional
    except ImportError as error:
        raise ImportError("A.to_scipy(): expected SciPy to be installed. Run pip install scipy.") from error
    if operator.dtype not in _IN_NUMPY:
        raise DtypeError(
            f"A.to_scipy(): expected a dtype that NumPy has, got {operator.dtype}. Make the operator at float32 "
            f"tensors."
        )
    checks.real_or_complex("A.to_scipy()", "vectors", (*operator.domain.leaves, *operator.codomain.leaves))
    dtype = np.dtype(str(operator.dtype).removeprefix("torch."))

    def in_numpy(matmat: Callable[[Tensor], Tensor], space: Any, image: Any) -> Callable[[Any], Any]:
        def multiply(array: Any) -> Any:
            if np.iscomplexobj(array) and not space.dtype.is_complex:
                return multiply(array.real) + 1j * multiply(array.imag)
            # SciPy probes with float64 vectors, whatever the dtype; and an operator is given columns [n, 1] too.
            given = torch.as_tensor(np.ascontiguousarray(array), device=operator.device).to(space.dtype)
            columns = np.shape(array)[1:]
            with torch.no_grad():
                product = matmat(given.reshape((space.size, *(columns or (1,)))))
            return product.detach().cpu().resolve_conj().numpy().reshape((image.size, *columns))

        return multiply

    multiply = in_numpy(operator.matmat, operator.domain, operator.codomain)
    multiply_adjoint = in_numpy(operator.H.matmat, operator.codomain, operator.domain)
    return LinearOperator(
        operator.shape,
        matvec=multiply,
        rmatvec=multiply_adjoint,
        matmat=multiply,
        rmatmat=multiply_adjoint,
        dtype=dtype,
    )
