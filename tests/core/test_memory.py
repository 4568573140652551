"""Quantities of memory, what is free, and the meter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

import autodiff as ad
from autodiff.core import memory
from autodiff.core.memory import Meter
from autodiff.errors import OptionError

if TYPE_CHECKING:
    from pathlib import Path

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (7, 7),
        ("7B", 7),
        ("1kB", 1000),
        ("1 KiB", 1024),
        ("1.5MB", 1_500_000),
        (" .5 gib ", 2**29),
        ("2TB", 2 * 10**12),
        ("3TiB", 3 * 2**40),
    ],
)
def test_quantities(text: object, size: int) -> None:
    assert memory.parse_bytes("f", text) == size


@pytest.mark.parametrize("text", ["", "MiB", "1", "1 XB", "-1MB", "0B", -3, 0, 1.5, None, True])
def test_what_is_no_quantity(text: object) -> None:
    with pytest.raises(OptionError, match="f: memory is a positive number of bytes"):
        memory.parse_bytes("f", text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**31, "2.0 GiB"), (2**45, "32768.0 GiB")],
)
def test_quantities_as_a_person_reads_them(size: int, text: str) -> None:
    assert memory.format_bytes(size) == text


def test_free_memory_is_no_more_than_the_machine_has() -> None:
    import psutil

    assert 0 < memory.free_bytes(CPU) <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({"memory.max": "1000\n", "memory.current": "300\n"}, [700]),
        ({"memory.max": "max\n", "memory.current": "300\n"}, []),
        ({"memory.max": "1000\n", "memory.current": "1300\n"}, [0]),
        ({"memory/memory.limit_in_bytes": "50\n", "memory/memory.usage_in_bytes": "20\n"}, [30]),
        ({}, []),
    ],
)
def test_a_container_s_limit_counts(files: dict[str, str], free: list[int], tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory._free_in_container(tmp_path) == free


def test_device_of_leaves_is_that_of_the_accelerator() -> None:
    assert memory.device_of([1, None, torch.ones(1)]) == CPU
    assert memory.device_of([torch.ones(1), torch.ones(1, device="meta")]).type == "meta"


def test_out_of_memory_has_several_names() -> None:
    assert memory.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert memory.is_out_of_memory(MemoryError())
    assert not memory.is_out_of_memory(RuntimeError("shapes"))
    assert not memory.is_out_of_memory(ValueError("can't allocate memory"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert memory.is_out_of_memory(caught.value)


def test_meter_counts_what_lives_at_one_time() -> None:
    kept = torch.ones(1000)
    with Meter(CPU) as meter:
        a = kept + 1  # 4000
        b = a * 2  # 8000
        del a  # 4000
        c = b.double()  # 12000
        view = c[:500]
        del b, c, view
        kept.add_(1)
        torch.ones(10)
    assert meter.peak == 12_000
    assert meter.produced == 4000 + 4000 + 8000 + 40


def test_meter_sees_through_transforms_and_through_backward() -> None:
    x = torch.ones(5, 100)
    with Meter(CPU) as meter:
        ad.vmap(ad.hessian(lambda x: (x**2).sum()))(x)
    # The result alone is 5 x 100 x 100 floats.
    assert 5 * 100 * 100 * 4 <= meter.peak < 4 * 5 * 100 * 100 * 4
    assert meter.operations > 5


def test_meter_leaves_no_mode_behind() -> None:
    with pytest.raises(ValueError, match="inside"), Meter(CPU) as meter:
        raise ValueError("inside")
    before = meter.peak
    torch.ones(10**6) + 1
    assert meter.peak == before == 0


def test_meters_nest() -> None:
    with Meter(CPU) as outer:
        kept = torch.ones(100) * 2
        with Meter(CPU) as inner:
            torch.ones(50) * 2
        del kept
    assert inner.peak == 400
    assert outer.peak == 400 + 400


def test_meter_survives_a_product_with_a_zero_without_memory() -> None:
    """Inside a dispatch mode, as the meter is one, torch ends the process there."""
    one = torch.ones(2)

    def func(x: torch.Tensor) -> torch.Tensor:
        slope = lambda y: ad.jvp(torch.tanh, (y,), (one,))[1].sum()
        return ad.hvp(slope, (x,), (one,), mode="reverse-over-forward")[1]

    x = torch.tensor([0.5, 0.2])
    torch.testing.assert_close(ad.jacrev(func, chunk_size="auto")(x), ad.jacrev(func)(x))
