"""What writes the completions of prompts; an engine of this process, for one."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from megatron_opd.contracts.sampling import Request, Sampling
from megatron_opd.contracts.stations import StreamingEngine, Tokenizer
from megatron_opd.suites.asking import SuitePrompt


@dataclass(frozen=True)
class Written:
    """A completion."""

    text: str  # without special tokens
    tokens: int
    truncated: bool  # by the limit of tokens


class Writer(Protocol):
    """Writes completions, in the order in which they end."""

    def write(self, prompts: Iterable[SuitePrompt]) -> Iterator[tuple[SuitePrompt, Written]]:
        """Every prompt with its completion. Prompts are taken as there is room. Raises RunError."""


class EngineWriter:
    """Writes with an engine of this process."""

    def __init__(self, engine: StreamingEngine, tokenizer: Tokenizer) -> None:
        self._engine = engine
        self._tokenizer = tokenizer

    def write(self, prompts: Iterable[SuitePrompt]) -> Iterator[tuple[SuitePrompt, Written]]:
        """See `Writer.write`."""
        taken: dict[int, SuitePrompt] = {}

        def drawn() -> Iterator[tuple[Request, Sampling]]:
            for prompt in prompts:
                taken[id(prompt.request)] = prompt
                yield prompt.request, prompt.sampling

        for request, completion in self._engine.stream(drawn()):
            ids = completion.token_ids
            truncated = completion.finish_reason == "length"
            text = self._tokenizer.decode(ids if truncated else ids[:-1], skip_special_tokens=True)
            yield taken.pop(id(request)), Written(text, len(ids), truncated)
