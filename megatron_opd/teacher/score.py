"""Scores rows with a model. No tensor of size [tokens, vocabulary] leaves a rank."""

import contextlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.architectures.architecture import Architecture
from megatron_opd.contracts.merged_ids import MergedIds
from megatron_opd.contracts.rows import Row
from megatron_opd.contracts.signals import TeacherSignals
from megatron_opd.mcore import passes
from megatron_opd.mcore.batch import MicroBatch, micro_batches, token_offsets
from megatron_opd.mcore.head import Head
from megatron_opd.mcore.offload import HostWeights
from megatron_opd.mcore.parallel import Parallel


class Scorer:
    """A model with a layout of its own, as it is at the moment: nothing of it is changed.

    Args:
        chunks: this rank's model chunks, with weights.
        student_vocab_size: ids from this number on do not exist for the student, and are never
            targets.
        merged: ends that the student lacks, which count as one of its own in all signals.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        arch: Architecture,
        parallel: Parallel,
        *,
        student_vocab_size: int,
        micro_batch_tokens: int,
        temperature: float,
        merged: MergedIds | None = None,
    ) -> None:
        self.chunks = list(chunks)
        self.parallel = parallel
        self.vocab_size = min(arch.vocab_size, student_vocab_size)
        self.micro_batch_tokens = micro_batch_tokens
        self.temperature = temperature
        self.merged = merged

    @torch.no_grad()
    def score(self, rows: Sequence[Row], topk: int = 0) -> TeacherSignals:
        """Argmax id, logprob of the student's token, entropy and top-k at every completion token.

        Every rank passes the same rows and receives all signals: collective over the world. Each
        replica of the model scores its share; one sum of [T, 3 + 2 topk] numbers joins the
        results, to which one rank per replica contributes.
        """
        batches = micro_batches(rows, self.parallel, self.micro_batch_tokens)
        scored = passes.forward_backward(
            self.chunks, self.parallel, batches, self._signals(rows, topk), forward_only=True
        )
        total = int(token_offsets(rows)[-1])
        # float32 carries ids exactly up to 2**24.
        out_TX = torch.zeros(total, 3 + 2 * topk, device=self.parallel.device)
        if self.parallel.is_signal_source:
            for batch, values_TX in zip(batches, scored, strict=True):
                out_TX[batch.index_T] = values_TX
        dist.all_reduce(out_TX)
        values = out_TX.cpu().numpy()
        ids_TK = values[:, 3 : 3 + topk].astype(np.int32)
        logprobs_TK = values[:, 3 + topk :].copy()
        return TeacherSignals(
            values[:, 0].astype(np.int32), values[:, 1].copy(), values[:, 2].copy(),
            ids_TK if topk else None, logprobs_TK if topk else None,
        )  # fmt: skip

    @torch.no_grad()
    def head(self, batch: MicroBatch) -> Head:
        """The model's head at the positions of a micro-batch, in a layout of one stage."""
        heads: list[Head] = []

        def keep(_: MicroBatch, head: Head) -> tuple[Tensor, None]:
            heads.append(replace(head, merged=self.merged))
            return head.hidden_TD.new_zeros(()), None

        passes.forward_backward(self.chunks, self.parallel, [batch], keep, forward_only=True)
        return heads[0]

    def _signals(self, rows: Sequence[Row], topk: int) -> passes.LossFunction[Tensor]:
        ids_T = torch.from_numpy(np.concatenate([r.token_ids for r in rows])).long()

        def signals(batch: MicroBatch, head: Head) -> tuple[Tensor, Tensor]:
            ids_T1 = ids_T[batch.index_T, None].to(self.parallel.device)
            head = replace(head, merged=self.merged)
            best = head.topk(
                max(topk, 1), ids_T1, temperature=self.temperature, valid_vocab_size=self.vocab_size
            )
            columns = [best.ids_TK[:, :1], best.logprobs_TJ, best.entropy_T[:, None]]
            columns += [best.ids_TK[:, :topk], best.logprobs_TK[:, :topk]]
            out_TX = torch.cat([column.float() for column in columns], dim=1)
            return out_TX.new_zeros(()), out_TX

        return signals


class MegatronTeacher(Scorer):
    """A frozen model.

    Args:
        offload: keep the weights in host memory between calls of `score`; `head` cannot be used
            then.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        arch: Architecture,
        parallel: Parallel,
        *,
        student_vocab_size: int,
        micro_batch_tokens: int,
        temperature: float,
        merged: MergedIds | None = None,
        offload: bool = False,
    ) -> None:
        super().__init__(
            chunks,
            arch,
            parallel,
            student_vocab_size=student_vocab_size,
            micro_batch_tokens=micro_batch_tokens,
            temperature=temperature,
            merged=merged,
        )
        for chunk in chunks:
            chunk.requires_grad_(False).eval()
        self._host_weights = HostWeights(chunks, parallel.device) if offload else None

    def score(self, rows: Sequence[Row], topk: int = 0) -> TeacherSignals:
        with self._host_weights.on_device() if self._host_weights else contextlib.nullcontext():
            return super().score(rows, topk)
