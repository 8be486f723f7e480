"""Our published shapes against transformers: every tensor accounted for, and the same logits from the same weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.shapes import ARCHITECTURES, small
from turnout.layers.attention import AttentionConfig
from turnout.layers.mla import MLAConfig
from turnout.layers.moe import MoEConfig
from turnout.layers.rope import Yarn
from turnout.models import PRESETS, Decoder, ModelConfig

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

Weights = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One architecture: our preset, transformers' class, and the settings the two do not share a name for."""

    preset: str
    cls: str
    settings: Callable[[ModelConfig], dict[str, Any]]


def _moe(config: ModelConfig) -> MoEConfig:
    assert config.moe is not None
    return config.moe


def _router(config: ModelConfig) -> Any:
    return _moe(config).router


def _mixtral(config: ModelConfig) -> dict[str, Any]:
    return {"num_local_experts": _moe(config).num_experts, "intermediate_size": _moe(config).hidden}


def _qwen3(config: ModelConfig) -> dict[str, Any]:
    return {
        "num_experts": _moe(config).num_experts,
        "moe_intermediate_size": _moe(config).hidden,
        "norm_topk_prob": _router(config).renormalize,
    }


def _olmoe(config: ModelConfig) -> dict[str, Any]:
    return {"num_experts": _moe(config).num_experts, "intermediate_size": _moe(config).hidden}


def _gpt_oss(config: ModelConfig) -> dict[str, Any]:
    assert isinstance(config.attention, AttentionConfig)
    windows = [config.attention.window_of(i) for i in range(config.num_layers)]
    return _mixtral(config) | {
        "sliding_window": config.attention.window,
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
    }


def _deepseek(config: ModelConfig) -> dict[str, Any]:
    attention, router = config.attention, _router(config)
    assert isinstance(attention, MLAConfig)
    return {
        "q_lora_rank": attention.q_rank,
        "kv_lora_rank": attention.kv_rank,
        "qk_nope_head_dim": attention.nope_dim,
        "qk_rope_head_dim": attention.rope_dim,
        "v_head_dim": attention.v_dim,
        "num_key_value_heads": attention.num_heads,
        "intermediate_size": config.hidden,
        "moe_intermediate_size": _moe(config).hidden,
        "n_routed_experts": _moe(config).num_experts,
        "first_k_dense_replace": config.dense_first,
        "n_group": router.groups,
        "topk_group": router.top_groups,
        "routed_scaling_factor": router.scale,
    }


PAIRS = [
    Pair(preset="mixtral-8x7b", cls="Mixtral", settings=_mixtral),
    Pair(preset="mixtral-8x22b", cls="Mixtral", settings=_mixtral),
    Pair(preset="qwen3-30b-a3b", cls="Qwen3Moe", settings=_qwen3),
    Pair(preset="olmoe-1b-7b", cls="Olmoe", settings=_olmoe),
    Pair(preset="gpt-oss-120b", cls="GptOss", settings=_gpt_oss),
    Pair(preset="gpt-oss-20b", cls="GptOss", settings=_gpt_oss),
    Pair(preset="deepseek-v3", cls="DeepseekV3", settings=_deepseek),
]
IDS = [pair.preset for pair in PAIRS]
UNLIKE = [pair for pair in PAIRS if pair.preset in ARCHITECTURES]


@pytest.mark.parametrize("pair", PAIRS, ids=IDS)
def test_every_tensor_of_the_published_model_is_in_ours(pair: Pair) -> None:
    config = PRESETS[pair.preset]()
    with torch.device("meta"):
        theirs, ours = _theirs(pair, config), Decoder(config)
    converted = convert(dict(theirs.named_parameters()), config)
    assert {n: tuple(t.shape) for n, t in converted.items()} == {n: tuple(p.shape) for n, p in ours.named_parameters()}
    assert sum(t.numel() for t in converted.values()) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("pair", UNLIKE, ids=[pair.preset for pair in UNLIKE])
