"""One optimizer update, and the updates of a step."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor

from megatron_opd.contracts.rows import Row
from megatron_opd.contracts.signals import StudentSignals
from megatron_opd.errors import RunError
from megatron_opd.mcore import passes
from megatron_opd.mcore.batch import Columns, MicroBatch, flatten, micro_batches, token_offsets
from megatron_opd.mcore.head import Head
from megatron_opd.mcore.parallel import Parallel
from megatron_opd.trainer.student import Student

# Takes head, columns, step, and the teacher's head if a term needs it; returns the loss, and sums
# for the metrics.
MicroBatchLoss = Callable[
    [Head, Columns, int, Callable[[], Head] | None], tuple[Tensor, dict[str, Tensor]]
]
TeacherHead = Callable[[MicroBatch], Head]


def update(
    student: Student,
    rows: Sequence[Row],
    columns: Columns,
    objective: MicroBatchLoss,
    *,
    step: int,
    micro_batch_tokens: int,
    teacher_head: TeacherHead | None = None,
) -> tuple[dict[str, float], bool]:
    """Makes one update on `rows`: forward, backward and optimizer step. Collective.

    Returns the metric sums over all micro-batches and replicas, equal on every rank, and True, or
    False for an update that was skipped because the gradients are not finite. The sums have
    `train/grad_norm` (before clipping, without a loss scale) and `train/learning_rate`, and in
    float16 this update's `train/loss_scale`.
    """
    parallel = student.parallel
    for chunk in student.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    student.optimizer.zero_grad()

    def loss(batch: MicroBatch, head: Head) -> tuple[Tensor, dict[str, Tensor]]:
        teacher = partial(teacher_head, batch) if teacher_head else None
        return objective(head, columns.take(batch.index_T, parallel), step, teacher)

    batches = micro_batches(rows, parallel, micro_batch_tokens)
    collected = passes.forward_backward(
        student.chunks,
        parallel,
        batches,
        loss,
        forward_only=False,
        fused_output_layer=student.fused_output_layer,
    )
    sums = _sum_over_ranks(collected, parallel)
    # Stepped before the update, so that a warm-up does not begin with a learning rate of 0.
    student.scheduler.step(1)
    if student.loss_scale:
        sums["train/loss_scale"] = student.loss_scale.value
    norm, applied = _apply(student)
    sums["train/grad_norm"] = norm
    sums["train/learning_rate"] = student.optimizer.param_groups[0]["lr"]
    return sums, applied


def _apply(student: Student) -> tuple[float, bool]:
    """The gradients' norm, and True if the update was made.

    These are the steps of `optimizer.step()`, except that a norm that is not finite skips the
    update.
    """
    optimizer = student.optimizer
    with student.parallel.active():
        overflow = optimizer.prepare_grads()  # divides by the loss scale, so it must happen once
        if student.loss_scale:
            student.loss_scale.finish_update()
        norm = math.inf if overflow else float(optimizer.get_grad_norm())
        if not math.isfinite(norm):
            return norm, False
        if optimizer.config.clip_grad > 0:
            parameters = optimizer.get_parameters()
            clip_grad_by_total_norm_fp32(
                parameters, max_norm=optimizer.config.clip_grad, total_norm=norm
            )
        optimizer.step_with_ready_grads()
    return norm, True


def _sum_over_ranks(collected: list[dict[str, Tensor]], parallel: Parallel) -> dict[str, float]:
    """The metric sums over all ranks, also on the ranks that had no logits."""
    names = sorted(collected[0]) if collected else []
    # All ranks must add up the same vector: the last stage knows the names, the first may not.
    shared: list[list[str]] = [names]
    dist.broadcast_object_list(shared, src=_last_stage_rank(parallel))
    names = shared[0]
    total = torch.zeros(len(names), dtype=torch.float64, device=parallel.device)
    if parallel.is_signal_source:
        for sums in collected:
            total += torch.stack([sums[name].double() for name in names])
    dist.all_reduce(total)
    return dict(zip(names, total.tolist(), strict=True))


def _last_stage_rank(parallel: Parallel) -> int:
    """The world's last rank, which in every layout is on the last pipeline stage."""
    return dist.get_world_size() - 1


