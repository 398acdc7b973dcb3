"""The view of parts within the update: the tokens of a micro-batch and the present student."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NoReturn, assert_never

import numpy as np
import torch
from torch import Tensor

from megatron_opd.mcore.batch import Columns
from megatron_opd.methods.tokens import Anchor, Model, Tail
from megatron_opd.objective.arithmetic import LOWEST, log_ratio
from megatron_opd.vocab_parallel import truncated_forward_kl


class OnlyBefore:
    """The half of `methods.tokens.Tokens` that is known before the update alone: it needs whole
    rows, and a micro-batch may hold a slice of one."""

    @property
    def rewards_N(self) -> np.ndarray:
        _earlier("rewards_N")

    @property
    def groups_N(self) -> np.ndarray:
        _earlier("groups_N")

    @property
    def episodes_N(self) -> np.ndarray:
        _earlier("episodes_N")

    @property
    def data_sources_N(self) -> np.ndarray:
        _earlier("data_sources_N")

    @property
    def turns_T(self) -> Tensor:
        _earlier("turns_T")

    @property
    def lengths_N(self) -> np.ndarray:
        _earlier("lengths_N")

    @property
    def max_completion_tokens(self) -> int:
        _earlier("max_completion_tokens")

    @property
    def uniform_T(self) -> Tensor:
        _earlier("uniform_T")

    @property
    def end_T(self) -> Tensor:
        _earlier("end_T")

    @property
    def finished_T(self) -> Tensor:
        _earlier("finished_T")

    def spread(self, values_N: np.ndarray) -> Tensor:
        _earlier("spread")

    def mean_of_rows(self, values_T: Tensor) -> np.ndarray:
        _earlier("mean_of_rows")

    def to_go(self, values_T: Tensor, discount: float, *, mean: bool) -> Tensor:
        _earlier("to_go")

    def before(self, values_T: Tensor) -> Tensor:
        _earlier("before")


@dataclass(frozen=True)
class View(OnlyBefore):
    """T tokens of a micro-batch, on its device. The student's numbers carry gradients, but for
    those of before the update."""

    columns: Columns
    step: int
    student_T: Tensor
    argmax_T: Tensor | None  # the student's logprob of the teacher's argmax
    topk_TK: Tensor
    entropy_T: Tensor
    divergence_of: Callable[[str, float | None, float | None], Tensor]

    @property
    def zeros_T(self) -> Tensor:
        return torch.zeros_like(self.student_T)

    @property
    def sampled_T(self) -> Tensor:
        return self.columns.sampled_T

    @property
    def drawn_T(self) -> Tensor:
        return _there(self.columns.drawn_T, "who drew the tokens")

    def logprob(self, policy: Model | Anchor) -> Tensor:
        columns = self.columns
        match policy:
            case "current":
                return self.student_T
            case "old":
                # The first update of a step that nobody asked about before: both are the same.
                old_T = columns.old_logprobs_T
                return self.student_T.detach() if old_T is None else old_T
            case "rollout":
                return _there(columns.rollout_logprobs_T, "the sampler's logprobs")
            case "teacher":
                return _there(columns.teacher_logprobs_T, "the teacher").clamp(min=LOWEST)
            case "reference":
                return _there(columns.reference_logprobs_T, "the reference")
            case "process":
                _earlier("the process model")
            case _:
                assert_never(policy)

    def log_ratio(self, model: Model, anchor: Anchor) -> Tensor:
        return log_ratio(self.logprob(model), self.logprob(anchor))

    def entropy(self, model: Literal["student", "teacher"]) -> Tensor:
        if model == "teacher":
            _earlier("the teacher's entropy")
        return self.entropy_T

    def over_rows(self, values_T: Tensor) -> Tensor:
        return self.columns.over_sequences(values_T.where(self.sampled_T, 0.0)[None])[0]

    def mean_over_rows(self, values_T: Tensor) -> Tensor:
        counted_T = self.sampled_T.to(values_T.dtype)
        sum_T, tokens_T = self.columns.over_sequences(
            torch.stack([values_T.where(self.sampled_T, 0.0), counted_T])
        )
        return sum_T / tokens_T.clamp(min=1)

    def argmax_logprob(self) -> Tensor:
        return _there(self.argmax_T, "the student's logprob of the teacher's argmax")

    @property
    def is_argmax_T(self) -> Tensor:
        return self.columns.ids_T == _there(self.columns.teacher_argmax_T, "the teacher")

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        assert k <= self.topk_TK.shape[1], f"a part reads a top {k} that its needs do not name"
        teacher_TK = _there(self.columns.topk_logprobs_TK, "the teacher's top k")
        return self.topk_TK[:, :k], teacher_TK[:, :k]

    def topk_forward_kl(self, k: int, tail: Tail) -> tuple[Tensor, Tensor, Tensor]:
        kl = truncated_forward_kl(*self.topk(k), tail=tail)
        return kl.loss_T, kl.teacher_mass_T, kl.student_mass_T

    def divergence(self, kind: str, alpha: float | None, beta: float | None) -> Tensor:
        return self.divergence_of(kind, alpha, beta)


def _there(signal_T: Tensor | None, name: str) -> Tensor:
    assert signal_T is not None, f"a part reads {name}, which its needs do not name"
    return signal_T


def _earlier(name: str) -> NoReturn:
    raise AssertionError(
        f"{name} is known before the update alone: the part must say when() = 'before'"
    )