def test_the_same_weights_give_the_same_logits(pair: Pair) -> None:
    config = small(pair.preset)
    torch.manual_seed(0)
    theirs = _theirs(pair, config).double().eval()
    with torch.no_grad():
        for name, weight in (*theirs.named_parameters(), *_router_biases(theirs)):
            weight.normal_(mean=1.0 if "norm" in name else 0.0, std=0.2)
    ours = Decoder(config).double().eval()
    missing = ours.load_state_dict(convert(dict(theirs.named_parameters()), config), strict=False).missing_keys
    _copy_router_biases(theirs, ours, missing)
    tokens_BS = torch.randint(config.vocab_size, (2, 24))
    with torch.no_grad():
        got = ours.logits(ours(tokens_BS).h_BSD)
        want = theirs(tokens_BS, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def _theirs(pair: Pair, config: ModelConfig) -> torch.nn.Module:
    attention = config.attention
    assert isinstance(attention, AttentionConfig | MLAConfig)
    heads = (
        {"num_key_value_heads": attention.num_kv_heads, "head_dim": attention.head_dim}
        if isinstance(attention, AttentionConfig)
        else {}
    )
    settings = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "num_experts_per_tok": _router(config).k,
        "rope_parameters": _rope(attention.rope_theta, attention.yarn),
        "pad_token_id": None,
    }
    hf_config = getattr(transformers, f"{pair.cls}Config")(**settings | heads | pair.settings(config))
    hf_config._attn_implementation = "eager"
    hf_config._experts_implementation = "eager"
    return getattr(transformers, f"{pair.cls}ForCausalLM")(hf_config)


def _rope(theta: float, yarn: Yarn | None) -> dict[str, Any]:
    if yarn is None:
        return {"rope_type": "default", "rope_theta": theta}
    stretch = {"rope_type": "yarn", "rope_theta": theta, "factor": yarn.factor}
    stretch |= {"beta_fast": yarn.fast, "beta_slow": yarn.slow, "truncate": yarn.whole_dims}
    stretch |= {"original_max_position_embeddings": yarn.trained_length}
    # DeepSeek's config.json has these two; they say that the logits are scaled, not queries and keys
    return stretch | ({"mscale": 1.0, "mscale_all_dim": 1.0} if yarn.whole_dims else {})


def _router_biases(theirs: torch.nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, bias) for name, bias in theirs.named_buffers() if name.endswith("e_score_correction_bias")]


def _copy_router_biases(theirs: torch.nn.Module, ours: Decoder, missing: list[str]) -> None:
    names = [name for name in missing if name.endswith("router.bias_E")]
    assert names == missing, f"not converted: {missing}"
    for name, (_, bias) in zip(names, _router_biases(theirs), strict=True):
        ours.get_buffer(name).copy_(bias)


def convert(theirs: Weights, config: ModelConfig) -> Weights:
    """Our names and layouts from transformers' parameters; each is used once, and none is left."""
    left = dict(theirs)
    ours = {
        "embedding_VD": left.pop("model.embed_tokens.weight"),
        "norm.weight_D": left.pop("model.norm.weight"),
        "head_VD": left.pop("lm_head.weight"),
    }
    attention = _convert_mla if isinstance(config.attention, MLAConfig) else _convert_gqa
    for i in range(config.num_layers):
        source, target = f"model.layers.{i}", f"blocks.{i}"
        ours[f"{target}.attention_norm.weight_D"] = left.pop(f"{source}.input_layernorm.weight")
        ours[f"{target}.ffn_norm.weight_D"] = left.pop(f"{source}.post_attention_layernorm.weight")
        layer = {n.removeprefix(source + "."): left.pop(n) for n in list(left) if n.startswith(source + ".")}
        ours |= {f"{target}.attention.{n}": t for n, t in attention(layer, config).items()}
        ours |= {f"{target}.ffn.{n}": t for n, t in _convert_ffn(layer).items()}
        assert not layer, f"not converted: {list(layer)}"
    assert not left, f"not converted: {list(left)}"
    return ours


