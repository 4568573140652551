"""Jacobians by every mode and chunk size against closed forms."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import autodiff as ad
from disguises import CHUNKS, TRANSFORMERS, Case, as_tree, call, cases, passive_leaves, plain, vmapped
from scenarios import SCENARIOS, assert_close

X = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)

MODES = {
    "jacrev": ad.jacrev,
    "jacfwd": ad.jacfwd,
    "auto": partial(ad.jacobian, mode="auto"),
    "reverse": partial(ad.jacobian, mode="reverse"),
    "forward": partial(ad.jacobian, mode="forward"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", cases(SCENARIOS, TRANSFORMERS))
def test_jacobian_equals_the_closed_form(case: Case, mode: str) -> None:
    single = "float32" in repr(case.primals[0])
    assert_close(call(case, MODES[mode]), case.jacobian(), loose=single)


@pytest.mark.parametrize("chunk_size", CHUNKS[1:])
@pytest.mark.parametrize("mode", ["jacrev", "jacfwd", "auto"])
@pytest.mark.parametrize("case", cases(SCENARIOS, [plain, vmapped, as_tree, passive_leaves], [torch.float64]))
def test_chunks_change_nothing(case: Case, mode: str, chunk_size: int) -> None:
    assert_close(call(case, partial(MODES[mode], chunk_size=chunk_size)), case.jacobian())


@pytest.mark.parametrize("mode", MODES)
def test_argnums_tuple_gives_a_tuple_inside_each_output(mode: str) -> None:
    def func(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"b": x * y[1], "a": y * x[0]}

    y = torch.tensor([3.0, 5.0], dtype=torch.float64)
    result = MODES[mode](func, argnums=("y", 0))(X, y)
    by_y = torch.zeros(3, 2, dtype=torch.float64)
    by_y[:, 1] = X
    a_by_x = torch.zeros(2, 3, dtype=torch.float64)
    a_by_x[:, 0] = y
    eye = torch.eye(3, dtype=torch.float64)
    expected = {"b": (by_y, eye * y[1]), "a": (torch.eye(2, dtype=torch.float64) * X[0], a_by_x)}
    assert_close(result, expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_holomorphic_jacobian_is_the_complex_derivative(mode: str, chunk_size: int | None) -> None:
    z = torch.tensor([1 + 2j, 0.5 - 1j], dtype=torch.complex128)
    w = torch.tensor([[1j, 2], [3 - 1j, 1], [0.5, 1 + 1j]], dtype=torch.complex128)
    result = MODES[mode](lambda z: w @ z**2, holomorphic=True, chunk_size=chunk_size)(z)
    assert_close(result, w * 2 * z)


@pytest.mark.parametrize("mode", MODES)
def test_independent_blocks_are_zeros(mode: str) -> None:
    def func(p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return p["x"] * 2, p["y"].sum()

    y = torch.ones(2, 1, dtype=torch.float64)
    result = MODES[mode](func)({"x": X, "y": y})
    eye, zeros = 2 * torch.eye(3, dtype=torch.float64), torch.zeros(3, 2, 1, dtype=torch.float64)
    assert_close(result, ({"x": eye, "y": zeros}, {"x": torch.zeros_like(X), "y": torch.ones_like(y)}))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_nothing_depends_on_anything(mode: str, chunk_size: int | None) -> None:
    constant = torch.ones(2, dtype=torch.float64)
    result = MODES[mode](lambda x: constant, chunk_size=chunk_size)(X)
    assert_close(result, torch.zeros(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("inputs", "outputs"), [(0, 2), (2, 0)])
def test_empty_tensors_give_empty_blocks(mode: str, inputs: int, outputs: int) -> None:
    def func(x: Tensor) -> Tensor:
        return torch.ones(outputs, dtype=torch.float64) * x.sum()

    assert MODES[mode](func)(torch.ones(inputs, dtype=torch.float64)).shape == (outputs, inputs)


@pytest.mark.parametrize("mode", MODES)
def test_dtypes_may_differ_between_leaves(mode: str) -> None:
    primal = {"single": torch.ones(2), "double": X}
    result = MODES[mode](lambda p: p["double"] * p["single"].sum().double())(primal)
    assert_close(result["double"], 2 * torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(result["single"].double(), X[:, None].expand(3, 2))
    wanted = torch.float32 if mode in ("jacrev", "reverse", "auto") else torch.float64
    assert result["single"].dtype == wanted


class NoBatchingRule(torch.autograd.Function):
    """x^2, whose backward looks at its cotangent's numbers and so cannot be batched."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        assert cotangent.sum().item() >= 1
        return 2 * x * cotangent


