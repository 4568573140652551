"""Results that are not finite, and those that cannot be marked."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import autodiff as ad
from autodiff import _torch
from autodiff.errors import OptionError
from problems import X


def test_large_finite_values_are_finite() -> None:
    x = torch.full((4, 3), 1e38)
    assert ad.per_sample(lambda x: x * 3)(x).sum() == float("inf")
    assert_close(ad.per_sample(lambda x: x * 3)(x), x * 3)


def test_a_caller_s_samples_are_not_written_to() -> None:
    x = X.clone()
    x[1] = float("inf")
    before = x.clone()
    result = ad.per_sample(lambda x: x, on_error="nan")(x)
    assert result[1].isnan().all()
    assert torch.equal(x, before)


def test_integers_cannot_be_marked() -> None:
    def func(x: Tensor) -> Tensor:
        if not bool(_torch.fully_unwrapped(x).isfinite().all()):
            raise RuntimeError("not finite")
        return x.long()

    with pytest.raises(OptionError, match=r"sample 1 in a result of dtype torch.int64"):
        ad.per_sample(func, on_error="nan")(torch.tensor([1.0, float("inf"), 2.0]))


def test_mixed_dtypes_become_one_matrix() -> None:
    w, v = torch.randn(2), torch.randn(3, dtype=torch.float64)
    scale = torch.tensor([1.0, -2.0, 0.5, 4.0])
    curvature = ad.per_sample(
        ad.hessian(lambda p, s: s * (p[0].sum() * p[1].prod())), (None, 0), as_matrix=True
    )
    for options in ({}, {"row_chunk_size": 2}):
        curvature = ad.per_sample(
            ad.hessian(lambda p, s: s * (p[0].sum() * p[1].prod())), (None, 0), as_matrix=True, **options
        )
        result = curvature((w, v), scale)
        assert result.dtype == torch.float64
        rest = torch.stack([v[1] * v[2], v[0] * v[2], v[0] * v[1]])
        assert_close(result[:, 0, 2:], scale[:, None] * rest, check_dtype=False, rtol=1e-5, atol=1e-6)
        assert_close(result[:, :2, :2], torch.zeros(4, 2, 2, dtype=torch.float64))
