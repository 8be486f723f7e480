"""Model shapes count what is published, with torch's own models as the second witness."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from turnout.errors import ConfigError
from turnout.plan.data import published_cases
from turnout.plan.hf_config import read_config, shape_of_config
from turnout.plan.model import ModelShape
from turnout.plan.shapes import SHAPES

# totals of transformers' models of the published config.json; see tests/paths/test_sizes.py for the sources
TOTALS = {
    "mixtral-8x7b": 46_702_792_704, "mixtral-8x22b": 140_620_634_112, "deepseek-v3": 671_026_404_352,
    "qwen3-30b-a3b": 30_532_122_624, "olmoe-1b-7b": 6_919_161_856, "gpt-oss-120b": 116_829_156_672,
    "gpt-oss-20b": 20_914_757_184, "llama2-7b": 6_738_415_616, "llama3-8b": 8_030_261_248, "llama3-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
}  # fmt: skip
ACTIVE = {"mixtral-8x7b": 12.9e9, "deepseek-v3": 37e9, "qwen3-30b-a3b": 3.3e9, "olmoe-1b-7b": 1.3e9, "gpt4-moe": 280e9}
# published sizes that are rounded, or of dimensions of medium or low confidence
ROUNDED = {"gpt3-5b": 0.05, "gpt3-20b": 0.02, "nemotron-8b": 0.005, "nemotron-22b": 0.04, "gshard-600b": 0.04,
           "deepseek-v3": 0.001}  # fmt: skip

DEEPSEEK = {
    "model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_key_value_heads": 128, "vocab_size": 129280, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3,
    "moe_layer_freq": 1, "n_group": 8, "topk_group": 4, "kv_lora_rank": 512, "q_lora_rank": 1536,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
}  # fmt: skip
MIXTRAL = {
    "model_type": "mixtral", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 32000, "intermediate_size": 14336, "num_local_experts": 8,
    "num_experts_per_tok": 2, "sliding_window": None,
}  # fmt: skip
GPT_OSS = {
    "model_type": "gpt_oss", "hidden_size": 2880, "num_hidden_layers": 36, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201088, "intermediate_size": 2880,
    "num_local_experts": 128, "num_experts_per_tok": 4, "sliding_window": 128, "attention_bias": True,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}

DBRX = {
    "model_type": "dbrx", "d_model": 6144, "n_heads": 48, "n_layers": 40, "vocab_size": 100352,
    "attn_config": {"model_type": "", "kv_n_heads": 8},
    "ffn_config": {"model_type": "", "ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
}  # fmt: skip


@pytest.mark.parametrize(("name", "total"), TOTALS.items())
def test_published_totals_are_met_exactly(name: str, total: int) -> None:
    assert SHAPES[name].total_params == total


@pytest.mark.parametrize(("name", "active"), ACTIVE.items())
def test_published_active_parameters_are_met(name: str, active: float) -> None:
    assert SHAPES[name].active_params == pytest.approx(active, rel=0.02)


@pytest.mark.parametrize(("name", "record"), published_cases()["models"].items())
def test_every_model_of_the_published_cases_has_a_shape_of_its_size(name: str, record: dict[str, float]) -> None:
    assert SHAPES[name].total_params / 1e9 == pytest.approx(record["params_b"], rel=ROUNDED.get(name, 0.003))


@pytest.mark.parametrize("name", SHAPES.names())
def test_parts_add_up_to_the_total(name: str) -> None:
    shape = SHAPES[name]
    assert shape.dense_params + shape.expert_total_params == shape.total_params
    assert 0 < shape.active_params <= shape.total_params


def test_shapes_of_presets_count_what_the_built_models_do() -> None:
    pytest.importorskip("torch")
    from turnout.models import PRESETS
    from turnout.models.size import sizes

    # the first blocks are of every kind there is; whole models are counted above and in tests/paths/test_sizes.py
    blocks = 6
    for name, preset in PRESETS.items():
        config = preset()
        built = sizes(replace(config, num_layers=min(blocks, config.num_layers)))
        shape = replace(SHAPES[name], num_layers=min(blocks, SHAPES[name].num_layers))
        assert (shape.total_params, shape.active_params) == (built.total, built.active), name
        forward = shape.forward_flops_per_token(built.seq_len)
        assert forward == pytest.approx(built.flops_per_token, rel=1e-9), name


def test_flops_are_the_megatron_formula_when_all_pairs_count() -> None:
    # Narayanan et al. 2021, arXiv:2104.04473, section 5.1: 96 B s l h^2 (1 + s/6h + V/16lh), blocks recomputed
    shape, length = SHAPES["gpt3-175b"], 2048
    layers, dim, vocab = shape.num_layers, shape.dim, shape.vocab_size
    formula = 96 * layers * dim**2 * (1 + length / (6 * dim) + vocab / (16 * layers * dim))
    head = 2 * vocab * dim
    assert 4 * shape.forward_flops_per_token(length, causal=False) - head == pytest.approx(formula, rel=1e-9)


def test_causal_attention_counts_half_of_the_pairs_and_a_window_fewer() -> None:
    shape = SHAPES["llama3-8b"]
    assert shape.keys_per_query(0, 4096) == pytest.approx(4097 / 2)
    assert shape.keys_per_query(0, 4096, causal=False) == 4096
    assert replace(shape, window=128).keys_per_query(0, 4096) < 128


def test_sparse_layers_follow_first_every_and_encoder() -> None:
    shape = replace(SHAPES["deepseek-v3"], num_layers=8)
    assert shape.sparse_layers == (3, 4, 5, 6, 7)
    assert replace(SHAPES["gshard-600b"], num_layers=4, encoder_layers=4).sparse_layers == (1, 3, 5, 7)


def test_a_pyramid_has_the_experts_of_each_layer() -> None:
    shape = replace(SHAPES["mixtral-8x7b"], num_layers=3, experts_by_layer=(8, 16, 32))
    assert shape.expert_total_params == 56 * shape.expert_params
    with pytest.raises(ConfigError, match="experts_by_layer has 1 entries; the model has 3"):
        replace(shape, experts_by_layer=(8,))


@pytest.mark.parametrize(
    ("config", "total"),
    [(DEEPSEEK, 671_026_404_352), (MIXTRAL, 46_702_792_704), (GPT_OSS, 116_829_156_672), (GPT2, 124_439_808)],
)
def test_a_config_json_gives_the_published_total(config: dict[str, object], total: int) -> None:
    assert shape_of_config(config).total_params == total


def test_experts_in_a_part_of_a_config_are_found() -> None:
    shape = shape_of_config(DBRX)
    assert (shape.num_experts, shape.top_k, shape.num_kv_heads) == (16, 4, 8)
    assert shape.total_params == pytest.approx(131.6e9, rel=1e-3)  # "132B": databricks/dbrx-base


def test_llama_4_has_a_shared_expert_and_every_second_block_sparse() -> None:
    text = {
        "model_type": "llama4_text", "hidden_size": 5120, "num_hidden_layers": 48, "num_attention_heads": 40,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
        "num_local_experts": 128, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "vocab_size": 202048,
    }  # fmt: skip
    shape = shape_of_config({"model_type": "llama4", "text_config": text})
    assert len(shape.sparse_layers) == 24
    assert shape.total_params == pytest.approx(400e9, rel=0.01)  # Maverick: 400B, 17B active
    assert shape.active_params == pytest.approx(17e9, rel=0.03)


def test_a_config_of_deepseek_is_the_named_shape() -> None:
    assert replace(shape_of_config(DEEPSEEK), name="deepseek-v3") == SHAPES["deepseek-v3"]


def test_a_config_is_read_from_its_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    assert read_config(tmp_path).total_params == 46_702_792_704
    assert read_config(tmp_path / "config.json").name == tmp_path.name


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{", "is not JSON"),
        ("[1]", "holds list, not an object"),
        ('{"model_type": "resnet", "depths": [3]}', "not of a transformer.*resnet.*num_hidden_layers"),
        (json.dumps(MIXTRAL | {"hidden_size": "big"}), "hidden_size='big' must be a positive integer"),
        (json.dumps(MIXTRAL | {"num_attention_heads": 33}), "must divide"),
        (json.dumps(DEEPSEEK | {"v_head_dim": None}), "no v_head_dim"),
        (json.dumps(MIXTRAL | {"num_experts_per_tok": None}), "8 experts and no num_experts_per_tok"),
        (json.dumps(MIXTRAL | {"mamba_d_state": 16}), "mamba_d_state=16 is not known here"),
    ],
)
def test_what_is_not_a_transformer_is_named(tmp_path: Path, text: str, error: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=error):
        read_config(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read.*config\.json"):
        read_config(tmp_path / "nowhere" / "config.json")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"num_layers": 0}, r"model\.num_layers=0 must be at least 1"),
        ({"num_kv_heads": 7}, r"num_kv_heads=7 must divide num_heads=32; nearest legal: 4"),
        ({"top_k": 9}, r"top_k=9 must be in 1\.\.8"),
        ({"dense_first": 1, "ffn_hidden": 0}, "ffn_hidden=0, yet some blocks are dense"),
        ({"encoder_layers": 4, "mtp_layers": 1}, r"mtp_layers=1 is of decoders alone.*nearest legal: mtp_layers=0"),
        ({"dense_first": 99}, r"dense_first=99 is above num_layers=32"),
    ],
)
def test_illegal_sizes_are_named(change: dict[str, int], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        replace(SHAPES["mixtral-8x7b"], **change)


def test_an_unknown_shape_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'deepseek-v3'"):
        SHAPES["deepseek-v33"]


def test_a_shape_is_a_value() -> None:
    assert isinstance(hash(SHAPES["tiny"]), int)
    assert ModelShape(**{k: v for k, v in vars(SHAPES["tiny"]).items() if k in ModelShape.__dataclass_fields__})
