"""The random numbers of a step, which depend on the place of their token and nothing else.

A draw depends on (seed, step, task, sample), on the turn of a conversation and on what is drawn. So
any process draws the same for a completion, in any batch, and a run that resumes repeats its draws.
`step` is the step that a row is for, not the one at which it is sampled.
"""

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """The draws beside the tokens of a completion and the numbers of gates."""

    PREFIX = 1  # how much of a trace a completion begins with
    COINS = 2  # who writes a token, in a mixture of student and teacher
    TURN = 3  # opens the draws of a later turn
    ENVIRONMENT = 4  # what an environment draws; of sample 0, for the whole group
    SKILL = 5  # which privileged text a task gets; of sample 0, for the whole group


def entropy(
    seed: int, step: int, task: int, sample: int, *stream: int, turn: int = 0
) -> tuple[int, ...]:
    """The words that seed a generator. Turn 0 adds none: one turn draws what it always drew.

    NumPy fills up short sequences with zeros, so a word 0 in place of nothing would go unnoticed
    in the first four words and not behind them.
    """
    opened = (Stream.TURN, turn) if turn else ()
    return (seed, step, task, sample, *map(int, (*opened, *stream)))


def generator(
    seed: int, step: int, task: int, sample: int, *stream: int, turn: int = 0
) -> np.random.Generator:
    """A generator for the draws that are not an engine's.

    `random(n)` begins with the numbers of `random(m)` for every m < n.
    """
    return np.random.default_rng(entropy(seed, step, task, sample, *stream, turn=turn))


def request_seed(seed: int, step: int, task: int, sample: int, *stream: int, turn: int = 0) -> int:
    """63 bits, for an engine that samples a completion, or the part of it behind a number of tokens
    (`stream`)."""
    words = np.random.SeedSequence(entropy(seed, step, task, sample, *stream, turn=turn))
    return int(words.generate_state(1, np.uint64)[0] >> 1)
