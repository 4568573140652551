"""Wrong input: each error's class, the kind torch.func raises there, and its four beats."""

from __future__ import annotations

import re

import pytest

import autodiff as ad
from autodiff import errors
from wrong_options import ARGNUMS, BATCHES, OPTIONS, OUTPUTS, STRICT
from wrong_trees import DTYPES, LEAVES, SHAPES, STRUCTURE, Wrong, X

EVERY_WRONG = [*STRUCTURE, *SHAPES, *DTYPES, *ARGNUMS, *OUTPUTS, *LEAVES, *OPTIONS, *BATCHES, *STRICT]


@pytest.mark.parametrize("wrong", EVERY_WRONG, ids=lambda wrong: wrong.id)
def test_error_has_its_class_and_beats(wrong: Wrong) -> None:
    with pytest.raises(wrong.error) as raised:
        wrong.call()
    text = str(raised.value)
    for beat in wrong.beats:
        assert beat in text
    assert not re.search(r"\s{2,}|\n", text), "one paragraph"


@pytest.mark.parametrize("wrong", [w for w in EVERY_WRONG if w.torch_func], ids=lambda wrong: wrong.id)
def test_code_that_catches_torchs_error_catches_ours(wrong: Wrong) -> None:
    """Our class is a subclass of what torch.func raises for the same misuse."""
    with pytest.raises(Exception) as torchs:  # noqa: PT011  which one is what this test finds out
        wrong.torch_func()
    assert issubclass(wrong.error, type(torchs.value)), (
        f"torch.func raises {type(torchs.value).__name__}: {torchs.value}"
    )


def test_messages_name_only_what_the_user_called() -> None:
    names = {"jacrev", "jacfwd", "jacobian", "hessian", "grad", "vjp", "jvp", "hvp", "linearize"}
    for name in ("jacobian", "hessian"):
        with pytest.raises(errors.OutputError) as raised:
            getattr(ad, name)(lambda x: x.long())(X)
        assert {other for other in names - {name} if f"{other}:" in str(raised.value)} == set()
