"""The keys of a `config.json` that are read, that are harmless, and that are refused.

The supported model types read a fixed set of keys in transformers, so any other key has no
effect there. A later version may give it one, so it gets a warning; not an error, since that would
refuse models with harmless new keys. A key that is known to change results in transformers, in
vLLM or in a model's own code is an error.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_opd.errors import DataError

_QUANTISED = "the weights are quantised; give the model in BF16 or F32"
_PLAIN = "the attention would be another; give a model without it"
_CHUNKED = "vLLM would attend in chunks and the trainer would not; remove the key from a copy"
_SCALED = "it scales what the model computes; give a model without it"
_OTHER_LAYERS = "its layers are others; give a model without it"

# Key -> why it is refused, and what to do. A value in _OFF or _NEUTRAL changes nothing.
REFUSED = {
    "quantization_config": _QUANTISED,
    "compression_config": _QUANTISED,
    "dual_chunk_attention_config": _CHUNKED,
    "attention_chunk_size": _PLAIN,
    "attn_logit_softcapping": _SCALED,
    "final_logit_softcapping": _SCALED,
    "logits_soft_cap": _SCALED,
    "query_pre_attn_scalar": _SCALED,
    "attention_multiplier": _SCALED,
    "embedding_multiplier": _SCALED,
    "residual_multiplier": _SCALED,
    "logits_scaling": _SCALED,
    "logit_scale": _SCALED,
    "scale_emb": _SCALED,
    "scale_depth": _SCALED,
    "clip_qkv": _SCALED,
    "use_bidirectional_attention": _PLAIN,
    "bidirectional": _PLAIN,
    "add_cross_attention": _PLAIN,
    "cross_attention_hidden_size": _PLAIN,
    "is_encoder_decoder": _OTHER_LAYERS,
    "use_mrope": _PLAIN,
    "no_rope_layers": _PLAIN,
    "no_rope_layer_interval": _PLAIN,
    "rope_local_base_freq": _PLAIN,
    "rope_interleaved": _PLAIN,
    "position_embedding_type": _PLAIN,
    "alibi": _PLAIN,
    "use_qk_norm": _OTHER_LAYERS,
    "n_shared_experts": _OTHER_LAYERS,
    "shared_expert_intermediate_size": _OTHER_LAYERS,
}
_OFF: tuple[Any, ...] = (None, False, {}, [], "", 0)
_NEUTRAL = {
    "attention_multiplier": 1,
    "embedding_multiplier": 1,
    "residual_multiplier": 1,
    "logits_scaling": 1,
    "logit_scale": 1,
    "scale_emb": 1,
    "position_embedding_type": "rope",
}

# model_type -> its window where config.json has no sliding_window, as transformers reads it
WINDOWS = {"mistral": 4096}

READ = frozenset(
    {
        "model_type",
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
        "hidden_act",
        "use_sliding_window",
        "layer_types",
        "is_causal",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "partial_rotary_factor",
        "original_max_position_embeddings",
        "num_experts",
        "num_local_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "norm_topk_prob",
        "decoder_sparse_step",
        "mlp_only_layers",
    }
)
# Keys of training, of generation, of other heads, of the file itself.
HARMLESS = frozenset(
    {
        "architectures",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "name_or_path",
        "model_name",
        "initializer_range",
        "use_cache",
        "attention_dropout",
        "hidden_dropout",
        "resid_pdrop",
        "embd_pdrop",
        "pretraining_tp",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "decoder_start_token_id",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "tokenizer_class",
        "prefix",
        "sliding_window",
        "max_window_layers",
        "output_router_logits",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "return_dict",
        "return_dict_in_generate",
        "torchscript",
        "use_bfloat16",
        "tf_legacy_loss",
        "pruned_heads",
        "chunk_size_feed_forward",
        "tie_encoder_decoder",
        "is_decoder",
        "finetuning_task",
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "task_specific_params",
        "classifier_dropout",
        "gradient_checkpointing",
        "do_sample",
        "early_stopping",
        "max_length",
        "min_length",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "num_beams",
        "num_beam_groups",
        "num_return_sequences",
        "length_penalty",
        "repetition_penalty",
        "diversity_penalty",
        "encoder_no_repeat_ngram_size",
        "no_repeat_ngram_size",
        "bad_words_ids",
        "begin_suppress_tokens",
        "suppress_tokens",
        "exponential_decay_length_penalty",
        "remove_invalid_values",
        "max_new_tokens",
        "use_flash_attn",
        "attn_implementation",
        "is_llama_config",
        "unsloth_fixed",
        "pretrained_model_name_or_path",
        "transformers_weights",
        "transformers.js_config",
        "seq_length",
        "max_sequence_length",
        "model_max_length",
    }
)


def refuse_what_is_not_computed(config: Mapping[str, Any], path: Path) -> None:
    """Raises DataError naming the first key of `config` that changes what a model computes."""
    for key, why in REFUSED.items():
        value = config.get(key)
        if value not in _OFF and value != _NEUTRAL.get(key):
            raise DataError(f"{path}: {key} is not supported: {why}")
    window = config.get("sliding_window", WINDOWS.get(config["model_type"]))
    if config["model_type"] in WINDOWS and window is not None:
        raise DataError(
            f"{path}: sliding_window={window} (4096 where the key is missing) is not supported: "
            "tokens see all those before them. For sequences that are no longer, write "
            "sliding_window: null into a copy"
        )
    if config.get("is_causal") is False:
        raise DataError(
            f"{path}: is_causal=false is not supported: tokens would see those after them"
        )
    layer_types = config.get("layer_types") or []
    others = [layer_types]  # a value that is no list is refused whole
    if isinstance(layer_types, list):
        others = [layer_type for layer_type in layer_types if layer_type != "full_attention"]
    if others:
        raise DataError(
            f"{path}: layer_types: {others[0]!r} is not supported; supported: full_attention"
        )


def unknown_keys(config: Mapping[str, Any]) -> list[str]:
    """The keys of which nothing is known, unless their value is null, false, 0 or empty.

    Keys that begin with "_" are private.
    """
    known = READ | HARMLESS | set(REFUSED)
    return [
        key
        for key, value in config.items()
        if key not in known and value not in _OFF and not _is_private(key)
    ]


def _is_private(key: str) -> bool:
    return key.startswith("_") or key.endswith("_version")
