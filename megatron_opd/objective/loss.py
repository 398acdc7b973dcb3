"""The loss of one micro-batch: arithmetic on the student's log-probabilities at one or two ids per token.

Two kernels serve every term. The policy gradient multiplies a detached advantage with the clipped importance ratio of
the sampled token; the cross-entropy pulls up the log-probability of a target token. Each is summed with scales that
already hold 1 / (global denominator), so the losses and gradients of micro-batches and replicas add up.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_opd.config.schema import CrossEntropyTerm, MethodConfig, PolicyGradientTerm
from megatron_opd.mcore.batch import Columns
from megatron_opd.objective.plan import weight_at


def policy_gradient(
    logprobs_T: Tensor, old_logprobs_T: Tensor, advantages_T: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate per token, as a loss, and where the clip is active (bool).

    loss = -min(rho * A, clip(rho, 1 - clip_low, 1 + clip_high) * A), rho = exp(logprob - old logprob).
    Gradient: through rho, except where clipped. Source: GRPO, arXiv 2402.03300, Eq. 3.
    """
    ratio_T = (logprobs_T - old_logprobs_T).exp()
    free_T = ratio_T * advantages_T
    clipped_T = ratio_T.clamp(1 - clip_low, 1 + clip_high) * advantages_T
    return -torch.minimum(free_T, clipped_T), clipped_T < free_T


class Distribution(Protocol):
    """What a loss asks of a model: `mcore.head.Head`."""

    def logprobs(
        self, ids_TK: Tensor, *, temperature: float, valid_vocab_size: int, with_entropy: bool = False
    ) -> Any: ...


@dataclass(frozen=True)
class Objective:
    """A method at work on a student.

    Args:
        valid_vocab_size: ids from here on are padding.
        temperature: of the rollouts; the student's distribution is taken at the same one.
    """

    method: MethodConfig
    valid_vocab_size: int
    temperature: float

    def weights(self, step: int) -> dict[str, float]:
        return {name: weight_at(term.weight, step) for name, term in self.method.terms.items()}

    def asks_teacher(self, step: int) -> bool:
        """Whether a term that reads the teacher has a weight at `step`: at 0 its forward pass is saved."""
        return any(
            weight_at(term.weight, step) > 0
            for term in self.method.terms.values()
            if isinstance(term, CrossEntropyTerm) and term.targets == "teacher_argmax"
        )

    def __call__(self, head: Distribution, columns: Columns, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of these tokens (a scalar to differentiate) and sums for the metrics (float32 scalars, detached).

        head: the student at the positions that predict the T completion tokens of `columns`.
        """
        ids = [columns.ids_T]
        if columns.teacher_argmax_T is not None:
            ids.append(columns.teacher_argmax_T)
        out_TK, entropy_T = head.logprobs(
            torch.stack(ids, dim=1),
            temperature=self.temperature,
            valid_vocab_size=self.valid_vocab_size,
            with_entropy=True,
        )
        student_T = out_TK[:, 0]
        old_T = student_T.detach() if columns.old_logprobs_T is None else columns.old_logprobs_T
        sums = _common_sums(columns, old_T, entropy_T.detach())
        total = student_T.new_zeros(())
        for j, (name, term) in enumerate(self.method.terms.items()):
            if isinstance(term, PolicyGradientTerm):
                assert columns.advantages_T is not None
                value_T, clipped_T = policy_gradient(
                    student_T, old_T, columns.advantages_T, term.clip_low, term.clip_high
                )
                sums[f"objective/{name}/clip_fraction"] = clipped_T.float().sum()
            elif term.targets == "trace":
                value_T = -student_T
            elif columns.teacher_argmax_T is not None:
                value_T = -out_TK[:, 1]
            else:  # a guidance whose weight has reached 0: the teacher was not asked
                continue
            value = (columns.scales_TJ[:, j] * value_T).sum()
            sums[f"objective/{name}/loss"] = value.detach()
            total = total + weight_at(term.weight, step) * value
        sums["train/loss"] = total.detach()
        return total, sums


def _common_sums(columns: Columns, old_T: Tensor, entropy_T: Tensor) -> dict[str, Tensor]:
    sums = {
        "tokens": torch.tensor(float(len(old_T)), device=old_T.device),
        "student/entropy/mean": entropy_T.sum(),
    }
    if columns.rollout_logprobs_T is not None:
        difference_T = old_T - columns.rollout_logprobs_T
        sums["mismatch/logprob_abs/mean"] = difference_T.abs().sum()
        # k3 estimate of KL(rollout engine || trainer): non-negative, zero only when equal
        sums["mismatch/kl/mean"] = (difference_T.expm1() - difference_T).sum()
    if columns.teacher_argmax_T is not None:
        sums["teacher/agreement/mean"] = (columns.ids_T == columns.teacher_argmax_T).float().sum()
    return sums


PER_TOKEN = ("mean", "clip_fraction")  # last parts of metric names that are divided by the number of tokens


def finish(sums: dict[str, float]) -> dict[str, float]:
    """Sums over all micro-batches and replicas -> the metrics of the update."""
    tokens = max(sums.pop("tokens"), 1.0)
    return {name: value / tokens if name.rsplit("/", 1)[-1] in PER_TOKEN else value for name, value in sums.items()}