def test_chunk_size_one_pulls_rows_without_vmap() -> None:
    assert_close(ad.jacrev(NoBatchingRule.apply, chunk_size=1)(X), torch.diag(2 * X))
    with pytest.raises(RuntimeError, match="vmap"):
        ad.jacrev(NoBatchingRule.apply)(X)


def test_single_output_needs_no_batching_rule() -> None:
    result = ad.jacrev(lambda x: NoBatchingRule.apply(x).sum())(X)
    assert_close(result, 2 * X)


def test_auto_takes_the_smaller_side() -> None:
    pulls = []

    class Counting(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 3

        @staticmethod
        def backward(ctx: Any, cotangent: Tensor) -> Tensor:
            pulls.append(1)
            return cotangent * 3

    def wide(x: Tensor) -> Tensor:
        return Counting.apply(x).repeat(4)

    expected = 3 * torch.eye(3, dtype=torch.float64).repeat(4, 1)
    assert_close(ad.jacobian(wide, chunk_size=1)(X), expected)
    # 12 rows or 3 columns: one pull records the pullback, whose own pulls do not run it again.
    assert len(pulls) < 12


@pytest.mark.parametrize("mode", ["jacrev", "jacfwd", "auto"])
@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_strict_names_the_independent_pair_and_accepts_zero_times_x(
    mode: str, chunk_size: int | None
) -> None:
    transform = partial(MODES[mode], strict=True, chunk_size=chunk_size)
    assert_close(transform(lambda x: x * 0)(X), torch.zeros(3, 3, dtype=torch.float64))
    with pytest.raises(
        ad.errors.IndependenceError, match=r"output\['constant'\] is independent of args\[0\]"
    ):
        transform(lambda x: {"y": x, "constant": torch.ones(2)})(X)


@pytest.mark.parametrize("mode", ["jacrev", "jacfwd"])
@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_dropout_is_one_mask_for_the_whole_jacobian(mode: str, chunk_size: int | None) -> None:
    x = torch.ones(50, dtype=torch.float64)
    torch.manual_seed(3)
    jacobian = MODES[mode](torch.nn.functional.dropout, chunk_size=chunk_size)(x)
    torch.manual_seed(3)
    mask = torch.nn.functional.dropout(x)
    assert_close(jacobian, torch.diag(mask))


@pytest.mark.parametrize(("randomness", "works"), [("same", True), ("different", True), ("error", False)])
def test_jacfwd_randomness(randomness: Any, works: bool) -> None:
    x = torch.ones(20, dtype=torch.float64)
    derived = ad.jacfwd(torch.nn.functional.dropout, randomness=randomness)
    torch.manual_seed(3)
    if works:
        jacobian = derived(x)
        assert_close(jacobian, torch.diag(jacobian.diagonal()))
        assert set(jacobian.diagonal().tolist()) == {0.0, 2.0}
    else:
        with pytest.raises(RuntimeError, match="random"):
            derived(x)


def test_random_numbers_go_on_after_chunked_jacfwd() -> None:
    """Two calls draw two masks, as two calls of the function do."""
    x = torch.ones(50, dtype=torch.float64)
    derived = ad.jacfwd(torch.nn.functional.dropout, chunk_size=7)
    assert not torch.equal(derived(x), derived(x))


def test_wrappers_of_torchs_jacrev_may_pass_on_its_private_keyword() -> None:
    x = torch.tensor([1.0, 2.0])
    wrapped = ad.jacrev(lambda x: x**2, 0, has_aux=False, chunk_size=1, _preallocate_and_copy=True)
    assert torch.equal(wrapped(x), torch.diag(2 * x))
