"""A Hugging Face architecture as a Megatron `GPTModel`, for any tensor-, pipeline- and expert-parallel size.

Weights are left unset: `weights.load_hf` or a checkpoint fills every one of them.
"""

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_opd.config.architecture import Architecture, Experts
from megatron_opd.mcore.layers import RMSNorm, SdpaCoreAttention
from megatron_opd.mcore.parallel import Parallel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def padded_vocab_size(arch: Architecture, tp_size: int) -> int:
    """Vocabulary rows of the model: the shards are equal, so the last may hold rows that are no token."""
    return -(-arch.vocab_size // tp_size) * tp_size


def transformer_config(arch: Architecture, parallel: Parallel, *, precision: str) -> TransformerConfig:
    layout = parallel.layout
    dtype = DTYPES[precision]
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.intermediate_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_key_value_heads,
        kv_channels=arch.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=arch.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        qk_layernorm=arch.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=1,
        sequence_parallel=layout.sequence_parallel,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        # Every term has its own global denominator, applied before the loss reaches Megatron: gradients are sums.
        calculate_per_token_loss=True,
        # The local layers have none of the fused kernels; initial values come from the checkpoint.
        use_cpu_initialization=parallel.device.type != "cuda",
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        # Dense models too: the default dispatcher forbids sequences whose length changes between steps.
        moe_token_dispatcher_type="alltoall",
        variable_seq_lengths=True,
        **_experts(arch.experts),
    )


def _experts(experts: Experts | None) -> dict[str, Any]:
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.count,
        "moe_router_topk": experts.per_token,
        "moe_ffn_hidden_size": experts.intermediate_size,
        # The softmax is over a token's experts, or over all of them before the choice.
        "moe_router_pre_softmax": not experts.normalise_top,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }


def _layer_spec(arch: Architecture) -> ModuleSpec:
    num_experts = arch.experts.count if arch.experts else None
    spec = get_gpt_layer_local_spec(num_experts=num_experts, qk_layernorm=arch.qk_norm, normalization="RMSNorm")
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention = layer.self_attention.submodules
    attention.core_attention = SdpaCoreAttention
    if arch.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec


def build_model(arch: Architecture, parallel: Parallel, *, precision: str) -> list[GPTModel]:
    """This rank's chunks of the model (one, without interleaving), on its device, in `precision`."""
    config = transformer_config(arch, parallel, precision=precision)
    with parallel.active():
        blocks = TransformerBlockSubmodules(
            layer_specs=[_layer_spec(arch)] * get_num_layers_to_build(config, pp_rank=parallel.pp_rank),
            layer_norm=RMSNorm,
        )
        model = GPTModel(
            config,
            transformer_layer_spec=blocks,
            vocab_size=padded_vocab_size(arch, parallel.tp_size),
            max_sequence_length=arch.max_position_embeddings,
            pre_process=parallel.pp_rank == 0,
            post_process=parallel.is_last_stage,
            parallel_output=True,
            share_embeddings_and_output_weights=arch.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_base=arch.rope_theta,
            pg_collection=parallel.groups,
        )
    return [model.to(device=parallel.device, dtype=DTYPES[precision])]
