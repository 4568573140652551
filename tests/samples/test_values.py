"""per_sample against a loop of torch.autograd.functional.hessian, and closed forms."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import autodiff as ad
from autodiff.pytree import from_matrix
from problems import Problem, problem

KINDS = ("mlp", "cnn", "encoder")
CHUNKS: dict[str, dict[str, Any]] = {
    "auto": {},
    "one": {"chunk_size": 1},
    "two": {"chunk_size": 2},
    "all": {"chunk_size": None},
    "rows": {"row_chunk_size": 11},
    "row": {"row_chunk_size": 1},
}


@cache
def known(kind: str) -> tuple[Problem, Tensor]:
    """The problem and its Hessians, found once."""
    case = problem(kind)
    return case, case.expected()


def close(came: Any, expected: Any) -> None:
    assert_close(came, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("kind", KINDS)
def test_matrices(kind: str, chunks: str) -> None:
    if kind != "mlp" and chunks == "row":
        pytest.skip("one row after the other is slow, and the same code")
    case, expected = known(kind)
    curvature = ad.per_sample(ad.hessian(case.loss()), in_dims=(None, 0, 0), as_matrix=True, **CHUNKS[chunks])
    result = curvature(case.params, case.inputs, case.targets)
    close(result, expected)
    assert not result.requires_grad


@pytest.mark.parametrize("chunks", ["auto", "two", "rows"])
@pytest.mark.parametrize("kind", KINDS)
def test_trees(kind: str, chunks: str) -> None:
    case, expected = known(kind)
    curvature = ad.per_sample(ad.hessian(case.loss()), in_dims=(None, 0, 0), **CHUNKS[chunks])
    result = curvature(case.params, case.inputs, case.targets)
    for sample, matrix in enumerate(expected):
        blocks = from_matrix(matrix, case.params, case.params)
        for i, row in blocks.items():
            for j, block in row.items():
                close(result[i][j][sample], block)


@pytest.mark.parametrize("way", ["stream", "map", "file", "folder", "out", "loader"])
@pytest.mark.parametrize("chunks", ["auto", "two", "rows"])
def test_ways_to_take_results(way: str, chunks: str, tmp_path: Any) -> None:
    case, expected = known("mlp")
    matrix = way != "folder"
    curvature = ad.per_sample(ad.hessian(case.loss()), (None, 0, 0), as_matrix=matrix, **CHUNKS[chunks])
    args: Any = case.params, case.inputs, case.targets
    match way:
        case "stream":
            pieces = list(curvature.stream(*args))
            assert [piece.samples.start for piece in pieces] == [0, *(p.samples.stop for p in pieces[:-1])]
            close(torch.cat([piece.result for piece in pieces]), expected)
        case "map":
            close(curvature.map(torch.trace, *args), expected.diagonal(dim1=1, dim2=2).sum(1))
        case "file":
            close(curvature(*args, out=tmp_path / "h.npy"), expected)
        case "folder":
            result = curvature(*args, out=tmp_path / "h")
            block = from_matrix(expected[3], case.params, case.params)["0.bias"]["2.weight"]
            close(result["0.bias"]["2.weight"][3], block)
            assert (tmp_path / "h" / "0.bias.2.weight.npy").exists()
        case "out":
            room = torch.empty_like(expected)
            assert curvature(*args, out=room).data_ptr() == room.data_ptr()
            close(room, expected)
        case "loader":
            data = torch.utils.data.TensorDataset(case.inputs, case.targets)
            loader = torch.utils.data.DataLoader(data, batch_size=2)
            close(curvature(case.params, loader), expected)
            close(curvature(case.params, loader, out=tmp_path / "h.npy"), expected)


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


def test_no_samples_give_an_empty_result(tmp_path: Any) -> None:
    curvature = ad.per_sample(ad.hessian(lambda w, x: (w @ x).sin()), (None, 0))
    assert curvature(torch.ones(3), torch.zeros(0, 3)).shape == (0, 3, 3)
    assert curvature(torch.ones(3), torch.zeros(0, 3), out=tmp_path / "none.npy").shape == (0, 3, 3)
    assert list(curvature.stream(torch.ones(3), torch.zeros(0, 3))) == []


def test_random_functions_follow_randomness(tmp_path: Any) -> None:
    x = torch.zeros(9)
    with pytest.raises(ad.errors.SampleError, match="randomness"):
        ad.per_sample(lambda x: x + torch.rand(()))(x)
    different = ad.per_sample(lambda x: x + torch.rand(()), randomness="different", chunk_size=2)
    assert len(set(different(x).tolist())) == 9
    same = ad.per_sample(lambda x: x + torch.rand(()), randomness="same", chunk_size=2)
    assert len(set(same(x).tolist())) == 1


def test_inside_a_transform_it_says_what_to_do() -> None:
    inner = ad.per_sample(lambda x: x**2)
    with pytest.raises(ad.errors.AutodiffError, match="chunk_size='auto'"):
        ad.vmap(inner)(torch.ones(2, 3))


def test_report_tells_what_was_run() -> None:
    case, _ = known("mlp")
    curvature = ad.per_sample(ad.hessian(case.loss()), (None, 0, 0), memory="64MiB")
    assert "per_sample(hessian(" in repr(curvature)
    assert curvature.report is None
    curvature(case.params, case.inputs, case.targets)
    report = curvature.report
    assert (report.samples, report.smallest, report.largest, report.chunks) == (5, 1, 4, 2)
    assert 0 < report.peak < 2**20
    assert "5 samples in 2 chunks of 1 to 4; peak " in repr(curvature)
    assert "of 64.0 MiB" in repr(curvature)
    # What was learnt serves the next call.
    curvature(case.params, case.inputs, case.targets)
    assert curvature.report.chunks == 1
