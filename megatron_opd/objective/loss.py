"""The loss of one micro-batch: arithmetic on the student's log-probabilities at a few ids per
token.

Every term gives one number per token. Each is summed with scales that already hold gates and 1 /
(global denominator), so the losses and gradients of micro-batches and replicas add up.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, assert_never

import torch
from torch import Tensor

from megatron_opd.mcore.batch import Columns
from megatron_opd.methods.advantages import (
    LogRatioAdvantage,
    LogRatioFactor,
    ProcessRewardAdvantage,
    RewardAdvantage,
    ShapingAdvantage,
    TopKAdvantage,
)
from megatron_opd.methods.needs import (
    active,
    gates_of,
    needs_of,
    of_sequence,
    reads_traces,
    weight_at,
)
from megatron_opd.methods.terms import (
    CrossEntropyTerm,
    DivergenceTerm,
    EntropyTerm,
    MethodConfig,
    PolicyGradientTerm,
    Term,
    TopKTerm,
)
from megatron_opd.objective.advantages import LOWEST, factor, log_ratio, transformed
from megatron_opd.objective.estimators import Policies, policy_gradient
from megatron_opd.objective.soft_labels import on_topk
from megatron_opd.vocab_parallel import truncated_forward_kl


class Distribution(Protocol):
    """What a loss asks of a model: `mcore.head.Head`."""

    def logprobs(
        self,
        ids_TK: Tensor,
        *,
        temperature: float,
        valid_vocab_size: int,
        with_entropy: bool = False,
    ) -> Any: ...

    def divergence(
        self,
        teacher: Any,
        *,
        kind: str,
        alpha: float | None,
        beta: float | None,
        temperature: float,
        valid_vocab_size: int,
    ) -> Tensor: ...


@dataclass(frozen=True)
class View:
    """What the terms see of T tokens. The student's numbers carry gradients, but for `old_T`."""

    columns: Columns
    step: int
    student_T: Tensor
    # the student's logprob of the teacher's argmax; [0] where no term reads the teacher
    argmax_T: Tensor
    topk_TK: Tensor
    entropy_T: Tensor
    old_T: Tensor
    divergence: Callable[[DivergenceTerm], Tensor]


