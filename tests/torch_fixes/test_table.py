"""The table of fixes: every row is needed by exactly the tests that it names, and connects through the hooks alone."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from autodiff.core import hooks
from autodiff.torch_fixes import FIXES, Fix
from table import TRIALS, page
from table.row import Trial, has_torch

NEEDED = [fix for fix in FIXES if fix.is_needed]


def can_run(trial: Trial) -> bool:
    mended = trial.row.untrue is not None and has_torch(trial.row.untrue[0])
    return has_torch(trial.row.needs) and not mended


def names(fix: Fix, trial: Trial) -> bool:
    return bool({trial.row.name, str(trial)} & fix.tests_here())


HERE = [trial for trial in TRIALS if trial.row.alone is None and can_run(trial)]
ALONE = [trial for trial in TRIALS if trial.row.alone is not None and can_run(trial)]


def failing(trials: list[Trial]) -> set[str]:
    failed = set()
    for trial in trials:
        torch.manual_seed(20)
        if trial.failure("autodiff") is not None:
            failed.add(str(trial))
    return failed


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fix", NEEDED, ids=lambda fix: fix.name)
def test_exactly_its_own_tests_fail_without_a_fix(fix: Fix) -> None:
    with fix.switched_off():
        failed = failing(HERE)
    assert failed == {str(trial) for trial in HERE if names(fix, trial)}


@pytest.mark.parametrize(
    ("fix", "trial"),
    [(fix, trial) for fix in NEEDED for trial in ALONE if names(fix, trial)],
    ids=lambda one: one.name if isinstance(one, Fix) else str(one),
)
def test_that_ends_the_process_does_so_without_its_fix(fix: Fix, trial: Trial) -> None:
    assert trial.failure("autodiff") is None
    assert trial.failure("autodiff", without=fix.name) is not None


def test_every_fix_names_tests_that_there_are() -> None:
    # Not every torch has every value that a row is run over.
    named = {re.split("[ -]", name)[0] for fix in FIXES for name in fix.tests}
    assert named <= {trial.row.name for trial in TRIALS}
    assert all(fix.tests for fix in FIXES)
    assert len({fix.name for fix in FIXES}) == len(FIXES)


def test_switching_off_is_undone() -> None:
    def entries() -> list[dict[object, object]]:
        return [dict(registry) for fix in FIXES for registry, _ in fix.hooks]

    before = entries()
    for fix in NEEDED:
        with fix.switched_off():
            assert entries() != before
        assert entries() == before


def test_core_is_empty_without_the_fixes() -> None:
    code = """
from autodiff.core import hooks, forward, linearization, products  # noqa
import sys
registries = [hooks.forward_overrides, hooks.forward_overrides_by_type, hooks.missing_forward_rule,
              hooks.differ_by_mode, hooks.dispatch_overrides, hooks.batch_overrides, hooks.higher_order,
              hooks.control_flow, hooks.traced_formulas, hooks.node_pullbacks, hooks.node_transposes,
              *hooks.pull_policies.values()]
print(sum(map(len, registries)), any(name.startswith("autodiff.torch_fixes") for name in sys.modules))
"""
    package = Path(hooks.__file__).parents[1]
    stub = f"import sys, types; a = types.ModuleType('autodiff'); a.__path__ = [{str(package)!r}]; sys.modules['autodiff'] = a\n"
    done = subprocess.run([sys.executable, "-c", stub + code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "False"]


def test_page_holds_the_fixes() -> None:
    assert page.PAGE.read_text().endswith(page.fixes())
