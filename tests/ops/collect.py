"""Print the table that known.py should hold: ``python tests/ops/collect.py [CHECK ...]``, a minute or two.

To be run after an upgrade of torch, with an eye on every difference: a line that goes is good news, a
line that comes needs a reason, and "autodiff is wrong" or "autodiff raises" is a bug of ours.
"""

from __future__ import annotations

import sys
import warnings
from collections import defaultdict

import torch

from known import LEFT_OUT
from matrix import CHECKS, OPERATORS, WORKS, verdict


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = defaultdict(list)
    for name in sorted(OPERATORS.keys() - LEFT_OUT.keys()):
        for check in sys.argv[1:] or CHECKS:
            found[check, verdict(name, check)].append(name)
    for (check, phrase), names in sorted(found.items()):
        if phrase == WORKS:
            print(f"{check}: {WORKS} for {len(names)} operators")
        else:
            print(f"{check}: {phrase} for {len(names)}:", *names)


if __name__ == "__main__":
    main()
