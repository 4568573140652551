"""A short run of the soak test (``nox -s soak`` is the whole), and proof that it would find something."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import autodiff as ad
from autodiff.torch_fixes import attention
from soak import machine
from soak.compositions import MAKERS, compose
from soak.containers import active, mapped

if TYPE_CHECKING:
    from collections.abc import Callable

# As pyproject.toml makes every warning an error, so does the soak test, but for these.
pytestmark = [pytest.mark.filterwarnings(f"ignore:{message}") for message in machine.QUIET]


def run(seed: int, count: int) -> list[machine.Outcome]:
    return [machine.check(seed, index) for index in range(count)]


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_random_compositions(seed: int) -> None:
    assert sum(bool(outcome.raised) for outcome in run(seed, count=60)) == 20


def test_every_transform_is_drawn() -> None:
    drawn = [compose(5, index).names for index in range(200)]
    assert {name for names in drawn for name in names} == set(MAKERS)
    assert {len(names) for names in drawn} == {1, 2, 3, 4}


def test_a_composition_is_drawn_again_by_its_number() -> None:
    one, other = compose(1, 7), compose(1, 7)
    assert str(one) == str(other)
    assert machine.check(1, 7).error == machine.check(1, 7).error


# Faults, each planted into the transform of that name.


def _slightly_off(transform: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(*args: Any, **options: Any) -> Any:
        out, tangent, *rest = transform(*args, **options)
        return (out, mapped(lambda leaf: leaf * (1 + 1e-6) if active(leaf) else leaf, tangent), *rest)

    return wrong


def _rewording(transform: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(*args: Any, **options: Any) -> Any:
        try:
            return transform(*args, **options)
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  a fault
            raise type(error)(*error.args) from None

    return wrong


def _leaking(enter: Callable[[], Any]) -> Callable[..., Any]:
    def plant(transform: Callable[..., Any]) -> Callable[..., Any]:
        def wrong(*args: Any, **options: Any) -> Any:
            try:
                return transform(*args, **options)
            except BaseException:
                enter()
                raise

        return wrong

    return plant


@pytest.mark.parametrize(
    ("plant", "found"),
    [
        (_slightly_off, "off by"),
        (_rewording, "came out instead of"),
        (_leaking(lambda: torch.set_grad_enabled(False)), "grad mode"),
        (_leaking(attention.plain_attention.__enter__), "users of attention"),
    ],
    ids=["number", "exception", "grad mode", "switch"],
)
def test_it_finds(plant: Callable[..., Any], found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ad, "jvp", plant(ad.jvp))
    try:
        with pytest.raises(AssertionError, match=found):
            run(seed=6, count=200)
    finally:
        torch.set_grad_enabled(True)
        while attention.plain_attention._users:
            attention.plain_attention.__exit__()
