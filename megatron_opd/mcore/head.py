"""A model's next-token distribution at the positions a micro-batch asks about: what losses and the
teacher work with.

Only the positions that predict a completion token meet the output layer; prompts and padding have
no logits.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
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
    # whether the backward pass of `hidden_TD` adds up over the tensor-parallel ranks
    sums_hidden_grad: bool
    fused: bool
    merged: MergedIds | None = None  # of a teacher: ids whose probability another one gets

    def logprobs(
        self,
        ids_TK: Tensor,
        *,
        temperature: float,
        valid_vocab_size: int,
        with_entropy: bool = False,
    ) -> Any:
        """See `vocab_parallel.logprobs`; through the fused output layer if the head is `fused`."""
        settings: dict[str, Any] = {
            "temperature": temperature,
            "valid_vocab_size": valid_vocab_size,
            "with_entropy": with_entropy,
        }
        if self.fused:
            reduce = not self.sums_hidden_grad
            return linear_logprobs(
                self.hidden_TD,
                self.weight_VD,
                ids_TK,
                self.group,
                reduce_hidden_grad=reduce,
                **settings,
            )
        # Nobody else has these logits: their gradient takes their place.
        return logprobs(self._logits(), ids_TK, self.group, reuse_logits_for_grad=True, **settings)

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
        """See `vocab_parallel.divergence`; both models' logits exist at once, whether or not the
        head is fused.

        Ends that the teacher alone has are left out on both sides: of what they are to the student
        it says nothing.
        """
        first_id, width = self.group.rank() * len(self.weight_VD), len(self.weight_VD)
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
                here = [
                    index - first_id
                    for index in teacher.merged.ids
                    if 0 <= index - first_id < width
                ]
                # Of these logits, which nobody else has, the divergence's own backward pass makes
                # the gradient.
                student_logits_TV.detach()[:, here] = -torch.inf
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
        """The rows of the teacher's output layer for this rank's ids; a teacher of one shard holds
        them all."""
        width = len(self.weight_VD)
        if teacher.group.size() == self.group.size() and len(teacher.weight_VD) == width:
            return teacher.weight_VD
        assert teacher.group.size() == 1, "checked before the run"
        rows_VD = teacher.weight_VD[self.group.rank() * width :][:width]
        # padding ids have probability 0
        return torch.nn.functional.pad(rows_VD, (0, 0, 0, width - len(rows_VD)))

    def _logits(self) -> Tensor:
        hidden_TD = self.hidden_TD
        if not self.sums_hidden_grad:
            hidden_TD = copy_to_tensor_model_parallel_region(hidden_TD, group=self.group)
        return hidden_TD @ self.weight_VD.T

    def topk(
        self, k: int, ids_TJ: Tensor, *, temperature: float, valid_vocab_size: int
    ) -> TeacherTopK:
        """See `vocab_parallel.topk`; always fused, since without a backward pass that costs
        nothing."""
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
    output_layer: Any,
    output_weight: Tensor | None,
    **_: Any,
) -> Head:
    """Megatron's `output_processor`: called on the last stage in the place of the output layer."""
    hidden_S1D, sequence_parallel = hidden_states, output_layer.sequence_parallel
    if sequence_parallel:
        hidden_S1D = gather_from_sequence_parallel_region(
            hidden_S1D, tensor_parallel_output_grad=True, group=group
        )
    hidden_TD = hidden_S1D[predict_T, 0]
    weight_VD = output_layer.weight if output_weight is None else output_weight
    return Head(hidden_TD, weight_VD, group, sums_hidden_grad=sequence_parallel, fused=fused)
