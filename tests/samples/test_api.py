"""per_sample compared with a loop of torch.autograd.functional.hessian, and its options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

import autodiff as ad
from autodiff.errors import BatchError, OptionError
from autodiff.pytree import from_matrix
from problems import ARCHITECTURES, CHUNKS, W, X, known, square


def close(came: Any, expected: Any) -> None:
    assert_close(came, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_matrices(kind: str, chunks: str) -> None:
    if kind != "mlp" and chunks == "row":
        pytest.skip("one row after the other is slow, and the same code")
    case, expected = known(kind)
    curvature = ad.per_sample(ad.hessian(case.loss()), in_dims=(None, 0, 0), as_matrix=True, **CHUNKS[chunks])
    result = curvature(case.params, case.inputs, case.targets)
    close(result, expected)
    assert not result.requires_grad


@pytest.mark.parametrize("chunks", ["auto", "two", "rows"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
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


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"memory": "lots"}, OptionError, r"per_sample: memory is a positive number of bytes, .* got 'lots'"),
        ({"memory": 0}, OptionError, "positive number of bytes"),
        ({"memory": True}, OptionError, "positive number of bytes"),
        ({"on_error": "ignore"}, OptionError, "'raise', 'nan'. Got 'ignore'"),
        ({"chunk_size": 0}, OptionError, r"per_sample: `chunk_size` .*got 0.*'auto' learns"),
        ({"row_chunk_size": "rows"}, OptionError, "got 'rows'"),
        ({"randomness": "some"}, OptionError, "randomness"),
        ({"as_matrix": True}, OptionError, "needs a function made by jacrev.*got square"),
    ],
)
def test_wrong_options(options: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        ad.per_sample(square, (None, 0), **options)


def test_wrong_in_dims_are_per_sample_s() -> None:
    for in_dims, text in (
        ((0,), "not compatible"),
        ("x", "expected `in_dims`"),
        ((None, 5), "Got in_dim=5"),
        ({"z": 0}, "'z'"),
    ):
        with pytest.raises(BatchError, match=rf"^per_sample.*{text}"):
            ad.per_sample(ad.hessian(square), in_dims)(W, X)
