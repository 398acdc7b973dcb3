"""Rewards: a completion's final answer against the gold answer, checked by math-verify in killable
processes."""
