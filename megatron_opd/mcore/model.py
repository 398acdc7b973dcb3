"""A Hugging Face architecture as a Megatron `GPTModel`, for every layout.

Weights are left unset: `weights.load_hf` or a checkpoint fills every one of them.
"""

from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_opd.architectures.architecture import Architecture, Experts
from megatron_opd.mcore.parallel import Parallel
from megatron_opd.mcore.rope import PackedRotary, scaled_frequencies
from megatron_opd.mcore.specs import block_spec, uses_transformer_engine

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def padded_vocab_size(arch: Architecture, tp_size: int) -> int:
    """Vocabulary rows of the model; shards are equal, so the last may have rows of no token."""
    return -(-arch.vocab_size // tp_size) * tp_size


def transformer_config(
    arch: Architecture, parallel: Parallel, *, precision: str, recompute: str = "none"
) -> TransformerConfig:
    """Megatron's settings of a model; `recompute` is a value of `TrainConfig.recompute`."""
    layout = parallel.layout
    interleaved = parallel.num_chunks > 1
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
        softmax_scale=_softmax_scale(arch),
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        context_parallel_size=layout.context_parallel_size,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
        sequence_parallel=layout.sequence_parallel,
        virtual_pipeline_model_parallel_size=parallel.num_chunks if interleaved else None,
        # Interleaved stages with Megatron's batched messages compute wrong gradients on gloo,
        # without an error.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        # The loss is divided by every term's global denominator before it reaches Megatron, so
        # that gradients are sums.
        calculate_per_token_loss=True,
        # The local layers have none of the fused kernels; initial values come from the checkpoint.
        use_cpu_initialization=parallel.device.type != "cuda",
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        # Without it, every layer of Transformer Engine would ask the host for sequence lengths.
        apply_rope_fusion=uses_transformer_engine(parallel.device),
        persist_layer_norm=False,
        # Set for dense models too: the default dispatcher forbids lengths that change.
        moe_token_dispatcher_type="alltoall",
        variable_seq_lengths=True,
        **_experts(arch.experts),
        **_recompute(recompute, arch),
    )


def _recompute(granularity: str, arch: Architecture) -> dict[str, Any]:
    if granularity == "none":
        return {}
    if granularity == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    # Attention keeps no scores to recompute; a layer keeps mostly its MLP's wide activations.
    return {
        "recompute_granularity": "selective",
        "recompute_modules": ["moe" if arch.experts else "mlp"],
    }


def _softmax_scale(arch: Architecture) -> float | None:
    """The scale of attention scores; None for the default, 1 / sqrt(head_dim).

    YaRN multiplies cosine and sine, and so queries and keys, by a factor: their products get its
    square.
    """
    if arch.rope_scaling is None or arch.rope_scaling.attention_factor == 1:
        return None
    return arch.rope_scaling.attention_factor**2 / arch.head_dim**0.5


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


def build_model(
    arch: Architecture, parallel: Parallel, *, precision: str, recompute: str = "none"
) -> list[torch.nn.Module]:
    """This rank's chunks of the model, on its device, in `precision`.

    There is one chunk unless stages are interleaved. `recompute` is a value of
    `TrainConfig.recompute`: the activations that the backward pass computes again.
    """
    config = transformer_config(arch, parallel, precision=precision, recompute=recompute)
    with parallel.active():
        chunks = [_chunk(arch, parallel, config, i) for i in range(parallel.num_chunks)]
    return [chunk.to(device=parallel.device, dtype=DTYPES[precision]) for chunk in chunks]


def _chunk(
    arch: Architecture, parallel: Parallel, config: TransformerConfig, index: int
) -> GPTModel:
    vp_stage = index if parallel.num_chunks > 1 else None
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=parallel.pp_rank)
    model = GPTModel(
        config,
        transformer_layer_spec=block_spec(arch, num_layers, parallel.device),
        vocab_size=padded_vocab_size(arch, parallel.tp_size),
        max_sequence_length=arch.max_position_embeddings,
        pre_process=parallel.pp_rank == 0 and index == 0,
        post_process=parallel.is_last_stage and index == parallel.num_chunks - 1,
        parallel_output=True,
        share_embeddings_and_output_weights=arch.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=arch.rope_theta,
        pg_collection=parallel.groups,
        vp_stage=vp_stage,
    )
    rotary = model.rotary_pos_emb
    if arch.rope_scaling:  # Megatron knows fewer types, with fixed parameters
        rotary.inv_freq = scaled_frequencies(rotary.inv_freq, arch.rope_theta, arch.rope_scaling)
    if not uses_transformer_engine(parallel.device):
        model.rotary_pos_emb = PackedRotary(rotary.inv_freq)
    return model
