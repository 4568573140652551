"""Where torch is wrong, slow or refuses: right with autodiff, and with torch still as the table says."""

from __future__ import annotations

import re

import pytest

from table import TRIALS, page
from table.row import Trial, has_torch

# What torch says of its own operations, whoever calls them.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{words}")
    for words in (
        "There is a performance drop",
        "torch.triangular_solve is deprecated",
        "torch.cholesky is deprecated",
        r"index_reduce\(\) is in beta",
    )
]
each = pytest.mark.parametrize("trial", TRIALS, ids=str)


def skip_without(version: str) -> None:
    if not has_torch(version):
        pytest.skip(f"needs torch {version}")


@each
def test_autodiff(trial: Trial, request: pytest.FixtureRequest) -> None:
    skip_without(trial.row.needs)
    if trial.row.untrue is not None and has_torch(trial.row.untrue[0]):
        request.applymarker(pytest.mark.xfail(reason=trial.row.untrue[1]))
    failure = trial.failure("autodiff")
    assert failure is None, failure


@each
def test_torch(trial: Trial) -> None:
    skip_without(trial.row.needs)
    failure = trial.failure("torch")
    if trial.row.fails is None or trial.is_mended:
        assert failure is None, f"torch fails where the table says that it does not: {failure}"
    else:
        assert failure is not None, "torch is mended: say so in the table"
        assert re.match(trial.row.fails, failure, re.DOTALL), failure


def test_page_holds_the_rows() -> None:
    written = page.PAGE.read_text().split(page.MARKER)[1]
    assert written == page.tables() + page.fixes(), "`python -m table.page` in tests/support writes the page"


def test_rows_have_names_of_their_own() -> None:
    names = [str(trial) for trial in TRIALS]
    assert len(set(names)) == len(names)
