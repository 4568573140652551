"""Bases and blocks, on flat tensors of different shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import autodiff as ad
from autodiff._torch import is_wrapper
from autodiff.core import products, seeds
from autodiff.core.seeds import _short_vector, generic_vector

LEAVES = [torch.zeros(2, 3), torch.zeros((), dtype=torch.float64), torch.zeros(0), torch.zeros(2)]
TOTAL = 9


@pytest.mark.parametrize("size", [1, 2, 4, 9])
def test_chunks_of_the_basis_make_the_identity(size: int) -> None:
    rows = []
    for start in range(0, TOTAL, size):
        stop = min(start + size, TOTAL)
        parts = seeds.StandardBasis(LEAVES).vectors(start, stop)
        assert [p.dtype for p in parts] == [leaf.dtype for leaf in LEAVES]
        assert [p.shape for p in parts] == [(stop - start, *leaf.shape) for leaf in LEAVES]
        rows.append(torch.cat([p.reshape(stop - start, -1).double() for p in parts], 1))
    assert torch.equal(torch.cat(rows), torch.eye(TOTAL, dtype=torch.float64))


def test_part_of_the_basis_starts_in_the_middle() -> None:
    part = seeds.StandardBasis(LEAVES, 5, 8)
    assert part.count == 3
    rows = torch.cat([p.reshape(2, -1).double() for p in part.vectors(1, 3)], 1)
    assert torch.equal(rows, torch.eye(TOTAL, dtype=torch.float64)[6:8])


def test_row_blocks_split_by_output_and_keep_the_input_shape() -> None:
    matrix = torch.arange(5.0 * 6).reshape(5, 2, 3)
    outputs = [torch.zeros(2, 2), torch.zeros(())]
    first, second = products.split_rows(matrix, outputs, torch.zeros(2, 3))
    assert torch.equal(first, matrix[:4].reshape(2, 2, 2, 3))
    assert torch.equal(second, matrix[4])


def test_column_blocks_split_by_input_and_keep_the_output_shape() -> None:
    columns = torch.arange(7.0 * 2).reshape(7, 2)
    primals = [torch.zeros(3, 2), torch.zeros(())]
    first, second = products.split_columns(columns, torch.zeros(2), primals)
    for out in range(2):
        assert torch.equal(first[out], columns[:6, out].reshape(3, 2))
    assert torch.equal(second, columns[6])


def test_missing_rows_and_columns_are_zeros_of_the_right_dtype() -> None:
    single, double = torch.zeros(2, 3), torch.zeros(4, dtype=torch.float64)
    (row,) = products.split_rows(None, [double], single)
    (column,) = products.split_columns(None, double, [single])
    assert row.shape == column.shape == (4, 2, 3)
    assert (row.dtype, column.dtype) == (torch.float32, torch.float64)
    assert not row.any()
    assert not column.any()


def test_size_of_counts_numbers() -> None:
    assert seeds.size_of(LEAVES) == TOTAL
    assert seeds.size_of([]) == 0


def test_a_generic_vector_outlives_the_level_that_it_was_made_in() -> None:
    _short_vector.cache_clear()
    made = []

    def func(x: Tensor) -> Tensor:
        made.append(generic_vector(torch.ones(3, dtype=torch.complex128)))
        return x.sin().sum()

    ad.vmap(ad.grad(func))(torch.ones(2, 3))
    again = generic_vector(torch.ones(3, dtype=torch.complex128))
    assert not is_wrapper(again)
    ad.grad(lambda x: (x * again.real).sum())(torch.ones(3, dtype=torch.float64))
