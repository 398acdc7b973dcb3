"""Causal attention over packed sequences, context-parallel too, without Transformer Engine."""

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

# In torch 2.11 the kernel shares key-value heads by itself, and has no such argument.
_HAS_ENABLE_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters


class PackedAttention(torch.nn.Module):
    """Attention with grouped queries: a token attends to the tokens of its sequence up to itself.

    Under context parallelism each rank gathers the keys and values of the others, and the backward
    pass adds up all ranks' gradients of them.
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
        self.softmax_scale = softmax_scale
        self.cp_group = pg_collection.cp

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
        query_SHD = query_S1HD.squeeze(1)
        key_UGD = key_S1GD.squeeze(1)
        value_UGD = value_S1GD.squeeze(1)
        if packed_seq_params.keys_U is not None:
            key_UGD = self._of_all_ranks(key_UGD, packed_seq_params.keys_U)
            value_UGD = self._of_all_ranks(value_UGD, packed_seq_params.keys_U)
        out_SHD = causal_attention(query_SHD, key_UGD, value_UGD, segments, self.softmax_scale)
        return out_SHD.flatten(1).unsqueeze(1)

    def _of_all_ranks(self, x_SGD: Tensor, rows_U: Tensor) -> Tensor:
        """Rows of all ranks' keys or values, one after the other."""
        gathered = gather_from_sequence_parallel_region(
            x_SGD, tensor_parallel_output_grad=True, group=self.cp_group
        )
        return gathered.index_select(0, rows_U)


def causal_attention(
    query_THD: Tensor, key_UGD: Tensor, value_UGD: Tensor, segments: Segments, scale: float | None
) -> Tensor:
    """Attention within each segment, [T, H, D].

    The last query of a segment sees up to its last key, the query before up to the key before, and
    so on. H query heads share G key-value heads. On CUDA in 16 bits torch has FlashAttention's
    kernel for packed rows; elsewhere the segments are padded to a batch.
    """
    queries = segments.queries
    keys = segments.keys
    shares_heads = query_THD.shape[1] != key_UGD.shape[1]
    if query_THD.is_cuda and query_THD.dtype != torch.float32:
        gqa = {"enable_gqa": shares_heads} if _HAS_ENABLE_GQA else {}
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
            **gqa,  # type: ignore[arg-type]
        )  # type: ignore[return-value]
    whole = keys is queries
    out_BHQD = scaled_dot_product_attention(
        _batch(query_THD, queries),
        _batch(key_UGD, keys),
        _batch(value_UGD, keys),
        attn_mask=None if whole else segments.visible,
        is_causal=whole,
        scale=scale,
        enable_gqa=shares_heads,
    )
    out_THD = out_BHQD.transpose(1, 2).flatten(0, 1)
    return out_THD if queries.equal else out_THD.index_select(0, queries.packed)


def _batch(x_THD: Tensor, runs: Runs) -> Tensor:
    """Runs of rows as a batch [B, H, longest, D], which is a view if all are equally long."""
    rows_THD = x_THD if runs.equal else x_THD.index_select(0, runs.padded)
    return rows_THD.unflatten(0, (len(runs.lengths), -1)).transpose(1, 2)
