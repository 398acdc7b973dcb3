"""A model trained beside the student, whose log-ratio to the reference rewards tokens (PRIME)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_opd.architectures.architecture import Architecture
from megatron_opd.contracts.rows import Row
from megatron_opd.mcore.batch import Columns
from megatron_opd.mcore.parallel import Parallel
from megatron_opd.methods.advantages import ProcessRewardAdvantage
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.trainer.step import MicroBatchLoss, student_signals, update
from megatron_opd.trainer.student import Student, prepare


@dataclass
class ProcessModel:
    """A model of the student's architecture, layout and first weights, with its own optimizer."""

    model: Student
    objective: MicroBatchLoss
    micro_batch_tokens: int
    temperature: float

    def logprobs(self, rows: Sequence[Row]) -> np.ndarray:
        """The completion tokens' logprobs under the present weights, float32 [T], on every rank.

        Collective.
        """
        settings = {"temperature": self.temperature, "micro_batch_tokens": self.micro_batch_tokens}
        return student_signals(self.model, rows, **settings).logprobs_T  # type: ignore[arg-type]

    def learn(self, rows: Sequence[Row], columns: Columns, *, step: int) -> dict[str, float]:
        """Makes one update on a step's completions, and returns its metrics. Collective.

        An update with non-finite gradients is skipped and counted.
        """
        sums, applied = update(
            self.model,
            rows,
            columns,
            self.objective,
            step=step,
            micro_batch_tokens=self.micro_batch_tokens,
        )
        return {
            "process_reward/loss": sums["loss"],
            "process_reward/accuracy": sums["accuracy"],
            "process_reward/grad_norm": sums["train/grad_norm"],
            "process_reward/skipped_updates": float(not applied),
        }


def prepare_process_model(
    chunks: list[torch.nn.Module], arch: Architecture, parallel: Parallel, config: RunConfig,
    advantage: ProcessRewardAdvantage,
) -> Student:  # fmt: skip
    """Wraps loaded chunks, with the student's optimizer settings but a constant learning rate.

    Learning rate and clip are the advantage's.
    """
    optimizer = replace(
        config.train.optimizer,
        lr=advantage.lr,
        clip_grad=advantage.clip_grad,
        schedule="constant",
        min_lr=0.0,
    )
    settings = replace(config.train, optimizer=optimizer, updates_per_step=1)
    return prepare(chunks, arch, parallel, replace(config, train=settings))
