"""Functions that torch.func differentiates wrongly without a word, by every mode: right in all of them.

The table (test_table.py) holds what torch.func makes of them.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import autodiff as ad
from matrix_functions import CASES, MATRICES, Case
from scenarios import assert_close, difference
from table.twice_forward import Cube

MODES = [
    "auto",
    "reverse-over-reverse",
    "forward-over-reverse",
    "reverse-over-forward",
    "forward-over-forward",
]
# torch announces that it loops over what has no batching rule; slow is not wrong.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@each_case
@pytest.mark.parametrize("transform", [ad.grad, ad.jacrev, ad.jacfwd], ids=lambda f: f.__name__)
def test_gradients_of_matrix_functions(case: Case, transform: Any) -> None:
    expected = torch.stack([case.gradient(a) for a in MATRICES])
    assert_close(torch.stack([transform(case.func)(a) for a in MATRICES]), expected)


@each_case
@pytest.mark.parametrize("name", ["grad", "jacrev", "jacfwd"])
def test_gradients_of_matrix_functions_per_sample(case: Case, name: str) -> None:
    expected = torch.stack([case.gradient(a) for a in MATRICES])
    assert_close(ad.vmap(getattr(ad, name)(case.func))(MATRICES), expected)


@each_case
@pytest.mark.parametrize("chunk_size", [None, 1, 4])
def test_default_hessians_of_matrix_functions(case: Case, chunk_size: int | None) -> None:
    """The default must be right, alone and per sample: it is the main job."""
    expected = torch.stack([case.hessian(a) for a in MATRICES])
    hessian = ad.hessian(case.func, chunk_size=chunk_size)
    assert_close(torch.stack([hessian(a) for a in MATRICES]), expected)
    assert_close(ad.vmap(hessian)(MATRICES), expected)


@each_case
@pytest.mark.parametrize("mode", MODES[1:])
def test_hessians_of_matrix_functions_by_mode(case: Case, mode: Any) -> None:
    assert_close(ad.hessian(case.func, mode=mode)(MATRICES[0]), case.hessian(MATRICES[0]))


@each_case
@pytest.mark.parametrize("mode", MODES[1:])
def test_hessians_of_matrix_functions_by_mode_per_sample(case: Case, mode: Any) -> None:
    hessian = ad.vmap(ad.hessian(case.func, mode=mode))
    assert_close(hessian(MATRICES), torch.stack([case.hessian(a) for a in MATRICES]))


@pytest.mark.parametrize(("outer", "inner"), list(itertools.product(["jacfwd", "jacrev", "grad"], repeat=2)))
def test_second_derivative_of_a_function_with_its_own_jvp(outer: str, inner: str) -> None:
    x = torch.tensor(2.0, dtype=torch.float64)
    second = getattr(ad, outer)(getattr(ad, inner)(Cube.apply))
    assert_close(second(x), torch.tensor(12.0, dtype=torch.float64))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", ["layer_norm", "batch_norm", "instance_norm"])
def test_hessians_of_normalisations_by_mode(norm: str, mode: Any) -> None:
    x, t = torch.randn(2, 2, 3, 4, dtype=torch.float64).unbind(0)
    options = {"layer_norm": ((4,),), "batch_norm": (None, None, None, None, True), "instance_norm": ()}[norm]

    def func(x: Tensor) -> Tensor:
        return (getattr(functional, norm)(x, *options) ** 3).sum()

    expected = difference(ad.grad(func), x, t, 1e-4)
    result = torch.tensordot(ad.hessian(func, mode=mode)(x), t, t.dim())
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", ["layer_norm", "batch_norm", "batch_norm-eval", "instance_norm"])
def test_normalisations_in_half_precision_are_those_of_torch(norm: str, dtype: torch.dtype) -> None:
    """The formulas compute as wide as torch, which takes the statistics and weights in single precision."""
    x = (300 * torch.randn(3, 3, 4)).to(dtype)
    options = {
        "layer_norm": ((4,), torch.ones(4), torch.zeros(4)),
        "batch_norm": (None, None, None, None, True),
        "batch_norm-eval": (torch.zeros(3), torch.full((3,), 1e4)),
        "instance_norm": (),
    }[norm]

    def func(x: Tensor) -> Tensor:
        result: Tensor = getattr(functional, norm.removesuffix("-eval"))(x, *options)
        return result

    inside = ad.vmap(lambda x: ad.jvp(func, (x,), (x,))[0])(x[None])[0]
    torch.testing.assert_close(inside, func(x), rtol=1e-2, atol=1e-2)
