"""A config.json is read as transformers reads it, or refused by the name of the field that nobody here knows."""

import json
from dataclasses import replace
from typing import Any

import pytest

from turnout.errors import ConfigError
from turnout.plan.hf_config import shape_of_config
from turnout.plan.hf_families import FAMILIES

# what the defaults of transformers' configurations leave out
GIVEN: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 6},
    "glm4_moe": {"head_dim": 128},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
    "nemotron": {"num_key_value_heads": 8, "head_dim": 128},
    "ministral": {"head_dim": 128},
}
# of this code transformers has no model, or none that can be made without its weights
ELSEWHERE = {"", "arctic", "kimi_k2", "dbrx"}
# variants of a family that its defaults do not show
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("qwen2_moe", {"decoder_sparse_step": 2}),
    ("qwen3_moe", {"mlp_only_layers": [0, 1]}),
    ("granitemoeshared", {"shared_intermediate_size": 512}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 8, "num_attention_heads": 64, "hidden_size": 4096}),
    ("t5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 8}),
    ("opt", {"enable_bias": False}),
    ("seed_oss", {"attention_out_bias": True}),
    ("stablelm", {"use_qkv_bias": True}),
    ("llama4_text", {"interleave_moe_layer_step": 2}),
    ("m2m_100", {"encoder_layers": 6, "decoder_layers": 3}),
    ("mixtral", {"tie_word_embeddings": True, "num_local_experts": 16}),
]
ARCTIC = {
    "model_type": "arctic", "hidden_size": 7168, "intermediate_size": 4864, "num_hidden_layers": 35,
    "num_attention_heads": 56, "num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 128,
    "num_experts_per_tok": 2, "moe_layer_frequency": 1, "parallel_attn_mlp_res": True, "use_residual": True,
    "enable_expert_tensor_parallelism": False, "max_sequence_length": 4096, "moe_train_capacity_factor": 1,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000,
    "intermediate_size": 11008,
}  # fmt: skip
DEEPSEEK = {
    "model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128,
    "vocab_size": 129280, "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "kv_lora_rank": 512,
    "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "num_nextn_predict_layers": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "ep_size": 1,
    "aux_loss_alpha": 0.001, "quantization_config": {"quant_method": "fp8"}, "rope_scaling": {"factor": 40},
}  # fmt: skip


