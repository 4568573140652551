"""What exists because torch is wrong, slow or lacks a rule, and nothing else: a table, registered in `core`."""

from autodiff.torch_fixes.fix import Fix as Fix
from autodiff.torch_fixes.table import FIXES as FIXES
