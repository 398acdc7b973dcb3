"""The contracts of the stations, which any implementation keeps. Imports no torch itself.

"Collective" means: all processes of the student's world call together, each with its share, which
may be empty. Errors reach the caller as RunError, and nothing is half done after one.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from megatron_opd.contracts.rows import Row, Task
from megatron_opd.contracts.sampling import Completion, ContextLogprobs, Draw, Request, Sampling
from megatron_opd.contracts.signals import TeacherSignals

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Probes:
    """The vectors that a weight is multiplied with; `weights/probes.py` says why and how."""

    columns: tuple[int, ...]
    signs_I: "torch.Tensor"  # float32, 1 or -1, on the weight's device; empty for a width of 1

    @property
    def exact(self) -> int:
        """The number of the products' first rows that have no rounding."""
        return len(self.columns)


class Tokenizer(Protocol):
    """Turns tokens into text."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str: ...


class Engine(Protocol):
    """Continues tokens with a model whose weights it is given. Every call is collective."""

    dtype: "torch.dtype"
    max_sequence_length: int  # of a request's tokens and the new ones
    policy_version: int | None  # of the weights it holds; None while they are not verified

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """The completions of this process's requests, in their order.

        One depends on its request and the weights alone, but for rounding. Raises RunError where
        the engine holds another version or fails; no request is left in it then.
        """

    def reload(self, named_tensors: "Iterable[tuple[str, torch.Tensor]]") -> None:
        """Takes (Hugging Face name, whole tensor) of every weight.

        The tensors are read to their end whatever happens. `policy_version` is None afterwards.
        """

    def project(self, name: str, probes: Probes) -> "list[torch.Tensor]":
        """The products of the weight as it is held now, float32 [K, O] of each copy."""

    def sleep(self) -> None:
        """Leaves the device's memory to the models until the next call."""

    def restart(self) -> None:
        """A new engine in the place of one that failed, as that was before its first weights."""


class StreamingEngine(Protocol):
    """An engine that gives completions as they end. Its calls are not collective."""

    max_sequence_length: int

    def stream(
        self, drawn: Iterable[tuple[Request, Sampling]]
    ) -> Iterator[tuple[Request, Completion]]:
        """Every request with its completion, in the order in which they end.

        Requests are taken as there is room for them, so that several engines may draw from one
        queue. Raises RunError as `Engine.complete`.
        """


class ReadingEngine(StreamingEngine, Protocol):
    """One that also reads contexts. Its calls are not collective."""

    def logprobs(self, contexts: Sequence[np.ndarray]) -> list[ContextLogprobs]:
        """What the model makes of every context, int32 [T], of at least two tokens and with room
        for one more. Raises RunError."""


class Sampler(Protocol):
    """Makes rows of tasks: completions that an engine samples, or what the data hold.
    Collective."""

    def sample(self, tasks: Sequence[Task], draw: Draw) -> list[Row]:
        """The rows of this process's tasks, not verified: those of a task together, in the order of
        the tasks. The group of a row is its task's place in `tasks`. Raises RunError where an
        engine fails."""


@dataclass(frozen=True)
class RefitReport:
    """The figures of one refit."""

    seconds: float
    tensors: int
    bytes: int  # of the tensors sent, in the engine's dtype
    max_error: float  # the largest deviation of a product, relative to the tensor's largest

    @property
    def metrics(self) -> dict[str, float]:
        return {"refit/bytes": self.bytes, "refit/max_error": self.max_error}


class WeightSender(Protocol):
    """Brings the student's present weights into the engine. Collective."""

    def send(self, version: int) -> RefitReport:
        """Afterwards the engine holds `version`, every tensor verified. Raises RunError."""


class Teacher(Protocol):
    """Says what a model would have written. Collective, with the same rows on all processes."""

    def score(self, rows: Sequence[Row], topk: int = 0) -> TeacherSignals:
        """Signals at every completion token, on every process; with the `topk` most likely ids."""


class Verifier(Protocol):
    """Judges answers. Local to a process."""

    def score(self, rows: Sequence[Row]) -> list[Row]:
        """The rows in their order with verdicts and rewards. An answer never raises;
        RunError where no judge starts."""
