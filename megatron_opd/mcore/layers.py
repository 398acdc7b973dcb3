"""Layers for machines without Transformer Engine: a norm that knows sequence parallelism."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import rms_norm


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension.

    Its weight is replicated over tensor-parallel ranks. Under sequence parallelism every rank sees
    other tokens, and `weight.sequence_parallel` tells Megatron to add up the gradients.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, (x.shape[-1],), self.weight, self.eps)
