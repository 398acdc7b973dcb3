"""What writes the completions of prompts; an engine of this process, for one."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from megatron_opd.contracts.sampling import Completion, Request, Sampling
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


def named_stream[Name](
    engine: StreamingEngine, drawn: Iterable[tuple[Name, Request, Sampling]]
) -> Iterator[tuple[Name, Completion]]:
    """`StreamingEngine.stream` of requests that have names; every name with its completion."""
    names: dict[int, Name] = {}  # by the identity of a request that is being answered

    def requests() -> Iterator[tuple[Request, Sampling]]:
        for name, request, sampling in drawn:
            names[id(request)] = name
            yield request, sampling

    for request, completion in engine.stream(requests()):
        yield names.pop(id(request)), completion


class EngineWriter:
    """Writes with an engine of this process."""

    def __init__(self, engine: StreamingEngine, tokenizer: Tokenizer) -> None:
        self._engine = engine
        self._tokenizer = tokenizer

    def write(self, prompts: Iterable[SuitePrompt]) -> Iterator[tuple[SuitePrompt, Written]]:
        """See `Writer.write`."""
        drawn = ((prompt, prompt.request, prompt.sampling) for prompt in prompts)
        for prompt, completion in named_stream(self._engine, drawn):
            ids = completion.token_ids
            truncated = completion.finish_reason == "length"
            text = self._tokenizer.decode(ids if truncated else ids[:-1], skip_special_tokens=True)
            yield prompt, Written(text, len(ids), truncated)
