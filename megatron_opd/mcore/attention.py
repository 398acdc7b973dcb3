"""Causal attention over packed sequences for machines without Transformer Engine, with context
parallelism."""

import inspect

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from megatron_opd.mcore.packing import Packing, Runs, Segments

# In torch 2.11 the kernel shares key-value heads without being told, and has no such argument.
_TOLD_OF_SHARED_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters


class PackedAttention(torch.nn.Module):
    """Every token attends to those of its own sequence up to itself; grouped queries.

    Under context parallelism each rank gathers the keys and values of the others: the backward pass
    adds up what the ranks say of them.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        assert pg_collection is not None, "the model is built with its groups"
        self.softmax_scale, self.cp_group = softmax_scale, pg_collection.cp

    def forward(
        self,
        query_S1HD: Tensor,
        key_S1GD: Tensor,
        value_S1GD: Tensor,
        attention_mask: Tensor | None,
        /,
        *,
        attn_mask_type: AttnMaskType,
        attention_bias: Tensor | None = None,
        packed_seq_params: Packing,
    ) -> Tensor:
        segments = packed_seq_params.segments
        assert segments is not None, "made by Packing.of"
        query, key, value = (x.squeeze(1) for x in (query_S1HD, key_S1GD, value_S1GD))
        if packed_seq_params.keys_U is not None:
            key, value = (
                self._of_all_ranks(x).index_select(0, packed_seq_params.keys_U)
                for x in (key, value)
            )
        out_SHD = causal_attention(query, key, value, segments, self.softmax_scale)
        return out_SHD.flatten(1).unsqueeze(1)

    def _of_all_ranks(self, x: Tensor) -> Tensor:
        return gather_from_sequence_parallel_region(
            x, tensor_parallel_output_grad=True, group=self.cp_group
        )


def causal_attention(
    query_THD: Tensor, key_UGD: Tensor, value_UGD: Tensor, segments: Segments, scale: float | None
) -> Tensor:
    """Attention within each segment, [T, H, D]; the last query of a segment sees its last key, and
    so on backwards.

    H query heads share G key-value heads. FlashAttention's kernel for such rows where torch has it
    (CUDA, 16 bits); elsewhere a padded batch.
    """
    queries, keys, shares_heads = (
        segments.queries,
        segments.keys,
        query_THD.shape[1] != key_UGD.shape[1],
    )
    if query_THD.is_cuda and query_THD.dtype != torch.float32:
        told = {"enable_gqa": shares_heads} if _TOLD_OF_SHARED_HEADS else {}
        return varlen_attn(
            query_THD,
            key_UGD,
            value_UGD,
            queries.bounds,
            keys.bounds,
            queries.longest,
            keys.longest,
            scale=scale,
            window_size=(-1, 0),
            **told,  # type: ignore[arg-type]
        )  # type: ignore[return-value]
    query_BHQD, key_BGKD, value_BGKD = (
        _batch(x, runs) for x, runs in ((query_THD, queries), (key_UGD, keys), (value_UGD, keys))
    )
    whole = keys is queries
    out_BHQD = scaled_dot_product_attention(
        query_BHQD,
        key_BGKD,
        value_BGKD,
        attn_mask=None if whole else segments.visible,
        is_causal=whole,
        scale=scale,
        enable_gqa=shares_heads,
    )
    out_THD = out_BHQD.transpose(1, 2).flatten(0, 1)
    return out_THD if queries.equal else out_THD.index_select(0, queries.packed)


def _batch(x_THD: Tensor, runs: Runs) -> Tensor:
    """Runs of rows as a batch [B, H, longest, D]: a view where they are equally long."""
    rows_THD = x_THD if runs.equal else x_THD.index_select(0, runs.padded)
    return rows_THD.unflatten(0, (len(runs.lengths), -1)).transpose(1, 2)
