"""Every operator of PyTorch's own database under fifteen checks, against torch.func and torch.autograd.

matrix.py says what a check is, known.py which operators do not pass it and why.
"""

from __future__ import annotations

import pytest
import torch

from known import KNOWN, LEFT_OUT, TORCH

if not torch.__version__.startswith(TORCH):
    pytest.skip(
        f"the tables are those of torch {TORCH}x, this is {torch.__version__}", allow_module_level=True
    )

# Not at the top: another torch may lack what it imports.
from matrix import CHECKS, OPERATORS, WORKS, cases, verdict

# Operators warn about themselves: what is compared is what they compute.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}:UserWarning")
    for message in (
        "There is a performance drop because we have not yet implemented the batching rule",  # vmap loops
        r"[\s\S]*is deprecated",  # torch.qr, torch.lu, torch.cross without dim, stft without return_complex
        r"[\s\S]*(is|are) in beta",  # index_reduce, sparse tensors
        "ComplexHalf support is experimental",
        # The samples visit every option, these too. A dot stands for a colon, which would end the message.
        "A window was not provided",
        "Using padding='same' with even kernel lengths",
        "dropout2d. Received a",
        "linear_cross_entropy. ``options`` ignored",
        "reduction. 'mean' divides the total loss",
    )
]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    """Sums in one order, and no contention between pytest's processes."""
    torch.set_num_threads(1)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", [name for name in OPERATORS if name not in LEFT_OUT])
def test_verdict_is_the_known_one(name: str, check: str) -> None:
    expected = [found for found, names in KNOWN[check].items() if name in names] or [WORKS]
    assert "; ".join(sorted(expected)) == verdict(name, check)


@pytest.mark.parametrize("name", [name for name in LEFT_OUT if "double precision" in LEFT_OUT[name]])
def test_what_leaves_double_precision_has_no_case(name: str) -> None:
    assert cases(name) == []


def test_tables_name_operators_of_the_matrix() -> None:
    named = {name for table in KNOWN.values() for names in table.values() for name in names}
    assert named | LEFT_OUT.keys() <= OPERATORS.keys()
    assert KNOWN.keys() == CHECKS.keys()
