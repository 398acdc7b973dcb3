"""One completion of the prompt for every sample of a task."""

from collections.abc import Sequence

import numpy as np

from megatron_opd.contracts.draws import request_seed
from megatron_opd.contracts.rows import Episode, Row, Source, Task
from megatron_opd.contracts.sampling import Draw, Request
from megatron_opd.contracts.stations import Engine, Tokenizer
from megatron_opd.methods.method import PrefixConfig
from megatron_opd.rollout.prefix import prefix_of
from megatron_opd.rollout.requests import room, sample_numbers


class SingleTurn:
    """Samples the completions of prompts with one engine.

    `prefix`: how a completion begins with tokens of the task's trace. Rounding aside, logprobs do
    not depend on the other tasks; they are the same bit for bit when the call is.
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, prefix: PrefixConfig | None = None
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._prefix = prefix

    def sample(self, tasks: Sequence[Task], draw: Draw) -> list[Row]:
        """As `Sampler.sample`: `draw.samples` rows of every task."""
        episodes = [
            Episode(task, sample, group)
            for group, task in enumerate(tasks)
            for sample in sample_numbers(task, draw.samples)
        ]
        given = [self._given(episode, draw) for episode in episodes]
        requests = [self._request(*each, draw) for each in zip(episodes, given, strict=True)]
        completions = self._engine.complete(requests, draw.sampling)
        return [
            completed_row(
                episode,
                [*given_ids, *completion.token_ids],
                [0.0] * len(given_ids) + completion.logprobs,
                [Source.TRACE] * len(given_ids) + [Source.STUDENT] * len(completion.token_ids),
                completion.finish_reason,
                version=draw.version,
                tokenizer=self._tokenizer,
            )
            for episode, given_ids, completion in zip(episodes, given, completions, strict=True)
        ]

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
    version: int,
    tokenizer: Tokenizer,
) -> Row:
    """A completion of the task's prompt with its text; `version` drew the tokens that are not the
    data's."""
    # an end need not be a special token
    written = token_ids[:-1] if finish_reason == "stop" else token_ids
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