def student_signals(
    student: Student, rows: Sequence[Row], *, temperature: float, micro_batch_tokens: int
) -> StudentSignals:
    """Logprobs of the completion tokens and entropy under the present weights. Collective.

    Both are equal on every rank.
    """
    parallel = student.parallel
    ids_T = flatten([r.token_ids for r in rows], torch.long)

    def signals(batch: MicroBatch, head: Head) -> tuple[Tensor, Tensor]:
        out_T1, entropy_T = head.logprobs_and_entropy(
            ids_T[batch.index_T, None].to(parallel.device),
            temperature=temperature,
            valid_vocab_size=student.arch.vocab_size,
        )
        return out_T1.new_zeros(()), torch.stack([out_T1[:, 0], entropy_T], dim=1)

    batches = micro_batches(rows, parallel, micro_batch_tokens)
    with torch.no_grad():
        collected = passes.forward_backward(
            student.chunks, parallel, batches, signals, forward_only=True,
            fused_output_layer=student.fused_output_layer,
        )  # fmt: skip
    out_T2 = torch.zeros(len(ids_T), 2, device=parallel.device)
    if parallel.is_signal_source:
        for batch, values_T2 in zip(batches, collected, strict=True):
            out_T2[batch.index_T] = values_T2
    dist.all_reduce(out_T2)
    values = out_T2.cpu().numpy()
    return StudentSignals(values[:, 0].copy(), values[:, 1].copy())


class Trainer:
    """The updates of a step, and the count of updates in a row that had to be skipped."""

    def __init__(
        self,
        student: Student,
        objective: MicroBatchLoss,
        *,
        updates_per_step: int,
        micro_batch_tokens: int,
        temperature: float,
        max_skipped: int,
        teacher_head: TeacherHead | None = None,
    ) -> None:
        self.student = student
        self.objective = objective
        self.updates_per_step = updates_per_step
        self.micro_batch_tokens = micro_batch_tokens
        self.temperature = temperature
        self.max_skipped = max_skipped
        self.teacher_head = teacher_head
        self.skipped_in_a_row = 0

    def signals(self, rows: Sequence[Row]) -> StudentSignals:
        """The student's logprobs and entropies of the rows, before the updates. Collective."""
        return student_signals(
            self.student,
            rows,
            temperature=self.temperature,
            micro_batch_tokens=self.micro_batch_tokens,
        )

    def step(
        self, rows: Sequence[Row], build: Callable[[slice, slice], Columns], *, step: int
    ) -> list[dict[str, float]]:
        """Makes the updates of a step, each on its share of whole groups; returns their metrics.

        `build(row_slice, token_slice)` makes the columns of a share. Raises RunError after more
        than `max_skipped` skipped updates in a row. Collective.
        """
        offsets = token_offsets(rows)
        metrics = []
        for chosen in shares_of_groups(rows, self.updates_per_step):
            tokens = slice(int(offsets[chosen.start]), int(offsets[chosen.stop]))
            metrics.append(self._update(rows[chosen], build(chosen, tokens), step))
        return metrics

    def _update(self, rows: Sequence[Row], columns: Columns, step: int) -> dict[str, float]:
        sums, applied = update(
            self.student, rows, columns, self.objective,
            step=step, micro_batch_tokens=self.micro_batch_tokens, teacher_head=self.teacher_head,
        )  # fmt: skip
        # A skipped update is not counted while a smaller loss scale may help.
        searching = self.student.loss_scale is not None and self.student.loss_scale.can_fall
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + (not searching)
        if self.skipped_in_a_row > self.max_skipped:
            raise RunError(
                f"step {step}: {self.skipped_in_a_row} updates in a row had non-finite gradients; "
                "lower train.optimizer.lr or resume from an earlier checkpoint"
            )
        return {**sums, "train/skipped_updates": float(not applied)}


def shares_of_groups(rows: Sequence[Row], updates: int) -> list[slice]:
    """The slice of rows of each update: update u of U has the groups uG/U to (u+1)G/U - 1 of G.

    A group's rows lie together, and groups may differ in size. No row is left out. Raises
    RunError when there are fewer groups than updates.
    """
    groups = [row.group for row in rows]
    starts = [i for i, group in enumerate(groups) if i == 0 or group != groups[i - 1]]
    if len(starts) < updates:
        raise RunError(
            f"train.updates_per_step: {updates} updates of {len(starts)} groups; give fewer updates"
        )
    bounds = [*starts, len(rows)]
    edges = [bounds[update * len(starts) // updates] for update in range(updates + 1)]
    return [slice(first, last) for first, last in pairwise(edges)]
