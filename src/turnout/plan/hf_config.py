"""A Hugging Face config.json as a model shape."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from turnout.errors import ConfigError
from turnout.plan.model import MLAShape, ModelShape

# what families call the same size, first found first taken
_NAMES = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "dim": ("hidden_size", "n_embd", "d_model", "dim"),
    "heads": ("num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_n_heads"),
    "vocab": ("vocab_size",),
    "ffn": ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "decoder_ffn_dim", "ffn_hidden_size"),
    "experts": ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts"),
    "top_k": ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k", "num_selected_experts"),
    "shared": ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"),
    "expert_ffn": ("moe_intermediate_size", "expert_ffn_hidden_size"),
    "decoder_layers": ("decoder_layers", "num_decoder_layers"),
    "encoder_layers": ("encoder_layers",),
}
# families whose FFN has two matrices
_PLAIN = ("gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "falcon", "phi", "bert", "roberta", "nllb-moe",
          "m2m_100", "switch_transformers", "starcoder2", "gpt_bigcode", "nemotron", "marian", "bart", "mbart", 
          "distilbert")  # fmt: skip
_LAYER_NORM = (*_PLAIN, "stablelm", "cohere", "olmo")
# families that tie input and output unless their file says otherwise (the library's default for a field left out)
_TIED = ("gpt2", "opt", "bloom", "gemma", "gemma2", "gemma3_text", "gpt_bigcode", "nllb-moe", "switch_transformers",
         "t5", "bert", "roberta", "bart", "mbart", "m2m_100", "marian", "cohere", "distilbert")  # fmt: skip

# families whose routers always take so many experts: their files have no field for it
_TOP_K = {"switch_transformers": 1, "nllb-moe": 2}


def read_config(path: str | Path) -> ModelShape:
    """The shape of a model from its config.json, or from the folder that holds it.

    Raises: ConfigError if there is no such file, it is not JSON, or it is not of a transformer.
    """
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}; give a config.json or the folder it is in") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not JSON: {error}") from error
    return shape_of_config(data, name=file.resolve().parent.name if file.name == "config.json" else file.stem)


def shape_of_config(data: Any, *, name: str = "") -> ModelShape:
    """The shape a parsed config.json describes; of a multimodal model, its text part.

    Raises: ConfigError naming the field that is missing or wrong.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"config.json holds {type(data).__name__}, not an object")
    text = data.get("text_config")
    if isinstance(text, Mapping) and _find(data, "layers") is None:
        data = {**text, "tie_word_embeddings": text.get("tie_word_embeddings", data.get("tie_word_embeddings"))}
    for part in ("attn_config", "ffn_config"):  # of DBRX
        inner = data.get(part)
        data = {**inner, **data} if isinstance(inner, Mapping) else data
    family = str(data.get("model_type") or "")
    other = next((key for key in data if key.startswith(("mamba_", "ssm_", "attn_layer_period"))), None)
    if other:
        raise ConfigError(f"config.json has {other} (model_type={family!r}): blocks without attention are not planned")
    layers, dim, heads = (_size(data, key) for key in ("layers", "dim", "heads"))
    encoder = _stacks(data)
    if encoder:
        layers = _find(data, "decoder_layers") or layers
    experts, mla = _find(data, "experts") or 0, _latent(data)
    sizes: dict[str, Any] = _experts(data, layers, family) if experts > 1 else {}
    ffn = _positive(data, "intermediate_size_mlp") or _find(data, "ffn") or 4 * dim
    head_dim = _positive(data, "head_dim") or _positive(data, "d_kv") or _even(dim, heads)
    return ModelShape(
        name=name or family, num_layers=layers, dim=dim, vocab_size=_size(data, "vocab"), num_heads=heads,
        num_kv_heads=_kv_heads(data, heads), head_dim=mla.nope_dim + mla.rope_dim if mla else head_dim, mla=mla,
        ffn_hidden=ffn, gated=_gated(data, family), encoder_layers=encoder,
        tied_embeddings=_flag(data, "tie_word_embeddings", family in _TIED),
        layer_norm=family in _LAYER_NORM, qkv_bias=_flag(data, "attention_bias", family in _PLAIN or "qwen2" in family),
        out_bias=_flag(data, "attention_bias", family in _PLAIN) and "qwen2" not in family,
        ffn_bias=_flag(data, "mlp_bias", family in _PLAIN and family not in ("falcon", "nemotron")),
        expert_bias=family == "gpt_oss", router_bias=family == "gpt_oss", sinks=family == "gpt_oss",
        qk_norm="full" if family == "olmoe" else ("head" if "qwen3" in family else "none"),
        learned_positions=(_positive(data, "n_positions") or 0) if family in ("gpt2", "gpt_bigcode") else 0,
        window=_window(data), full_every=2 if family in ("gpt_oss", "gemma2") else 0,
        mtp_layers=0, **sizes,
    )  # fmt: skip


