"""The loss of one micro-batch: arithmetic on the student's log-probabilities at a few ids per
token.

Every term gives one number per token. Each is summed with scales that already hold gates and 1 /
(global denominator), so the losses and gradients of micro-batches and replicas add up.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_opd.mcore.batch import Columns
from megatron_opd.mcore.head import Head
from megatron_opd.methods.method import MethodConfig
from megatron_opd.methods.needs import active, needs_of
from megatron_opd.methods.part import Needs
from megatron_opd.methods.schedules import weight_at
from megatron_opd.objective.columns import gates_at
from megatron_opd.objective.view import View


@dataclass(frozen=True)
class Objective:
    """A method at work on a student.

    Args:
        valid_vocab_size: ids from here on are padding.
        shared_vocab_size: ids from here on are no tokens of the teacher's, and divergences leave
            them out; None: the teacher has all.
        temperature: of sampling; the student's distribution is taken at the same one.
    """

    method: MethodConfig
    valid_vocab_size: int
    temperature: float
    shared_vocab_size: int | None = None

    def weights(self, step: int) -> dict[str, float]:
        return {name: weight_at(term.weight, step) for name, term in self.method.terms.items()}

    def __call__(
        self,
        head: Head,
        columns: Columns,
        step: int,
        teacher: Callable[[], Head] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of these tokens (a scalar to differentiate) and sums for the metrics (float32
        scalars, detached).

        head: the student at the positions that predict the T completion tokens of `columns`.
        teacher: makes the teacher's head at the same positions, for terms on the whole vocabulary.
        """
        now = active(self.method, step)
        view = self._view(head, columns, step, needs_of(now), teacher)
        # Means are of the student's own tokens, or, for a method on traces alone, of theirs.
        counted_T = columns.sampled_T
        if not needs_of(self.method).rollouts:
            counted_T = columns.written_T
        sums = _common_sums(view, counted_T)
        # Something to differentiate even where no term is active.
        total = 0.0 * view.student_T.nan_to_num(neginf=0.0).sum()
        for j, name in enumerate(self.method.terms):
            term = now.terms.get(name)
            if term is None:
                continue
            assert columns.gates_TJ is not None and columns.advantages_TJ is not None
            value_T, facts = term.loss(view, columns.advantages_TJ[:, j])
            within_T = gates_at(term.gates, view, "within")
            scale_T = columns.scales_TJ[:, j] * within_T
            # The value of a token that does not count may be infinite: NaN, with a scale of 0.
            value = (scale_T * value_T.where(scale_T != 0, 0.0)).sum()
            sums[f"objective/{name}/loss"] = value.detach()
            if term.gates:
                facts["gate"] = columns.gates_TJ[:, j] * within_T
            for fact, fact_T in () if term.of_traces else facts.items():
                own_T = fact_T.float().where(columns.sampled_T, 0.0)
                sums[f"objective/{name}/{fact}"] = own_T.sum()
            total = total + weight_at(term.weight, step) * value
        sums["train/loss"] = total.detach()
        return total, sums

    def _view(
        self,
        head: Head,
        columns: Columns,
        step: int,
        needs: Needs,
        teacher: Callable[[], Head] | None,
    ) -> View:
        """Asks the student, in one pass over its vocabulary, for all ids that a term reads."""
        ids = [columns.ids_T[:, None]]
        if needs.argmax:
            assert columns.teacher_argmax_T is not None, "its needs name the teacher's argmax"
            ids.append(columns.teacher_argmax_T[:, None])
        if needs.topk:
            assert columns.topk_ids_TK is not None, "its needs name the teacher's top k"
            ids.append(columns.topk_ids_TK[:, : needs.topk])
        out_TK, entropy_T = head.logprobs_and_entropy(
            torch.cat(ids, dim=1),
            temperature=self.temperature,
            valid_vocab_size=self.valid_vocab_size,
        )

        def divergence(kind: str, alpha: float | None, beta: float | None) -> Tensor:
            assert teacher is not None, "a part reads the teacher's whole distribution: its needs"
            shared = self.shared_vocab_size
            return head.divergence(
                teacher(),
                kind=kind,
                alpha=alpha,
                beta=beta,
                temperature=self.temperature,
                valid_vocab_size=self.valid_vocab_size if shared is None else shared,
            )

        return View(
            columns,
            step,
            student_T=out_TK[:, 0],
            argmax_T=out_TK[:, 1] if needs.argmax else None,
            topk_TK=out_TK[:, out_TK.shape[1] - needs.topk :],
            entropy_T=entropy_T,
            divergence_of=divergence,
        )


def _common_sums(view: View, counted_T: Tensor) -> dict[str, Tensor]:
    columns = view.columns
    old_T = view.logprob("old")
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
        sums["teacher/agreement/mean"] = count(view.is_argmax_T)
        sums["teacher/log_ratio/mean"] = count(view.log_ratio("teacher", "old"))
    return sums


def finish(sums: dict[str, float]) -> dict[str, float]:
    """Sums over all micro-batches and replicas -> the metrics of the update: all but losses are
    means over tokens."""
    tokens = max(sums.pop("tokens"), 1.0)
    whole = lambda name: name.startswith("train/") or name.endswith("/loss")  # noqa: E731
    return {name: value if whole(name) else value / tokens for name, value in sums.items()}