def built(family: str, changes: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """transformers' configuration of a family as its file has it, and the parameters of its model."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.models.auto import modeling_auto as auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[family](**changes)
    mapping = (
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if config.is_encoder_decoder else auto.MODEL_FOR_CAUSAL_LM_MAPPING
    )
    with torch.device("meta"):
        model = mapping[type(config)](config)
    model.tie_weights()
    return json.loads(json.dumps(config.to_dict(), default=str)), sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )


@pytest.mark.parametrize(
    ("family", "changes"), [*((name, GIVEN.get(name, {})) for name in FAMILIES if name not in ELSEWHERE), *VARIANTS]
)
def test_a_family_has_the_parameters_of_transformers_own_model(family: str, changes: dict[str, Any]) -> None:
    data, total = built(family, changes)
    # transformers leaves blocks that predict further tokens out
    shape = replace(shape_of_config(data), mtp_layers=0)
    # tables of relative positions, norms without weights and the bias of an output matrix are not counted
    assert shape.total_params == pytest.approx(total, rel=5e-5)


def test_arctic_has_a_dense_part_beside_its_experts() -> None:
    shape = shape_of_config(ARCTIC)
    assert shape.shared_hidden == 7168
    assert shape.total_params == pytest.approx(480e9, rel=5e-3)  # "480B total and 17B active": Snowflake, 2024
    assert shape.active_params == pytest.approx(17e9, rel=0.02)
    assert shape_of_config(ARCTIC | {"parallel_attn_mlp_res": False}).shared_hidden == 0


def test_blocks_that_predict_further_tokens_are_read() -> None:
    shape = shape_of_config(DEEPSEEK)
    assert shape.mtp_layers == 1
    # "671B of the main model weights and 14B of the multi-token prediction module", tables of tokens counted again
    more = shape.total_params - replace(shape, mtp_layers=0).total_params
    assert more + 2 * 129280 * 7168 == pytest.approx(14e9, rel=0.05)
    assert shape_of_config(DEEPSEEK | {"use_mtp": False}).mtp_layers == 0


@pytest.mark.parametrize(
    ("fields", "window", "full_every"),
    [
        ({"model_type": "mistral", "sliding_window": 4096}, 4096, 0),
        ({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28}, 0, 0),
        ({"model_type": "gemma2", "sliding_window": 4096}, 4096, 2),
        ({"model_type": "gemma3_text", "sliding_window": 512, "sliding_window_pattern": 6}, 512, 6),
        ({"model_type": "exaone4", "sliding_window": 4096, "sliding_window_pattern": "LLLG"}, 4096, 4),
        (
            {
                "model_type": "olmo3",
                "sliding_window": 64,
                "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 8,
            },
            64,
            4,
        ),
        ({"model_type": "olmo3", "sliding_window": 64, "layer_types": ["full_attention"] * 32}, 0, 0),
    ],
)
def test_windows_are_those_of_the_file(fields: dict[str, Any], window: int, full_every: int) -> None:
    shape = shape_of_config(LLAMA | fields)
    assert (shape.window, shape.full_every if window else 0) == (window, full_every)


WHISPER = {
    "model_type": "whisper", "d_model": 512, "encoder_layers": 6, "decoder_layers": 6, "encoder_attention_heads": 8,
    "decoder_attention_heads": 8, "vocab_size": 51865, "num_hidden_layers": 6, "num_mel_bins": 80,
    "is_encoder_decoder": True,
}  # fmt: skip
NEXT = {
    "model_type": "qwen3_next", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 16,
    "num_key_value_heads": 2, "head_dim": 256, "vocab_size": 151936, "num_experts": 512, "num_experts_per_tok": 10,
    "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "full_attention_interval": 4,
    "linear_num_value_heads": 32,
}  # fmt: skip
MIXED = ["full_attention"] * 30 + ["sliding_attention"] * 2
TYPES = ["linear_attention", "full_attention"] * 16


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (WHISPER, r"model_type='whisper' is not one whose blocks are known"),
        (NEXT, r"model_type='qwen3_next' is not one .*did you mean 'qwen3(_moe)?'"),
        (NEXT | {"model_type": "qwen3_moe"}, r"full_attention_interval=4 is not known here"),
        (LLAMA | {"layer_types": TYPES}, r"layer_types has 'linear_attention': blocks without plain attention"),
        (LLAMA | {"attn_type_list": [0, 1] * 16}, r"attn_type_list has 0: blocks without plain attention"),
        (LLAMA | {"num_memory_tokens": 8}, r"num_memory_tokens=8 is not known here, .* leave it out"),
        (LLAMA | {"sliding_window": 64, "layer_types": MIXED}, "is not every n-th block"),
        (LLAMA | {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 32 blocks"),
        (LLAMA | {"layer_types": ["sliding_attention"] * 32}, "sliding_window does not say how wide"),
        (
            LLAMA | {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 8},
            "max_window_layers=8 of 32",
        ),
        (LLAMA | {"model_type": "opt", "word_embed_proj_dim": 512}, r"word_embed_proj_dim=512 is not planned.*4096"),
        (LLAMA | {"model_type": "cohere", "use_qk_norm": True}, r"use_qk_norm=True is not planned"),
        (DEEPSEEK | {"attention_bias": True}, r"attention_bias=true with latent attention"),
        (DEEPSEEK | {"moe_layer_freq": [0, 1, 0, 0, 1] + [1] * 56}, r"moe_layer_freq puts experts in blocks \[1, 4"),
        (DEEPSEEK | {"mtp_transformer_layers": 3}, r"mtp_transformer_layers=3 is not planned"),
        (
            ARCTIC | {"model_type": "switch_transformers", "encoder_sparse_step": 2, "decoder_sparse_step": 4},
            r"encoder_sparse_step and decoder_sparse_step \['2', '4'\] must be equal",
        ),
        (
            WHISPER | {"model_type": "bart", "num_mel_bins": 0, "encoder_ffn_dim": 64, "decoder_ffn_dim": 128},
            r"encoder_ffn_dim=64 is not planned; nearest that is: 128",
        ),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused_by_name(data: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        shape_of_config(data)


def test_what_is_absent_needs_no_understanding() -> None:
    absent = {"num_memory_tokens": 0, "mamba_d_state": None, "is_hybrid": False, "use_thing": "none"}
    assert shape_of_config(LLAMA | absent) == shape_of_config(LLAMA)
    assert shape_of_config(LLAMA | {"rope_theta": 1e4, "my_token_id": 3, "hidden_dropout": 0.1}) == shape_of_config(
        LLAMA
    )
