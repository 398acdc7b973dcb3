"""The sections of tools/gpu_check.py: each has `check(machine)`, which yields rows."""