def _experts(data: Mapping[str, Any], layers: int, family: str) -> dict[str, Any]:
    experts, top_k = _find(data, "experts") or 0, _find(data, "top_k") or _TOP_K.get(family)
    if top_k is None:
        raise ConfigError(f"config.json has {experts} experts and no {' or '.join(_NAMES['top_k'])}")
    hidden = _find(data, "expert_ffn") or _find(data, "ffn") or 0
    shared_experts = _find(data, "shared") or (1 if family == "llama4_text" else 0)
    shared = _positive(data, "shared_expert_intermediate_size") or hidden * shared_experts
    step = _positive(data, "decoder_sparse_step") or _positive(data, "moe_layer_freq") or 1
    step = _positive(data, "encoder_sparse_step") or _positive(data, "interleave_moe_layer_step") or step
    groups, top_groups = _positive(data, "n_group") or 0, _positive(data, "topk_group") or 0
    limited = groups > top_groups > 0
    return {
        "num_experts": experts, "top_k": top_k, "expert_hidden": hidden, "shared_hidden": shared,
        "shared_gates": 1 if data.get("shared_expert_intermediate_size") else 0,
        "dense_first": min(layers, _positive(data, "first_k_dense_replace") or 0), "moe_every": step,
        "expert_groups": groups if limited else 0, "top_groups": top_groups if limited else 0,
    }  # fmt: skip


def _latent(data: Mapping[str, Any]) -> MLAShape | None:
    if not _positive(data, "kv_lora_rank"):
        return None
    fields = {"kv_rank": "kv_lora_rank", "nope_dim": "qk_nope_head_dim", "rope_dim": "qk_rope_head_dim"}
    sizes = {field: _required(data, key) for field, key in fields.items()}
    return MLAShape(q_rank=_positive(data, "q_lora_rank") or 0, v_dim=_required(data, "v_head_dim"), **sizes)


def _stacks(data: Mapping[str, Any]) -> int:
    """Blocks of the encoder, if the model has one beside its decoder."""
    if not data.get("is_encoder_decoder"):
        return 0
    return _find(data, "encoder_layers") or _size(data, "layers")


def _kv_heads(data: Mapping[str, Any], heads: int) -> int:
    if data.get("multi_query"):
        return 1
    return _find(data, "kv_heads") or heads


def _gated(data: Mapping[str, Any], family: str) -> bool:
    if "is_gated_act" in data:
        return bool(data["is_gated_act"])
    return family not in (*_PLAIN, "t5")


def _window(data: Mapping[str, Any]) -> int:
    window = _positive(data, "sliding_window") or 0
    return window if data.get("use_sliding_window", True) else 0


def _even(dim: int, heads: int) -> int:
    if dim % heads:
        raise ConfigError(f"config.json: heads={heads} must divide the width {dim}, or head_dim must be given")
    return dim // heads


def _find(data: Mapping[str, Any], key: str) -> int | None:
    return next((value for name in _NAMES[key] if (value := _positive(data, name)) is not None), None)


def _size(data: Mapping[str, Any], key: str) -> int:
    value = _find(data, key)
    if value is None:
        names = " or ".join(_NAMES[key])
        family = data.get("model_type")
        raise ConfigError(f"config.json is not of a transformer we know (model_type={family!r}): it has no {names}")
    return value


def _required(data: Mapping[str, Any], name: str) -> int:
    value = _positive(data, name)
    if value is None:
        raise ConfigError(f"config.json has no {name}, which latent attention (kv_lora_rank) needs")
    return value


def _positive(data: Mapping[str, Any], name: str) -> int | None:
    """A count, or nothing where it is absent, null or 0."""
    value = data.get(name)
    if value is None or value == 0:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"config.json: {name}={value!r} must be a positive integer")
    return value


def _flag(data: Mapping[str, Any], name: str, default: bool) -> bool:
    value = data.get(name)
    return default if value is None else bool(value)
