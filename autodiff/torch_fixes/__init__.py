"""What exists because torch is wrong, slow or lacks a rule, and nothing else."""
