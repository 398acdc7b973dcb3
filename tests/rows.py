"""Tasks and rows as tests make them: what a test does not name has a plain value."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_opd.contracts.rows import UNSCORED, Episode, Row, Source, Task, Verdict


def task(index: int = 0, *, prompt_ids: Sequence[int] | np.ndarray = (1,), **keys: Any) -> Task:
    texts = {"problem": "", "answer": "", "text": ""} | keys
    return Task(index, prompt_ids=np.asarray(prompt_ids, np.int32), **texts)


def row(
    token_ids: Sequence[int] | np.ndarray,
    *,
    of: Task | None = None,
    group: int = 0,
    sample: int = 0,
    reward: float = 0.0,
    verdict: Verdict = UNSCORED,
    given: int = 0,
    logprobs: Sequence[float] | np.ndarray | float = -1.0,
    version: int = 0,
    text: str = "",
    finish_reason: str = "stop",
) -> Row:
    """A completion of the task `of`. Its first `given` tokens are of a trace."""
    of = of or task(group)
    tokens = len(token_ids)
    given_T = np.arange(tokens) < given
    return Row(
        episode=Episode(of, sample, group, verdict, reward),
        prompt_ids=of.prompt_ids,
        token_ids=np.asarray(token_ids, np.int32),
        sources=np.where(given_T, Source.TRACE, Source.STUDENT).astype(np.int8),
        logprobs=np.broadcast_to(np.asarray(logprobs, np.float32), tokens).copy(),
        versions=np.where(given_T, -1, version).astype(np.int32),
        text=text,
        finish_reason=finish_reason,
    )
