"""One completion of the prompt for every sample of a task."""

from collections.abc import Sequence

import numpy as np

from megatron_opd.contracts.draws import request_seed
from megatron_opd.contracts.rows import Episode, Row, Source, Task
from megatron_opd.contracts.sampling import Draw, Request
from megatron_opd.contracts.stations import Engine, Tokenizer
from megatron_opd.methods.method import PrefixConfig
from megatron_opd.rollout.prefix import prefix_of
from megatron_opd.rollout.requests import new_episodes, room


class SingleTurn:
    """Samples the completions of prompts with one engine.

    With a `prefix`, completions begin with tokens of the task's trace. Logprobs depend on the other
    tasks only by rounding, and equal calls give equal bits.
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, prefix: PrefixConfig | None = None
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._prefix = prefix

    def sample(self, tasks: Sequence[Task], draw: Draw) -> list[Row]:
        """`draw.samples` rows of every task: see `Sampler.sample`."""
        episodes = new_episodes(tasks, draw.samples)
        given = [self._given(episode, draw) for episode in episodes]
        pairs = zip(episodes, given, strict=True)
        requests = [self._request(episode, given_ids, draw) for episode, given_ids in pairs]
        completions = self._engine.complete(requests, draw.sampling)
        rows = []
        for episode, given_ids, completion in zip(episodes, given, completions, strict=True):
            student = [Source.STUDENT] * len(completion.token_ids)
            row = completed_row(
                episode,
                [*given_ids, *completion.token_ids],
                [0.0] * len(given_ids) + completion.logprobs,
                [Source.TRACE] * len(given_ids) + student,
                completion.finish_reason,
                has_end=completion.finish_reason == "stop" and not completion.by_word,
                version=draw.version,
                tokenizer=self._tokenizer,
            )
            rows.append(row)
        return rows

    def _given(self, episode: Episode, draw: Draw) -> list[int]:
        """The tokens of the trace that a completion begins with."""
        if self._prefix is None:
            return []
        return prefix_of(self._prefix, episode.task, episode.sample, draw).tolist()

    def _request(self, episode: Episode, given_ids: list[int], draw: Draw) -> Request:
        task = episode.task
        prompt_ids = task.prompt_ids
        if given_ids:
            prompt_ids = np.concatenate([prompt_ids, np.array(given_ids, np.int32)])
        left = room(task, draw.max_tokens, self._engine.max_sequence_length) - len(given_ids)
        seed = request_seed(draw.seed, draw.step, task.index, episode.sample)
        return Request(task, prompt_ids, left, seed)


def completed_row(
    episode: Episode,
    token_ids: list[int],
    logprobs: list[float],
    sources: Sequence[int] | np.ndarray,
    finish_reason: str,
    *,
    has_end: bool,
    version: int,
    tokenizer: Tokenizer,
) -> Row:
    """The row of a completion of a task's prompt; `version` drew all tokens but the data's.

    `has_end`: the last token is an end, and no text.
    """
    # The end is left out of the text: it need not be a special token.
    written = token_ids[:-1] if has_end else token_ids
    sources_T = np.array(sources, np.int8)
    versions_T = np.where(sources_T <= Source.TEACHER, version, -1).astype(np.int32)
    return Row(
        episode=episode,
        prompt_ids=episode.task.prompt_ids,
        token_ids=np.array(token_ids, np.int32),
        sources=sources_T,
        logprobs=np.array(logprobs, np.float32),
        versions=versions_T,
        text=tokenizer.decode(written, skip_special_tokens=True),
        finish_reason=finish_reason,
    )
