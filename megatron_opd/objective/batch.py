"""An update's rows and signals as flat columns on the host: what gates and denominators are
computed from."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from megatron_opd.contracts.rows import Row, Source
from megatron_opd.contracts.signals import Signals
from megatron_opd.mcore.batch import flatten


@dataclass(frozen=True)
class Batch:
    """All completion tokens of one update, T of N rows. Every rank holds the same one."""

    rows: Sequence[Row]
    signals: Signals
    seed: int
    step: int

    @property
    def num_tokens(self) -> int:
        return len(self.sequence_T)

    @cached_property
    def lengths_N(self) -> np.ndarray:
        return np.array([r.num_tokens for r in self.rows], dtype=np.int64)

    @cached_property
    def sequence_T(self) -> Tensor:
        """The row each token belongs to."""
        return torch.from_numpy(np.repeat(np.arange(len(self.rows)), self.lengths_N))

    @cached_property
    def sources_T(self) -> Tensor:
        """Who wrote the token, a `Source`."""
        return flatten([r.sources for r in self.rows], torch.int8)

    @property
    def sampled_T(self) -> Tensor:
        """Whether the student sampled the token: not one of a trace or of a prefix."""
        return self.sources_T <= Source.TEACHER

    @cached_property
    def drawn_T(self) -> Tensor:
        """Whether the student's engine drew the token: it then has a logprob of the sampler's."""
        versions_T = flatten([r.versions for r in self.rows], torch.int32)
        return (self.sources_T == Source.STUDENT) & (versions_T >= 0)

    @cached_property
    def rollout_T(self) -> Tensor:
        return flatten([r.logprobs for r in self.rows], torch.float64)

    @property
    def old_T(self) -> Tensor:
        assert self.signals.student is not None, "the plan asks for the student's pass"
        return torch.from_numpy(self.signals.student.logprobs_T).double()

    @property
    def student_entropy_T(self) -> Tensor:
        assert self.signals.student is not None, "the plan asks for the student's pass"
        return torch.from_numpy(self.signals.student.entropy_T).double()

    @property
    def teacher_T(self) -> Tensor:
        assert self.signals.teacher is not None, "the plan asks for the teacher"
        return torch.from_numpy(self.signals.teacher.logprobs_T).double()

    @property
    def teacher_entropy_T(self) -> Tensor:
        assert self.signals.teacher is not None, "the plan asks for the teacher"
        return torch.from_numpy(self.signals.teacher.entropy_T).double()

    @property
    def reference_T(self) -> Tensor:
        assert self.signals.reference_logprobs_T is not None, "the plan asks for the reference"
        return torch.from_numpy(self.signals.reference_logprobs_T).double()

    @property
    def process_T(self) -> Tensor:
        assert self.signals.process_logprobs_T is not None, "the plan asks for the process model"
        return torch.from_numpy(self.signals.process_logprobs_T).double()

    @cached_property
    def uniform_T(self) -> Tensor:
        """Uniform numbers in [0, 1) that depend on (seed, step, task, sample) and the token's
        place alone."""
        draws = [
            np.random.default_rng([self.seed, self.step, r.task.index, r.sample]).random(
                r.num_tokens
            )
            for r in self.rows
        ]
        return flatten(draws, torch.float64)

    @cached_property
    def end_T(self) -> Tensor:
        """The end-of-sequence token of a response that has one."""
        ends = [
            np.arange(r.num_tokens) == r.num_tokens - (r.finish_reason == "stop") for r in self.rows
        ]
        return flatten(ends, torch.bool)

    @cached_property
    def finished_T(self) -> Tensor:
        return flatten(
            [np.full(r.num_tokens, r.finish_reason == "stop") for r in self.rows], torch.bool
        )

    def wrong_T(self, scope: str) -> Tensor:
        rewards_N = np.array([r.reward for r in self.rows])
        if scope == "group":
            groups_N = np.array([r.group for r in self.rows])
            rewards_N = np.array([rewards_N[groups_N == group].max() for group in groups_N])
        return torch.from_numpy(np.repeat(rewards_N == 0, self.lengths_N))

    def over_sequences(self, values_T: Tensor) -> Tensor:
        """Each token gets the sum of its sequence, float64 [T]."""
        sums_N = torch.zeros(len(self.rows), dtype=torch.float64)
        return sums_N.index_add(0, self.sequence_T, values_T.double())[self.sequence_T]
