"""The modules of a transformer layer: Transformer Engine's where they run, else Megatron's local.

The weights of both have one table (`weights/names.py`) and one checkpoint.
"""

from functools import partial

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_opd.architectures.architecture import Architecture
from megatron_opd.mcore.attention import PackedAttention
from megatron_opd.mcore.experts import GroupedExperts
from megatron_opd.mcore.layers import RMSNorm


def uses_transformer_engine(device: torch.device) -> bool:
    """True when the model is made of Transformer Engine's layers, which compute on CUDA alone."""
    return HAVE_TE and device.type == "cuda"


def block_spec(
    arch: Architecture, num_layers: int, device: torch.device
) -> TransformerBlockSubmodules:
    """`num_layers` equal layers, and the norm behind the last one."""
    if uses_transformer_engine(device):
        from megatron.core.extensions.transformer_engine import TENorm

        return TransformerBlockSubmodules(
            [_transformer_engine_layer(arch)] * num_layers, layer_norm=TENorm
        )
    return TransformerBlockSubmodules([_local_layer(arch)] * num_layers, layer_norm=RMSNorm)


def _transformer_engine_layer(arch: Architecture) -> ModuleSpec:
    """A layer whose norms are within the linear layers behind them, except before a router.

    One module holds all experts of a rank.
    """
    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=_num_experts(arch),
        moe_grouped_gemm=arch.experts is not None,
        qk_layernorm=arch.qk_norm,
    )
    if arch.experts:  # the checkpoint's name, which local layers use too
        names = spec.submodules.sharded_state_dict_keys_map
        names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return spec


def _local_layer(arch: Architecture) -> ModuleSpec:
    spec = get_gpt_layer_local_spec(
        num_experts=_num_experts(arch), qk_layernorm=arch.qk_norm, normalization="RMSNorm"
    )
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention = layer.self_attention.submodules
    attention.core_attention = PackedAttention
    if arch.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if arch.experts:
        layer.mlp = partial(MoELayer, submodules=MoESubmodules(experts=GroupedExperts))
    return spec


def _num_experts(arch: Architecture) -> int | None:
    return arch.experts.count if arch.experts else None
