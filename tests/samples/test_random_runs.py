"""Random runs, with every option, source and destination: compared with a loop over the samples."""

from __future__ import annotations

import random
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils import _pytree

import autodiff as ad
from autodiff import _torch
from autodiff.samples import files
from problems import W

if TYPE_CHECKING:
    from pathlib import Path


class Stopped(BaseException):
    """Not an Exception: nothing in between may take it for a failing sample."""


def energy(w: Tensor, x: Tensor) -> Tensor:
    _calls_left()
    return torch.sin(w @ x) * (w * x).sum().square()


def picky(w: Tensor, x: Tensor) -> Any:
    """Raises where `energy` gives NaN, and returns a tree with a constant."""
    if bool(_torch.fully_unwrapped(x).isnan().any()):
        raise ValueError("no number")
    return {"a.b": energy(w, x), "a": {"b": (x * w, 3)}}


LEFT = {"calls": -1}


def _calls_left() -> None:
    left = sys.modules[__name__].LEFT  # not as a global, which would be part of the run
    left["calls"] -= 1
    if left["calls"] == 0:
        raise Stopped


def plain(func: Any, w: Tensor, x: Tensor) -> Any:
    """One sample's result, NaN where there is none."""
    result = func(w, x.nan_to_num(0.0))
    bad = bool(x.isnan().any())
    return _pytree.tree_map_only(Tensor, lambda t: torch.full_like(t, float("nan")) if bad else t, result)


FUNCTIONS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "hessian": (ad.hessian(energy), torch.func.hessian(energy), {}),
    "matrix": (ad.hessian(energy), torch.func.hessian(energy), {"as_matrix": True}),
    "gradient": (ad.grad(energy), torch.func.grad(energy), {}),
    "jacobian": (ad.jacrev(lambda w, x: picky(w, x)["a"]["b"][0]), None, {}),
    "picky": (picky, picky, {}),
}


@pytest.mark.parametrize("seed", range(40))
def test_random_runs(seed: int, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(files, "SECONDS_BETWEEN_COMMITS", -1.0)
    draw = random.Random(seed)
    func, reference, options = FUNCTIONS[draw.choice(list(FUNCTIONS))]
    reference = reference or torch.func.jacrev(lambda w, x: w * x)
    count = draw.choice([1, 2, 7, 20])
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    bad = draw.sample(range(count), draw.choice([0, 0, 1, min(3, count - 1)])) if count > 1 else []
    x[bad] = float("nan")
    options = {
        **options,
        "chunk_size": draw.choice(["auto", "auto", 1, 3, None]),
        "row_chunk_size": draw.choice(["auto", "auto", 1, 2, None]),
        "memory": draw.choice([None, "100kB", "20kB"]),
        "on_error": "nan",
    }
    if options["memory"] == "20kB" and count == 20:
        options["memory"] = None
    cuts = sorted(draw.choices(range(count + 1), k=draw.randrange(4)))
    bounds = list(zip([0, *cuts], [*cuts, count], strict=True))
    source = draw.choice(["tensors", "iterator", "loader"])
    size = draw.randrange(1, 8)

    def samples() -> Any:
        match source:
            case "tensors":
                return x
            case "iterator":
                return (x[start:stop] for start, stop in bounds)
            case _:
                return torch.utils.data.DataLoader(x, batch_size=size)  # type: ignore[arg-type]

    reduce = draw.choice([None, None, lambda tree: _pytree.tree_map_only(Tensor, torch.sum, tree)])
    LEFT["calls"] = -1
    loop = [plain(reference, W, sample) for sample in x]
    loop = loop if reduce is None else [reduce(result) for result in loop]
    expected = _pytree.tree_map(
        lambda *leaves: torch.stack(leaves) if isinstance(leaves[0], Tensor) else leaves[0], *loop
    )

    def run(out: Any) -> tuple[Any, Any]:
        # Made anew: sizes that were learnt are not part of what is resumed.
        made = ad.per_sample(func, (None, 0), **options)
        result = made(W, samples(), out=out) if reduce is None else made.map(reduce, W, samples(), out=out)
        return result, made.report

    result, report = run(None)
    assert_close(result, expected, equal_nan=True)
    assert sorted(report.failed) == sorted(bad)
    rooms = _pytree.tree_map_only(Tensor, lambda t: draw.choice([torch.empty_like(t), _strided(t)]), expected)
    assert_close(run(rooms)[0], result, equal_nan=True, rtol=0, atol=0)
    arrays = _pytree.tree_map_only(Tensor, lambda t: np.empty_like(t.numpy(), order="F"), expected)
    run(arrays)
    assert_close(
        _pytree.tree_map_only(np.ndarray, torch.from_numpy, arrays), result, equal_nan=True, rtol=0, atol=0
    )
    whole, _ = run(tmp_path / "whole")
    assert_close(whole, result, equal_nan=True, rtol=0, atol=0)
    stops = [draw.randrange(1, 12) for _ in range(3)]
    for stop in stops:
        LEFT["calls"] = stop
        try:
            run(tmp_path / "stopped")
        except Stopped:
            continue
        break
    LEFT["calls"] = -1
    resumed, report = run(tmp_path / "stopped")
    assert_close(resumed, whole, equal_nan=True, rtol=0, atol=0)
    assert sorted(report.failed) == sorted(bad)
    assert report.resumed_at + report.samples == count


def _strided(tensor: Tensor) -> Tensor:
    """Room for as many numbers, not one after the other."""
    return torch.empty(*tensor.shape, 2, dtype=tensor.dtype)[..., 1]
