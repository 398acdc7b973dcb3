"""Scores of N questions with K samples each, and their two errors. avg@k is the mean of score_NK.

The samples of a question resemble one another, so N * K is never the number of observations.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np


def pass_at_k(right_NK: np.ndarray, k: int) -> np.ndarray:
    """float64 [N], the chance that k of a question's K samples, drawn without replacement, have a
    right one.

    It is 1 - C(wrong, k) / C(K, k), of which the mean over questions is unbiased. The product form
    needs no large binomials. Raises ValueError where k is not from 1 to K.
    """
    samples = right_NK.shape[1]
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs from 1 to {samples} of {samples} samples")
    wrong_N = samples - np.count_nonzero(right_NK, axis=1)
    drawn_k = np.arange(k)
    left_Nk = np.maximum(wrong_N[:, None] - drawn_k, 0) / (samples - drawn_k)
    return 1.0 - left_Nk.prod(axis=1)


def majority(votes: Sequence[Sequence[str]], score_NK: np.ndarray) -> np.ndarray:
    """float64 [N], the score of every question's most frequent answer (maj@k).

    `votes` are the answers that were read from the samples, "" where there was none, which does
    not vote. An answer's score is the mean of the samples that gave it; answers that are as
    frequent share the vote. A question without votes scores 0.
    """
    return np.array([_voted(*both) for both in zip(votes, score_NK, strict=True)])


def _voted(votes_K: Sequence[str], score_K: np.ndarray) -> float:
    counts = Counter(vote for vote in votes_K if vote)
    most = max(counts.values(), default=0)
    winners = {vote for vote, count in counts.items() if count == most}
    scores = [score for vote, score in zip(votes_K, score_K, strict=True) if vote in winners]
    return float(np.mean(scores)) if scores else 0.0


def question_error(score_NK: np.ndarray) -> float | None:
    """The standard error of the mean over questions of this kind, clustered by question.

    It contains the error of sampling. None for one question.
    """
    questions = len(score_NK)
    if questions < 2:
        return None
    return float(score_NK.mean(axis=1).std(ddof=1)) / math.sqrt(questions)


def seed_error(score_NK: np.ndarray) -> float | None:
    """The standard error of the mean over other seeds with these questions.

    None for one sample of every question, which does not show it.
    """
    questions, samples = score_NK.shape
    if samples < 2:
        return None
    variance_N = score_NK.var(axis=1, ddof=1) / samples
    return math.sqrt(float(variance_N.mean()) / questions)
