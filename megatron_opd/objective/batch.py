"""An update's rows and signals as flat columns on the host: what parts see before the
update."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, assert_never

import numpy as np
import torch
from torch import Tensor

from megatron_opd.contracts.draws import generator
from megatron_opd.contracts.rows import Row, Source, episodes_of
from megatron_opd.contracts.signals import Signals
from megatron_opd.mcore.batch import flatten
from megatron_opd.methods.tokens import Anchor, Model, Tail
from megatron_opd.objective.arithmetic import LOWEST, log_ratio, returns_to_go


@dataclass(frozen=True)
class Batch:
    """All completion tokens of one update, T of N rows. Every rank holds the same one.

    It is the `methods.tokens.Tokens` of parts that are known before the update: float64 on the
    host.
    """

    rows: Sequence[Row]
    signals: Signals
    seed: int
    step: int
    max_completion_tokens: int

    @property
    def num_tokens(self) -> int:
        return len(self.sequence_T)

    @cached_property
    def tokens_N(self) -> np.ndarray:
        """The number of completion tokens of each row."""
        return np.array([r.num_tokens for r in self.rows], dtype=np.int64)

    @cached_property
    def lengths_N(self) -> np.ndarray:
        """The number of them that the student, the teacher or a trace wrote."""
        return np.array([r.num_written for r in self.rows], dtype=np.int64)

    @cached_property
    def groups_N(self) -> np.ndarray:
        return np.array([r.group for r in self.rows])

    @cached_property
    def episodes_N(self) -> np.ndarray:
        numbers = {episode.key: i for i, episode in enumerate(episodes_of(self.rows))}
        return np.array([numbers[r.episode.key] for r in self.rows])

    @cached_property
    def data_sources_N(self) -> np.ndarray:
        return np.array([r.task.source for r in self.rows])

    @cached_property
    def turns_T(self) -> Tensor:
        numbers: dict[tuple[tuple[int, int, int], int], int] = {}
        turns = [(r.episode.key, int(turn)) for r in self.rows for turn in r.turn_T]
        places = [numbers.setdefault(turn, len(numbers)) for turn in turns]
        return torch.tensor(places, dtype=torch.int64)

    @cached_property
    def rewards_N(self) -> np.ndarray:
        return np.array([r.reward for r in self.rows], dtype=np.float64)

    @cached_property
    def sequence_T(self) -> Tensor:
        """The row each token belongs to."""
        return torch.from_numpy(np.repeat(np.arange(len(self.rows)), self.tokens_N))

    @cached_property
    def sources_T(self) -> Tensor:
        """Who wrote the token, a `Source`."""
        return flatten([r.sources for r in self.rows], torch.int8)

    @property
    def sampled_T(self) -> Tensor:
        """True where the token was drawn for this row, by the student or by the teacher in its
        place."""
        return self.sources_T <= Source.TEACHER

    @property
    def trace_T(self) -> Tensor:
        """True where the token is from the data: of a trace, or of a prefix."""
        return self.sources_T == Source.TRACE

    @property
    def written_T(self) -> Tensor:
        """True where anyone but an environment wrote the token: nothing is counted elsewhere."""
        return self.sources_T != Source.ENVIRONMENT

    @cached_property
    def drawn_T(self) -> Tensor:
        """True where the student's engine drew the token: it has a logprob of the sampler's."""
        versions_T = flatten([r.versions for r in self.rows], torch.int32)
        return (self.sources_T == Source.STUDENT) & (versions_T >= 0)

    @cached_property
    def rollout_T(self) -> Tensor:
        return flatten([r.logprobs for r in self.rows], torch.float64)

    @property
    def zeros_T(self) -> Tensor:
        return torch.zeros(self.num_tokens, dtype=torch.float64)

    def logprob(self, policy: Model | Anchor) -> Tensor:
        match policy:
            case "teacher":
                assert self.signals.teacher is not None, _unasked("teacher")
                return _double(self.signals.teacher.logprobs_T).clamp(min=LOWEST)
            case "reference":
                assert self.signals.reference_logprobs_T is not None, _unasked("reference")
                return _double(self.signals.reference_logprobs_T)
            case "process":
                assert self.signals.process_logprobs_T is not None, _unasked("process")
                return _double(self.signals.process_logprobs_T)
            case "rollout":
                return self.rollout_T
            case "old":
                assert self.signals.student is not None, _unasked("student_pass")
                return _double(self.signals.student.logprobs_T)
            case "current":
                raise AssertionError(_later("the present student"))
            case _:
                assert_never(policy)

    def log_ratio(self, model: Model, anchor: Anchor) -> Tensor:
        return log_ratio(self.logprob(model), self.logprob(anchor))

    def entropy(self, model: Literal["student", "teacher"]) -> Tensor:
        if model == "teacher":
            assert self.signals.teacher is not None, _unasked("teacher")
            return _double(self.signals.teacher.entropy_T)
        assert self.signals.student is not None, _unasked("student_pass")
        return _double(self.signals.student.entropy_T)

    @cached_property
    def uniform_T(self) -> Tensor:
        """Uniform numbers in [0, 1) that depend on (seed, step, task, sample), the turn and the
        token's place in it alone; 0 where an environment wrote."""
        return flatten([self._uniform(row) for row in self.rows], torch.float64)

    def _uniform(self, row: Row) -> np.ndarray:
        uniform_T = np.zeros(row.num_tokens)
        turn_T = row.turn_T
        for turn in np.unique(turn_T):
            of_turn_T = row.written_T & (turn_T == turn)
            draws = generator(self.seed, self.step, row.task.index, row.sample, turn=int(turn))
            uniform_T[of_turn_T] = draws.random(of_turn_T.sum())
        return uniform_T

    @cached_property
    def end_T(self) -> Tensor:
        """The end of every turn that ended by itself."""
        return flatten([r.end_T for r in self.rows], torch.bool)

    @cached_property
    def finished_T(self) -> Tensor:
        """Every token of a turn that ended by itself."""
        return flatten([r.finished_T for r in self.rows], torch.bool)

    def spread(self, values_N: np.ndarray) -> Tensor:
        """Each token gets the number of its row, [T]."""
        return torch.from_numpy(np.repeat(values_N, self.tokens_N))

    def to_go(self, values_T: Tensor, discount: float, *, mean: bool) -> Tensor:
        """The discounted sum from a token on to the end of its row, [T]; with `mean` over the
        number of tokens to the end. Steps over what an environment wrote, which gets 0."""
        written_T = self.written_T
        to_go_T = torch.zeros_like(values_T)
        to_go_T[written_T] = returns_to_go(values_T[written_T], self.lengths_N, discount, mean=mean)
        return to_go_T

    def over_rows(self, values_T: Tensor) -> Tensor:
        sums_N = torch.zeros(len(self.rows), dtype=torch.float64)
        counted_T = values_T.double().masked_fill(~self.sampled_T, 0.0)
        return sums_N.index_add(0, self.sequence_T, counted_T)[self.sequence_T]

    def mean_over_rows(self, values_T: Tensor) -> Tensor:
        tokens_T = self.over_rows(self.sampled_T.double())
        return self.over_rows(values_T) / tokens_T.clamp(min=1)

    def mean_of_rows(self, values_T: Tensor) -> np.ndarray:
        first_N = np.cumsum(self.tokens_N) - self.tokens_N
        return self.mean_over_rows(values_T).numpy()[first_N]

    def before(self, values_T: Tensor) -> Tensor:
        """The sum over the tokens in front of a token in its row, [T]. Steps over what an
        environment wrote, as `to_go` does."""
        written_T = values_T.masked_fill(~self.written_T, 0.0)
        sums_N = np.bincount(self.sequence_T.numpy(), written_T.numpy(), len(self.rows))
        return self.spread(sums_N) - self.to_go(values_T, 1.0, mean=False)

    @property
    def is_argmax_T(self) -> Tensor:
        assert self.signals.teacher is not None, _unasked("teacher")
        ids_T = flatten([r.token_ids for r in self.rows], torch.int32)
        return ids_T == torch.from_numpy(self.signals.teacher.argmax_ids_T)

    # What only the update itself knows.
    def argmax_logprob(self) -> Tensor:
        raise AssertionError(_later("the student's log-probability of the teacher's token"))

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        raise AssertionError(_later("the student's log-probabilities of the teacher's best ids"))

    def topk_forward_kl(self, k: int, tail: Tail) -> tuple[Tensor, Tensor, Tensor]:
        raise AssertionError(_later("the student's log-probabilities of the teacher's best ids"))

    def divergence(self, kind: str, alpha: float | None, beta: float | None) -> Tensor:
        raise AssertionError(_later("a divergence"))


def _double(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).double()


def _unasked(signal: str) -> str:
    return f"a part reads a signal that its needs do not name: {signal}"


def _later(what: str) -> str:
    return f"{what} is not known before the update: the part must say when() = 'within'"
