"""The engines of all processes, to which the first one gives work; the others serve."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import batched
from typing import Protocol

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

from megatron_opd.contracts.sampling import Completion, ContextLogprobs, Request, Sampling
from megatron_opd.contracts.stations import ReadingEngine
from megatron_opd.evaluation.writers import named_stream
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.rollout.open import start_vllm_engine
from megatron_opd.world.queue import shared_items

CONTEXTS_AT_ONCE = 64


class Work[R](Protocol):
    """A list of items of which every process takes some."""

    @property
    def size(self) -> int:
        """The number of items."""

    @property
    def length(self) -> int:
        """The number of tokens for which an engine needs room."""

    def results(self, engine: ReadingEngine, taken: Iterator[int]) -> Iterator[tuple[int, R]]:
        """The results of the items whose numbers are in `taken`. Raises RunError."""


@dataclass(frozen=True)
class Completing:
    """Requests to complete, each with its distribution."""

    drawn: Sequence[tuple[Request, Sampling]]

    @property
    def size(self) -> int:
        return len(self.drawn)

    @property
    def length(self) -> int:
        return max(len(request.prompt_ids) + request.max_tokens for request, _ in self.drawn)

    def results(
        self, engine: ReadingEngine, taken: Iterator[int]
    ) -> Iterator[tuple[int, Completion]]:
        """See `Work.results`."""
        return named_stream(engine, ((number, *self.drawn[number]) for number in taken))


@dataclass(frozen=True)
class Reading:
    """Contexts to read."""

    contexts: Sequence[np.ndarray]

    @property
    def size(self) -> int:
        return len(self.contexts)

    @property
    def length(self) -> int:
        return max(len(context) for context in self.contexts) + 1  # a token is always drawn

    def results(
        self, engine: ReadingEngine, taken: Iterator[int]
    ) -> Iterator[tuple[int, ContextLogprobs]]:
        """See `Work.results`."""
        for numbers in batched(taken, CONTEXTS_AT_ONCE):
            read = engine.logprobs([self.contexts[number] for number in numbers])
            yield from zip(numbers, read, strict=True)


class Engines:
    """An engine of every process, started when it is known for how much it needs room."""

    def __init__(self, config: RunConfig, closing: ExitStack) -> None:
        self._config = config
        self._closing = closing
        self._engine: ReadingEngine | None = None
        self._queues = 0
        self._working = False  # on what the others share; still so after an error in it

    def results[R](self, work: Work[R]) -> list[R]:
        """The results of all items, in order; on the first process. Raises RunError."""
        if work.size == 0:
            return []
        self._working = True
        dist.broadcast_object_list([work])
        shares: list[dict[int, R]] = [{} for _ in range(dist.get_world_size())]
        dist.gather_object(self._share(work), shares)
        self._working = False
        of_number = {number: result for share in shares for number, result in share.items()}
        return [of_number[number] for number in range(work.size)]

    def serve(self) -> None:
        """Does a share of all that the first process asks for, until `dismiss`; on the others."""
        while True:
            received: list[Work[object] | None] = [None]
            dist.broadcast_object_list(received)
            if received[0] is None:
                return
            dist.gather_object(self._share(received[0]))

    def dismiss(self) -> None:
        """Ends `serve` on the other processes; after a failure they are ended with this one."""
        if not self._working:
            dist.broadcast_object_list([None])

    def _share[R](self, work: Work[R]) -> dict[int, R]:
        engine = self._with_room(work.length)
        self._queues += 1
        taken = shared_items(f"harness {self._queues}", range(work.size))
        # the bar is of this process's share; the others' is about as much
        total = -(-work.size // dist.get_world_size())
        results = tqdm(work.results(engine, taken), total=total, disable=dist.get_rank() != 0)
        return dict(results)

    def _with_room(self, length: int) -> ReadingEngine:
        """The engine; a new one, on all processes together, if it has too little room."""
        if self._engine and self._engine.max_sequence_length < length:
            self._closing.close()
            self._engine = None
        if self._engine is None:
            config = replace(self._config, max_sequence_length=length)
            engine = start_vllm_engine(config, config.student, sleeps=False)
            self._closing.callback(engine.close)
            self._engine = engine
        return self._engine