@dataclass(frozen=True)
class Objective:
    """A method at work on a student.

    Args:
        valid_vocab_size: ids from here on are padding.
        shared_vocab_size: ids from here on are no tokens of the teacher's, and divergences leave
            them out; None: the teacher has all.
        temperature: of the rows; the student's distribution is taken at the same one.
    """

    method: MethodConfig
    valid_vocab_size: int
    temperature: float
    shared_vocab_size: int | None = None

    def weights(self, step: int) -> dict[str, float]:
        return {name: weight_at(term.weight, step) for name, term in self.method.terms.items()}

    def __call__(
        self,
        head: Distribution,
        columns: Columns,
        step: int,
        teacher: Callable[[], Any] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of these tokens (a scalar to differentiate) and sums for the metrics (float32
        scalars, detached).

        head: the student at the positions that predict the T completion tokens of `columns`.
        teacher: makes the teacher's head at the same positions, for terms on the whole vocabulary.
        """
        now = active(self.method, step)
        view = self._view(head, columns, step, now, teacher)
        # Means are of the student's own tokens, or, for a method on traces alone, of theirs.
        counted_T = columns.sampled_T
        if not needs_of(self.method).rollouts:
            counted_T = columns.written_T
        sums = _common_sums(view, counted_T)
        # Something to differentiate even where no term is active.
        total = 0.0 * view.student_T.nan_to_num(neginf=0.0).sum()
        for j, (name, term) in enumerate(self.method.terms.items()):
            if name not in now.terms:
                continue
            value_T, facts = _value(now.terms[name], j, view)
            # The value of a token that does not count may be infinite: NaN, with a scale of 0.
            scale_T = columns.scales_TJ[:, j]
            value = (scale_T * value_T.where(scale_T != 0, 0.0)).sum()
            sums[f"objective/{name}/loss"] = value.detach()
            if gates_of(term) and columns.gates_TJ is not None:
                facts["gate"] = columns.gates_TJ[:, j]
            for fact, fact_T in () if reads_traces(term) else facts.items():
                own_T = fact_T.float().where(columns.sampled_T, 0.0)
                sums[f"objective/{name}/{fact}"] = own_T.sum()
            total = total + weight_at(term.weight, step) * value
        sums["train/loss"] = total.detach()
        return total, sums

    def _view(
        self,
        head: Distribution,
        columns: Columns,
        step: int,
        now: MethodConfig,
        teacher: Callable[[], Any] | None,
    ) -> View:
        settings: dict[str, Any] = {
            "temperature": self.temperature,
            "valid_vocab_size": self.valid_vocab_size,
        }
        ids = [columns.ids_T[:, None]]
        if columns.teacher_argmax_T is not None:
            ids.append(columns.teacher_argmax_T[:, None])
        topk = needs_of(now).topk
        if topk:
            assert columns.topk_ids_TK is not None, "the plan asks for the teacher's top-k"
            ids.append(columns.topk_ids_TK[:, :topk])
        out_TK, entropy_T = head.logprobs(torch.cat(ids, dim=1), with_entropy=True, **settings)
        student_T, rest_TK = out_TK[:, 0], out_TK[:, 1:]

        def divergence(term: DivergenceTerm) -> Tensor:
            assert teacher is not None, "the plan asks for the teacher's head"
            shared = (
                self.valid_vocab_size if self.shared_vocab_size is None else self.shared_vocab_size
            )
            return head.divergence(
                teacher(),
                kind=term.divergence,
                alpha=term.alpha,
                beta=term.beta,
                temperature=self.temperature,
                valid_vocab_size=shared,
            )

        return View(
            columns, step, student_T,
            argmax_T=rest_TK[:, 0] if columns.teacher_argmax_T is not None else student_T[:0],
            topk_TK=rest_TK[:, rest_TK.shape[1] - topk :],
            entropy_T=entropy_T,
            old_T=student_T.detach() if columns.old_logprobs_T is None else columns.old_logprobs_T,
            divergence=divergence,
        )  # fmt: skip


def _value(term: Term, j: int, view: View) -> tuple[Tensor, dict[str, Tensor]]:
    """A term's loss per token, and per-token numbers for the metrics."""
    match term:
        case PolicyGradientTerm():
            advantages_T = _advantages(term, j, view)
            policies = Policies(view.student_T, view.old_T, view.columns)
            value_T, clipped_T = policy_gradient(term.ratio, policies, advantages_T)
            return value_T, {"clip_fraction": clipped_T, "advantage": advantages_T}
        case CrossEntropyTerm():
            return -(view.student_T if term.targets == "trace" else view.argmax_T), {}
        case TopKTerm():
            assert view.columns.topk_logprobs_TK is not None, (
                "the plan asks for the teacher's top-k"
            )
            return on_topk(term, view.topk_TK, view.columns.topk_logprobs_TK)
        case DivergenceTerm():
            return view.divergence(term), {}
        case EntropyTerm():
            return -view.entropy_T, {}
        case _:
            assert_never(term)


def _advantages(term: PolicyGradientTerm, j: int, view: View) -> Tensor:
    """Float32 [T], detached."""
    columns, step = view.columns, view.step
    assert columns.advantages_TJ is not None, "every method with a policy gradient has this column"
    total_T = columns.advantages_TJ[:, j]
    factors = []
    for advantage in term.advantages.values():
        weight = weight_at(advantage.weight, step)
        match advantage:
            case RewardAdvantage() | ProcessRewardAdvantage():
                pass  # in the column: known before the update
            case LogRatioAdvantage():
                if not of_sequence(advantage):
                    total_T = total_T + weight * transformed(_delta(advantage, view), advantage)
            case ShapingAdvantage():
                total_T = total_T + weight * _shaping(advantage, view)
            case TopKAdvantage(k=k):
                assert columns.topk_logprobs_TK is not None, "the plan asks for the teacher's top-k"
                student_TK = view.topk_TK[:, :k].detach()
                teacher_TK = columns.topk_logprobs_TK[:, :k]
                kl_T = truncated_forward_kl(student_TK, teacher_TK, tail="none").loss_T
                total_T = total_T - weight * kl_T
            case LogRatioFactor():
                factors.append((weight, advantage.clip))
            case _:
                assert_never(advantage)
    for weight, clip in factors:
        assert columns.teacher_logprobs_T is not None, "the plan asks for the teacher"
        ratio_T = log_ratio(columns.teacher_logprobs_T, view.old_T)
        total_T = total_T * factor(total_T, ratio_T, weight, clip)
    return total_T


def _delta(advantage: LogRatioAdvantage, view: View) -> Tensor:
    columns = view.columns
    model_T = (
        columns.teacher_logprobs_T if advantage.model == "teacher" else columns.reference_logprobs_T
    )
    assert model_T is not None, "the plan asks for the model"
    anchors = {"current": view.student_T, "old": view.old_T, "rollout": columns.rollout_logprobs_T}
    anchor_T = anchors[advantage.anchor]
    assert anchor_T is not None, "sampled tokens have the sampler's logprobs"
    return log_ratio(model_T, anchor_T)


def _shaping(advantage: ShapingAdvantage, view: View) -> Tensor:
    columns = view.columns
    assert columns.teacher_argmax_T is not None and columns.teacher_logprobs_T is not None
    match advantage.signal:
        case "argmax_logprob":
            return view.argmax_T.detach()
        case "argmax_indicator":
            return (columns.ids_T == columns.teacher_argmax_T).float()
        case "teacher_logprob":
            return columns.teacher_logprobs_T.clamp(min=LOWEST)
        case _:
            assert_never(advantage.signal)


def _common_sums(view: View, counted_T: Tensor) -> dict[str, Tensor]:
    columns, old_T = view.columns, view.old_T
    count = lambda values_T: values_T.float().where(counted_T, 0.0).sum()  # noqa: E731
    sums = {
        "tokens": counted_T.float().sum(),
        "student/entropy/mean": count(view.entropy_T.detach()),
    }
    if columns.rollout_logprobs_T is not None:
        difference_T = old_T - columns.rollout_logprobs_T
        if columns.drawn_T is not None:  # the engine has no logprob of the other tokens
            difference_T = difference_T.where(columns.drawn_T, 0.0)
        sums["mismatch/logprob_abs/mean"] = count(difference_T.abs())
        # k3 estimate of KL(rollout engine || trainer): non-negative, zero only when equal
        sums["mismatch/kl/mean"] = count(difference_T.expm1() - difference_T)
    if columns.teacher_argmax_T is not None and columns.teacher_logprobs_T is not None:
        sums["teacher/agreement/mean"] = count(columns.ids_T == columns.teacher_argmax_T)
        sums["teacher/log_ratio/mean"] = count(log_ratio(columns.teacher_logprobs_T, old_T))
    return sums


def finish(sums: dict[str, float]) -> dict[str, float]:
    """Sums over all micro-batches and replicas -> the metrics of the update: all but losses are
    means over tokens."""
    tokens = max(sums.pop("tokens"), 1.0)
    whole = lambda name: name.startswith("train/") or name.endswith("/loss")  # noqa: E731
    return {name: value if whole(name) else value / tokens for name, value in sums.items()}
