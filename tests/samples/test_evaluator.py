"""What is computed for each sample: closed forms of Jacobians in trees, columns and matrices, and plain functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

import autodiff as ad
from problems import CHUNKS


@pytest.mark.parametrize("chunks", ["auto", "two", "rows"])
def test_jacobians_of_several_outputs_keep_their_nesting(chunks: str) -> None:
    a, b = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, dtype=torch.float64)

    def f(p: Any, scale: float) -> Any:
        return {
            "outer": torch.outer(p["a"], p["a"][:2]) * p["b"] * scale,
            "none": None,
            "sin": (p["b"].sin(),),
        }

    in_dims = ({"a": 0, "b": 0, "name": None}, None)
    jacobian = ad.per_sample(ad.jacrev(f), in_dims, **CHUNKS[chunks])
    result = jacobian({"a": a, "b": b, "name": "x"}, 2.0)
    eye = torch.eye(3, dtype=torch.float64)
    expected = (
        2
        * b[:, None, None, None]
        * (torch.einsum("il,nj->nijl", eye, a[:, :2]) + torch.einsum("ni,jl->nijl", a, eye[:2]))
    )
    assert_close(result["outer"]["a"], expected)
    assert_close(result["outer"]["b"], 2 * torch.einsum("ni,nj->nij", a, a[:, :2]))
    assert_close(result["sin"][0]["b"], b.cos())
    assert_close(result["sin"][0]["a"], torch.zeros(7, 3, dtype=torch.float64))
    assert result["none"] is None
    assert result["outer"]["name"] is None


def test_columns_and_aux_work_by_samples() -> None:
    x = torch.randn(5, 3, dtype=torch.float64)
    forward = ad.per_sample(ad.jacfwd(lambda x: (x[:2] ** 3, x.sum()), has_aux=True), chunk_size=2)
    jacobian, aux = forward(x)
    expected = torch.zeros(5, 2, 3, dtype=torch.float64)
    expected[:, 0, 0], expected[:, 1, 1] = 3 * x[:, 0] ** 2, 3 * x[:, 1] ** 2
    assert_close(jacobian, expected)
    assert_close(aux, x.sum(1))
    assert_close(ad.per_sample(ad.jacfwd(lambda x: x[:2] ** 3), as_matrix=True)(x), expected)


@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"chunk_size": None}])
def test_a_plain_function_and_keyword_samples(options: Any) -> None:
    x, y = torch.randn(5, 3), torch.randn(3, 5)
    plain = ad.per_sample(lambda x, *, y: {"dot": x @ y, "tag": "same"}, {"x": 0, "y": 1}, **options)
    result = plain(x, y=y)
    assert_close(result["dot"], (x * y.T).sum(1))
    assert result["tag"] == "same"
    # A result that is the same for all samples is there for each, and is no view of one.
    shared = ad.per_sample(lambda x: torch.ones(2), **options)(x)
    assert shared.shape == (5, 2)
    shared[0] = 3
    assert_close(shared[1], torch.ones(2))
