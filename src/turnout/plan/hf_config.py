"""A Hugging Face config.json as a model shape."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from turnout.errors import ConfigError
from turnout.plan.hf_families import FAMILIES, Family
from turnout.plan.hf_fields import NAMES, find, flag, positive, refuse_unread, size
from turnout.plan.hf_layers import full_every_of, sparse_of, window_of
from turnout.plan.model import MLAShape, ModelShape
from turnout.registry import nearest

_BIASES = ("use_qkv_bias", "use_bias", "bias", "enable_bias")  # of attention; all but the first, of FFNs too


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

    Raises: ConfigError naming the field that is missing, wrong or not known.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"config.json holds {type(data).__name__}, not an object")
    text = data.get("text_config")
    if isinstance(text, Mapping) and find(data, "layers") is None:
        data = {**text, "tie_word_embeddings": text.get("tie_word_embeddings", data.get("tie_word_embeddings"))}
    for part in ("attn_config", "ffn_config"):  # of DBRX
        inner = data.get(part)
        data = {**inner, **{key: value for key, value in data.items() if key != part}} if inner else data
    layers, dim, heads = (size(data, key) for key in ("layers", "dim", "heads"))
    name_of_family, family = _family(data)
    refuse_unread(data)
    _refuse_variants(data, dim, heads)
    encoder = (find(data, "encoder_layers") or layers) if data.get("is_encoder_decoder") else 0
    layers = (find(data, "decoder_layers") or layers) if encoder else layers
    mla = _latent(data)
    biased = flag(data, family.attention_bias, "attention_bias", "qkv_bias", *_BIASES)
    return ModelShape(
        name=name or name_of_family, num_layers=layers, dim=dim, vocab_size=size(data, "vocab"), num_heads=heads,
        num_kv_heads=_kv_heads(data, heads), mla=mla,
        head_dim=mla.nope_dim + mla.rope_dim if mla else _head_dim(data, dim, heads),
        ffn_hidden=find(data, "ffn") or 4 * dim, gated=_gated(data, family), encoder_layers=encoder,
        tied_embeddings=flag(data, family.tied, "tie_word_embeddings"), layer_norm=family.layer_norm,
        norms_per_layer=_norms(data, family), qkv_bias=biased,
        out_bias=flag(data, biased and family.biased == "all", "attention_out_bias"),
        ffn_bias=flag(data, family.ffn_bias, "mlp_bias", *_BIASES[1:]),
        expert_bias=flag(data, family.expert_bias, "use_bias"), router_bias=name_of_family == "gpt_oss",
        sinks=family.sinks, qk_norm=family.qk_norm, learned_positions=_positions(data, family, 2 if encoder else 1),
        window=window_of(data, layers), full_every=full_every_of(data, layers, family), mtp_layers=_further(data),
        **_experts(data, layers, dim, family),
    )  # fmt: skip


def _family(data: Mapping[str, Any]) -> tuple[str, Family]:
    name = str(data.get("model_type") or "")
    if name not in FAMILIES:
        known = sorted(filter(None, FAMILIES))
        raise ConfigError(
            f"config.json: model_type={name!r} is not one whose blocks are known here; known: {', '.join(known)}"
            f"{nearest(name, known)}; of any other give the dimensions as a .toml file (docs/planner.md)"
        )
    return name, FAMILIES[name]


def _refuse_variants(data: Mapping[str, Any], dim: int, heads: int) -> None:
    """Raises: ConfigError for what a family's code can do and we do not count."""
    ffn, of_encoder, own_heads = (
        positive(data, name) for name in ("decoder_ffn_dim", "encoder_ffn_dim", "encoder_attention_heads")
    )
    wrong = {
        "encoder_ffn_dim": (of_encoder, ffn or of_encoder),
        "encoder_attention_heads": (own_heads, heads if own_heads else None),
        "word_embed_proj_dim": (positive(data, "word_embed_proj_dim"), dim),
        "use_qk_norm": (data.get("use_qk_norm") and data.get("model_type") not in ("llama4_text", "minimax_m2"), False),
        "mtp_transformer_layers": (positive(data, "mtp_transformer_layers"), 1),
    }
    for name, (value, counted) in wrong.items():
        if value and value != counted:
            raise ConfigError(f"config.json: {name}={data[name]!r} is not planned; nearest that is: {counted}")


