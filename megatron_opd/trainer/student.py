"""The trained model: Megatron's data-parallel wrapper, optimizer and learning-rate schedule."""

from dataclasses import dataclass

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import get_model_config

from megatron_opd.architectures.architecture import Architecture
from megatron_opd.mcore.model import DTYPES
from megatron_opd.mcore.parallel import Parallel
from megatron_opd.recipe.keys import OptimizerConfig, RunConfig
from megatron_opd.trainer.loss_scale import LossScale
from megatron_opd.trainer.optimizer_state import create_moments


@dataclass
class Student:
    """A trained model on this rank, with its optimizer and schedule: the state of the updates."""

    arch: Architecture
    parallel: Parallel
    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    fused_output_layer: bool
    loss_scale: LossScale | None  # None but in float16

    @property
    def bare_chunks(self) -> list[torch.nn.Module]:
        """The model chunks without Megatron's wrapper, for the weight table."""
        return [chunk.module for chunk in self.chunks]


def data_parallel_config() -> DistributedDataParallelConfig:
    """Megatron's settings of the wrapper: float32 gradients and a sharded optimizer state.

    The state is sharded even for one replica, so that there is one format.
    """
    return DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)


def prepare(
    chunks: list[torch.nn.Module], arch: Architecture, parallel: Parallel, config: RunConfig
) -> Student:
    """Wraps loaded chunks for training.

    All memory that the updates keep is taken afterwards, the optimizer's state included.
    """
    settings = config.train.optimizer
    dtype = DTYPES[config.precision]
    with parallel.active():
        ddp = data_parallel_config()
        wrapped = []
        for chunk in chunks:
            megatron_config = get_model_config(chunk)
            wrapped.append(
                DistributedDataParallel(megatron_config, ddp, chunk, pg_collection=parallel.groups)
            )
        optimizer = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=settings.lr,
                min_lr=settings.min_lr,
                weight_decay=settings.weight_decay,
                adam_beta1=settings.adam_beta1,
                adam_beta2=settings.adam_beta2,
                adam_eps=settings.adam_eps,
                clip_grad=settings.clip_grad,
                bf16=dtype is torch.bfloat16,
                fp16=dtype is torch.float16,
                params_dtype=dtype,
                use_distributed_optimizer=True,
            ),
            wrapped,
            use_gloo_process_groups=False,
            pg_collection=parallel.groups,
        )
        create_moments(optimizer)
    loss_scale = LossScale(config.train.loss_scale) if dtype is torch.float16 else None
    if loss_scale:
        for member in optimizer.chained_optimizers:
            member.grad_scaler = loss_scale
    for chunk in chunks:
        model_config = get_model_config(chunk)
        model_config.finalize_model_grads_func = _finalize
        model_config.grad_scale_func = optimizer.scale_loss
    updates = config.num_steps * config.train.updates_per_step
    scheduler = learning_rates(optimizer, settings, updates)
    return Student(
        arch, parallel, wrapped, optimizer, scheduler, config.train.fused_output_layer, loss_scale
    )


def _finalize(chunks, num_tokens=None, pg_collection=None, **kwargs) -> None:
    """Adds up gradients over replicas and shared parameters.

    The token count has no use: the loss is already divided by its global denominators.
    """
    finalize_model_grads(chunks, None, pg_collection=pg_collection, **kwargs)


def learning_rates(
    optimizer: MegatronOptimizer, settings: OptimizerConfig, updates: int
) -> OptimizerParamScheduler:
    """The schedule, which is stepped before each update.

    With W = max(warmup_steps, 1), update u = 1 .. W has the rate lr u / W. Then the rate falls, and
    would be min_lr at the update after the last one, so that the last update learns even with a
    min_lr of 0.
    """
    warmup_steps = max(settings.warmup_steps, 1)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=warmup_steps,
        lr_decay_steps=max(updates, warmup_steps) + 1,
        lr_decay_style=settings.schedule,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=updates,
        wd_incr_style="constant",
    )
