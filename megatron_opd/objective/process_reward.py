"""The loss of PRIME's process model, which tells right responses from wrong ones (arXiv 2502.01456,
section 3).

A response's logit is beta times the sum over its tokens of log p_process - log p_reference; the
loss is the cross-entropy of its sigmoid with the verifier's reward, averaged over the responses.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_opd.mcore.batch import Columns
from megatron_opd.mcore.head import Head
from megatron_opd.objective.batch import Batch


def process_columns(batch: Batch) -> Columns:
    """The columns of the process model's update. `advantages_TJ` [T, 1] holds the reward,
    `scales_TJ` 1 / responses."""
    rewards_N = np.array([r.episode.reward for r in batch.rows], dtype=np.float32)
    ids_T = np.concatenate([r.token_ids for r in batch.rows])
    return Columns(
        ids_T=torch.from_numpy(ids_T).long(),
        scales_TJ=torch.full((batch.num_tokens, 1), 1.0 / len(batch.rows)),
        sequence_T=batch.sequence_T,
        sources_T=batch.sources_T,
        advantages_TJ=torch.from_numpy(np.repeat(rewards_N, batch.tokens_N))[:, None],
        reference_logprobs_T=batch.logprob("reference").float(),
    )


@dataclass(frozen=True)
class ProcessRewardObjective:
    """The loss of the process model on the responses of a micro-batch; called as
    `objective.loss.Objective` is."""

    beta: float
    valid_vocab_size: int
    temperature: float

    def __call__(
        self,
        head: Head,
        columns: Columns,
        step: int,
        teacher: Callable[[], Head] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (a scalar to differentiate), and sums over the responses for the metrics
        (detached)."""
        assert columns.reference_logprobs_T is not None and columns.advantages_TJ is not None
        logprobs_T1 = head.logprobs(
            columns.ids_T[:, None],
            temperature=self.temperature,
            valid_vocab_size=self.valid_vocab_size,
        )
        present, sequence_T = columns.sequence_T.unique(return_inverse=True)
        reward_T = (logprobs_T1[:, 0] - columns.reference_logprobs_T).where(columns.sampled_T, 0.0)
        logits_N = self.beta * reward_T.new_zeros(len(present)).index_add(0, sequence_T, reward_T)
        # The same number at every token of a response.
        facts_T2 = torch.stack([columns.advantages_TJ[:, 0], columns.scales_TJ[:, 0]], dim=1).to(
            logits_N.dtype
        )
        labels_N, scales_N = (
            facts_T2.new_empty(len(present), 2).index_copy(0, sequence_T, facts_T2).unbind(1)
        )
        loss_N = torch.nn.functional.binary_cross_entropy_with_logits(
            logits_N, labels_N, reduction="none"
        )
        loss = (scales_N * loss_N).sum()
        right_N = (logits_N.detach() > 0) == (labels_N > 0.5)
        return loss, {"loss": loss.detach(), "accuracy": (scales_N * right_N).sum()}
