"""A model's next-token distribution at the positions that predict completion tokens.

Losses and the teacher read it. Only these positions meet the output layer; prompts and padding have
no logits.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_opd.contracts.merged_ids import MergedIds
from megatron_opd.vocab_parallel import (
    TeacherTopK,
    divergence,
    linear_logprobs,
    linear_topk,
    logprobs,
    merge_logits,
    rows_of,
)


@dataclass(frozen=True)
class Head:
    """Hidden states at T positions and the output layer they go through."""

    hidden_TD: Tensor
    weight_VD: Tensor  # this rank's rows
    group: dist.ProcessGroup
    sums_hidden_grad: bool  # the backward pass of `hidden_TD` adds up over tensor-parallel ranks
    fused: bool
    merged: MergedIds | None = None  # a teacher's ids whose probability another id gets

    def logprobs(self, ids_TK: Tensor, *, temperature: float, valid_vocab_size: int) -> Tensor:
        """The logprobs of `vocab_parallel.logprobs`, with fused output layer if `fused`."""
        out_TK = self._ask(ids_TK, temperature, valid_vocab_size, with_entropy=False)
        assert isinstance(out_TK, Tensor)
        return out_TK

    def logprobs_and_entropy(
        self, ids_TK: Tensor, *, temperature: float, valid_vocab_size: int
    ) -> tuple[Tensor, Tensor]:
        """The same, and the entropy of every position's distribution, [T]."""
        out_TK, entropy_T = self._ask(ids_TK, temperature, valid_vocab_size, with_entropy=True)
        return out_TK, entropy_T

    def _ask(
        self, ids_TK: Tensor, temperature: float, valid_vocab_size: int, *, with_entropy: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        if self.fused:
            return linear_logprobs(
                self.hidden_TD,
                self.weight_VD,
                ids_TK,
                self.group,
                temperature=temperature,
                valid_vocab_size=valid_vocab_size,
                with_entropy=with_entropy,
                reduce_hidden_grad=not self.sums_hidden_grad,
            )
        return logprobs(
            self._logits(),
            ids_TK,
            self.group,
            temperature=temperature,
            valid_vocab_size=valid_vocab_size,
            with_entropy=with_entropy,
            # Nothing else reads these logits, so their gradient may take their place.
            reuse_logits_for_grad=True,
        )

    def divergence(
        self,
        teacher: "Head",
        *,
        kind: str,
        alpha: float | None,
        beta: float | None,
        temperature: float,
        valid_vocab_size: int,
    ) -> Tensor:
        """The divergence of `vocab_parallel.divergence` from a teacher.

        Both models' logits exist at once, fused or not. Ends that the teacher alone has are left
        out on both sides, since the teacher does not tell the student's end from them.
        """
        width = len(self.weight_VD)
        first_id = self.group.rank() * width
        student_logits_TV = self._logits()
        with torch.no_grad():
            teacher_logits_TV = teacher.hidden_TD @ self._same_rows(teacher).T
            if teacher.merged:
                merge_logits(
                    teacher_logits_TV,
                    teacher.hidden_TD,
                    rows_of(teacher.weight_VD, teacher.merged, teacher.group),
                    teacher.merged,
                    first_id=first_id,
                    temperature=temperature,
                )
                columns = [index - first_id for index in teacher.merged.ids]
                own = [column for column in columns if 0 <= column < width]
                # The divergence's own backward pass makes the gradient from the changed logits.
                student_logits_TV.detach()[:, own] = -torch.inf
        return divergence(
            student_logits_TV,
            teacher_logits_TV,
            self.group,
            kind=kind,
            alpha=alpha,
            beta=beta,
            temperature=temperature,
            valid_vocab_size=valid_vocab_size,
        )

    def _same_rows(self, teacher: "Head") -> Tensor:
        """The rows of the teacher's output layer for this rank's ids.

        The teacher has as many shards as the student, or one with all rows.
        """
        width = len(self.weight_VD)
        if teacher.group.size() == self.group.size() and len(teacher.weight_VD) == width:
            return teacher.weight_VD
        assert teacher.group.size() == 1, "checked before the run"
        rows_VD = teacher.weight_VD[self.group.rank() * width :][:width]
        # The rows added are padding, whose ids have probability 0.
        return torch.nn.functional.pad(rows_VD, (0, 0, 0, width - len(rows_VD)))

    def _logits(self) -> Tensor:
        hidden_TD = self.hidden_TD
        if not self.sums_hidden_grad:
            hidden_TD = copy_to_tensor_model_parallel_region(hidden_TD, group=self.group)
        return hidden_TD @ self.weight_VD.T

    def topk(
        self, k: int, ids_TJ: Tensor, *, temperature: float, valid_vocab_size: int
    ) -> TeacherTopK:
        """The result of `vocab_parallel.topk`.

        The output layer is always fused, which costs nothing without a backward pass.
        """
        return linear_topk(
            self.hidden_TD, self.weight_VD, k, self.group, ids_TJ=ids_TJ,
            temperature=temperature, valid_vocab_size=valid_vocab_size, merged=self.merged,
        )  # fmt: skip


def make_head(
    predict_T: Tensor,
    group: dist.ProcessGroup,
    fused: bool,
    *,
    hidden_states: Tensor,
    output_layer: ColumnParallelLinear,
    output_weight: Tensor | None,
    **_: object,
) -> Head:
    """Megatron's `output_processor`: called on the last stage in the place of the output layer."""
    hidden_S1D = hidden_states
    sequence_parallel = output_layer.sequence_parallel
    if sequence_parallel:
        hidden_S1D = gather_from_sequence_parallel_region(
            hidden_S1D, tensor_parallel_output_grad=True, group=group
        )
    hidden_TD = hidden_S1D[predict_T, 0]
    weight_VD = output_layer.weight if output_weight is None else output_weight
    return Head(hidden_TD, weight_VD, group, sums_hidden_grad=sequence_parallel, fused=fused)
