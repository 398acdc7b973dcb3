"""Verdicts: a completion's final answer against the gold answer, by math-verify in processes."""
