"""What the stations must do for the algorithm, whoever does it. Imports no torch itself.

"Collective" means: all processes of the student's world call together, each with its share, which
may be empty. Errors reach the caller as RunError, and nothing is half done after one.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from megatron_opd.contracts.rows import Row, Task
from megatron_opd.contracts.signals import TeacherSignals

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True)
class Probes:
    """The vectors that a weight is multiplied with; `weights/probes.py` says why and how."""

    columns: tuple[int, ...]
    signs_I: "torch.Tensor"  # float32, 1 or -1, on the weight's device; empty for a width of 1

    @property
    def exact(self) -> int:
        """How many of the products' first rows have no rounding."""
        return len(self.columns)


class Engine(Protocol):
    """Samples from a model whose weights it is given. Every call is collective."""

    dtype: "torch.dtype"
    policy_version: int | None  # of the weights it holds; None while they are not verified

    def generate(
        self,
        tasks: list[Task],
        *,
        version: int,
        step: int,
        samples_per_prompt: int,
        max_completion_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        seed: int,
        prefix_of: "Callable[[Task, int], np.ndarray] | None" = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Row]:
        """`samples_per_prompt` completions of each task, task-major. Temperature 0 is greedy.

        A sample's tokens depend on (seed, step, task.index, sample) and the weights alone; its
        logprobs (nats) are of the distribution it was drawn from: after temperature and top_p.
        `prefix_of(task, sample)` gives the first tokens of a completion, at least one fewer than
        it may have. `on_progress(done, total)` counts completions. Raises RunError where the engine
        holds another `version` or fails; no request is left in it then.
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


class Teacher(Protocol):
    """Says what a model would have written. Collective, with the same rows on all processes."""

    def score(self, rows: Sequence[Row], topk: int = 0) -> TeacherSignals:
        """Signals at every completion token, on every process; with the `topk` most likely ids."""


class Verifier(Protocol):
    """Judges answers. Local to a process."""

    def score(self, rows: Sequence[Row]) -> list[Row]:
        """The rows in their order with verdicts and rewards. An answer never raises;
        RunError where no judge starts."""