def _convert_gqa(layer: Weights, config: ModelConfig) -> Weights:
    ours = {"out": layer.pop("self_attn.o_proj.weight")}
    ours["qkv"] = torch.cat([layer.pop(f"self_attn.{x}_proj.weight") for x in "qkv"])
    if "self_attn.o_proj.bias" in layer:
        ours["out_bias"] = layer.pop("self_attn.o_proj.bias")
        ours["qkv_bias"] = torch.cat([layer.pop(f"self_attn.{x}_proj.bias") for x in "qkv"])
    renamed = {"self_attn.sinks": "sink_H"} | {f"self_attn.{x}_norm.weight": f"{x}_norm.weight_D" for x in "qk"}
    return ours | {new: layer.pop(old) for old, new in renamed.items() if old in layer}


def _convert_mla(layer: Weights, config: ModelConfig) -> Weights:
    attention = config.attention
    assert isinstance(attention, MLAConfig)
    q_up = layer.pop("self_attn.q_b_proj.weight").unflatten(0, (attention.num_heads, -1))
    q_up = torch.cat([q_up[:, : attention.nope_dim], _halves(q_up[:, attention.nope_dim :], dim=1)], dim=1)
    kv_down = layer.pop("self_attn.kv_a_proj_with_mqa.weight")
    kv_down = torch.cat([kv_down[: attention.kv_rank], _halves(kv_down[attention.kv_rank :], dim=0)])
    return {
        "q_down": layer.pop("self_attn.q_a_proj.weight"),
        "q_norm.weight_D": layer.pop("self_attn.q_a_layernorm.weight"),
        "q_up": q_up.flatten(0, 1),
        "kv_down": kv_down,
        "kv_norm.weight_D": layer.pop("self_attn.kv_a_layernorm.weight"),
        "kv_up": layer.pop("self_attn.kv_b_proj.weight"),
        "out": layer.pop("self_attn.o_proj.weight"),
    }


def _halves(x: Tensor, *, dim: int) -> Tensor:
    """Rotary pairs (2i, 2i + 1) to (i, i + X / 2)."""
    return torch.cat([part.squeeze(dim + 1) for part in x.unflatten(dim, (-1, 2)).split(1, dim=dim + 1)], dim=dim)


def _convert_ffn(layer: Weights) -> Weights:
    if "mlp.gate_proj.weight" in layer:
        return _convert_mlp(layer, "mlp")
    score = "mlp.router" if "mlp.router.weight" in layer else "mlp.gate"
    ours = {"router.score.weight_ED": layer.pop(f"{score}.weight")}
    up, down = layer.pop("mlp.experts.gate_up_proj"), layer.pop("mlp.experts.down_proj")
    if f"{score}.bias" not in layer:
        ours |= {"experts.up_EDG": up.transpose(1, 2), "experts.down_EFD": down.transpose(1, 2)}
    else:
        ours["router.score.bias_E"] = layer.pop(f"{score}.bias")
        up_bias = layer.pop("mlp.experts.gate_up_proj_bias")
        ours |= {"experts.up_EDG": _halves(up, dim=2), "experts.up_bias_EG": _halves(up_bias, dim=1)}
        ours |= {"experts.down_EFD": down, "experts.down_bias_ED": layer.pop("mlp.experts.down_proj_bias")}
    if "mlp.shared_experts.gate_proj.weight" in layer:
        ours |= {f"shared.{n}": t for n, t in _convert_mlp(layer, "mlp.shared_experts").items()}
    return ours


def _convert_mlp(layer: Weights, source: str) -> Weights:
    up_GD = torch.cat([layer.pop(f"{source}.{x}_proj.weight") for x in ("gate", "up")])
    return {"up_GD": up_GD, "down_DF": layer.pop(f"{source}.down_proj.weight")}