def _experts(data: Mapping[str, Any], layers: int, dim: int, family: Family) -> dict[str, Any]:
    experts = find(data, "experts") or 0
    if experts <= 1:
        return {}
    top_k = find(data, "top_k") or family.top_k
    if not top_k:
        raise ConfigError(f"config.json has {experts} experts and no {' or '.join(NAMES['top_k'])}")
    hidden = find(data, "expert_ffn") or find(data, "ffn") or 0
    shared = positive(data, "shared_expert_intermediate_size") or positive(data, "shared_intermediate_size")
    if flag(data, False, "parallel_attn_mlp_res") and flag(data, False, "use_residual"):
        # Arctic: a dense FFN as wide as the model beside the experts
        shared = dim
    groups, top_groups = positive(data, "n_group") or 0, positive(data, "topk_group") or 0
    limited = groups > top_groups > 0
    dense_first, every = sparse_of(data, layers)
    return {
        "num_experts": experts, "top_k": top_k, "expert_hidden": hidden,
        "shared_hidden": shared or hidden * (find(data, "shared") or family.shared),
        "shared_gates": 1 if data.get("shared_expert_intermediate_size") else 0,
        "dense_first": dense_first, "moe_every": every,
        "expert_groups": groups if limited else 0, "top_groups": top_groups if limited else 0,
    }  # fmt: skip


def _latent(data: Mapping[str, Any]) -> MLAShape | None:
    if not positive(data, "kv_lora_rank"):
        return None
    if flag(data, False, "attention_bias"):
        raise ConfigError("config.json: attention_bias=true with latent attention (kv_lora_rank) is not planned")
    fields = {"kv_rank": "kv_lora_rank", "nope_dim": "qk_nope_head_dim", "rope_dim": "qk_rope_head_dim"}
    sizes = {field: _required(data, key) for field, key in fields.items()}
    return MLAShape(q_rank=positive(data, "q_lora_rank") or 0, v_dim=_required(data, "v_head_dim"), **sizes)


def _required(data: Mapping[str, Any], name: str) -> int:
    value = positive(data, name)
    if value is None:
        raise ConfigError(f"config.json has no {name}, which latent attention (kv_lora_rank) needs")
    return value


def _further(data: Mapping[str, Any]) -> int:
    """Blocks that predict further tokens."""
    return (find(data, "mtp") or 0) if flag(data, True, "use_mtp") else 0


def _kv_heads(data: Mapping[str, Any], heads: int) -> int:
    # Falcon's newer code has groups, whatever multi_query says; its older one has one, whatever num_kv_heads says
    if data.get("model_type") == "falcon" and not data.get("new_decoder_architecture"):
        return 1 if data.get("multi_query", True) else heads
    if data.get("multi_query") and data.get("model_type") != "falcon":
        return 1
    return find(data, "kv_heads") or heads


def _head_dim(data: Mapping[str, Any], dim: int, heads: int) -> int:
    given = positive(data, "head_dim") or positive(data, "d_kv")
    if given is None and dim % heads:
        raise ConfigError(f"config.json: heads={heads} must divide the width {dim}, or head_dim must be given")
    return given or dim // heads


def _gated(data: Mapping[str, Any], family: Family) -> bool:
    said = data.get("feed_forward_proj")  # of T5 and what came of it
    return flag(data, said.startswith("gated") if isinstance(said, str) else family.gated, "is_gated_act")


def _norms(data: Mapping[str, Any], family: Family) -> int:
    if data.get("new_decoder_architecture") and data.get("num_ln_in_parallel_attn") != 1:
        return 2
    return family.norms_per_layer


def _positions(data: Mapping[str, Any], family: Family, stacks: int) -> int:
    """Rows of the tables of learned positions, of encoder and decoder."""
    rows = positive(data, family.positions) if family.positions else None
    return stacks * (rows + family.more_positions) if rows else 0
