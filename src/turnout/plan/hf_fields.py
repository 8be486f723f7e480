"""Fields of a config.json: their numbers, and which of them say nothing about sizes."""

import re
from collections.abc import Mapping
from typing import Any

from turnout.errors import ConfigError

# what families call the same size, first found first taken
NAMES = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"),
    "dim": ("hidden_size", "n_embd", "d_model", "dim"),
    "heads": ("num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_n_heads"),
    "vocab": ("vocab_size",),
    "ffn": ("intermediate_size_mlp", "intermediate_size", "n_inner", "ffn_dim", "d_ff", "decoder_ffn_dim",
            "ffn_hidden_size"),
    "experts": ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts"),
    "top_k": ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k", "num_selected_experts",
              "experts_per_token"),
    "shared": ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"),
    "expert_ffn": ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size"),
    "decoder_layers": ("decoder_layers", "num_decoder_layers"),
    "encoder_layers": ("encoder_layers",),
    "sparse_step": ("decoder_sparse_step", "encoder_sparse_step", "moe_layer_interval", "interleave_moe_layer_step",
                    "moe_layer_frequency"),
    "mtp": ("num_nextn_predict_layers", "num_mtp_modules"),
}  # fmt: skip
# read one by one
_READ = {
    "model_type", "is_encoder_decoder", "head_dim", "d_kv", "tie_word_embeddings", "attention_bias", "qkv_bias",
    "attn_type_list", "use_qkv_bias", "attention_out_bias", "mlp_bias", "use_bias", "bias", "enable_bias",
    "is_gated_act",
    "feed_forward_proj", "n_positions", "max_position_embeddings", "sliding_window", "use_sliding_window",
    "max_window_layers", "attention_chunk_size", "layer_types", "sliding_window_pattern", "_sliding_window_pattern",
    "multi_query", "new_decoder_architecture", "parallel_attn", "num_ln_in_parallel_attn",
    "shared_expert_intermediate_size", "shared_intermediate_size", "first_k_dense_replace", "moe_layer_freq",
    "moe_layer_start_index", "moe_layer_end_index", "mlp_only_layers", "moe_layers", "n_group", "topk_group",
    "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "qk_head_dim",
    "word_embed_proj_dim", "use_qk_norm", "encoder_attention_heads", "encoder_ffn_dim", "use_mtp",
    "mtp_transformer_layers", "parallel_attn_mlp_res", "use_residual", "use_parallel_residual",
    *(name for names in NAMES.values() for name in names),
}  # fmt: skip
# what changes neither a size nor what a token meets
_SILENT = {
    "_name_or_path", "activation", "activation_function", "add_bos_token", "apply_residual_connection_post_layernorm",
    "architectures", "attention_multiplier", "attention_softmax_in_fp32", "attn_scale", "attn_temperature_tuning",
    "auto_map", "aux_loss_alpha", "batch_prioritized_routing", "chunk_size_feed_forward",
    "clip_qkv", "decoder_start_token_id", "decoder_vocab_size", "dense_act_fn", "dim_model_base",
    "do_layer_norm_before", "dtype", "embedding_multiplier", "ep_size", "expert_capacity", "floor_scale",
    "hidden_act", "hidden_activation", "id2label", "init_std", "initial_context_length", "initializer_factor",
    "initializer_range", "is_causal", "is_decoder", "label2id", "language", "layer_norm_elementwise_affine",
    "logit_scale", "logits_scaling", "max_length", "max_seq_len", "moe_eval_capacity_token_fraction", "moe_norm_min",
    "moe_use_aux_free", "n_ctx", "no_rope_layer_interval", "no_rope_layers", "norm_topk_prob", "num_beams",
    "num_sparse_decoder_layers", "num_sparse_encoder_layers", "normalize_router_prob_before_dropping", "num_labels",
    "original_max_position_embeddings", "output_past", "partial_rotary_factor", "position_embedding_type", "prefix",
    "pretraining_tp", "qkv_proj", "quantization", "quantization_config", "query_pre_attn_scalar",
    "relative_attention_max_distance", "relative_attention_num_buckets", "reorder_and_upcast_attn",
    "residual_multiplier", "return_dict", "rotary_base", "rotary_dim", "rotary_emb_base", "rotary_pct",
    "routed_scaling_factor", "router_dtype", "router_ignore_padding_tokens", "scale_attention_softmax_in_fp32",
    "scale_attn_weights", "scale_decoder_outputs", "scale_depth", "scale_emb", "scale_embedding", "score_function",
    "scoring_func", "second_expert_policy", "seq_aux", "seq_length", "share_encoder_decoder_embeddings",
    "swiglu_alpha", "swiglu_limit", "task_specific_params", "temperature_tuning", "tokenizer_class", "topk_method",
    "torch_dtype", "transformers_version", "use_cache", "use_flash_attn", "use_grouped_topk", "use_routing_bias",
    "attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "max_batch_size",
    "unsloth_version", "alibi", "ffn_act_fn", "enable_expert_tensor_parallelism", "max_sequence_length",
    "moe_eval_capacity_factor", "moe_min_capacity", "moe_token_dropping", "moe_train_capacity_factor",
}  # fmt: skip
_SILENT_PARTS = re.compile(
    r"dropout|pdrop|layerdrop|jitter|_eps$|epsilon|rope|_token_ids?$|_token_index$|loss_coef|softcapping|summary_"
    r"|gradient_checkpointing|^output_|cls_"
)


def refuse_unread(data: Mapping[str, Any]) -> None:
    """Raises: ConfigError for a field that is set and of which nobody here knows what it does to the model."""
    for name, value in data.items():
        known = name in _READ or name in _SILENT or _SILENT_PARTS.search(name)
        # false, 0, nothing: what it would add is not there
        if not known and value not in (None, False, 0, "", "none", [], {}):
            shown = repr(value)
            raise ConfigError(
                f"config.json: {name}={shown if len(shown) < 60 else shown[:60] + '...'} is not known here, and may "
                "change sizes; leave it out if it does not, or give the dimensions as a .toml file (docs/planner.md)"
            )


def find(data: Mapping[str, Any], key: str) -> int | None:
    """A size under any of its names."""
    return next((value for name in NAMES[key] if (value := positive(data, name)) is not None), None)


def size(data: Mapping[str, Any], key: str) -> int:
    """A size under any of its names. Raises: ConfigError if it has none of them."""
    value = find(data, key)
    if value is None:
        names = " or ".join(NAMES[key])
        family = data.get("model_type")
        raise ConfigError(f"config.json is not of a transformer we know (model_type={family!r}): it has no {names}")
    return value


def positive(data: Mapping[str, Any], name: str) -> int | None:
    """A count, or nothing where it is absent, null or 0. Raises: ConfigError if it is none."""
    value = data.get(name)
    if value is None or value == 0:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"config.json: {name}={value!r} must be a positive integer")
    return value


def flag(data: Mapping[str, Any], default: bool, *names: str) -> bool:
    """The first of these fields that is there, or `default`."""
    return next((bool(data[name]) for name in names if data.get(name) is not None), default)
