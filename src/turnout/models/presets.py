"""Named model shapes; PRESETS lists them for recipes and the command line."""

from collections.abc import Callable

from turnout.dispatch import FixedCapacity
from turnout.layers.attention import AttentionConfig
from turnout.layers.mla import MLAConfig
from turnout.layers.moe import MoEConfig
from turnout.layers.rope import Yarn
from turnout.losses import LoadBalance, RouterZ
from turnout.models.decoder import ModelConfig
from turnout.registry import Table
from turnout.routers import DeepSeekV3, Hash, Switch, TopK

PRESETS: Table[Callable[[], ModelConfig]] = Table("model preset")


@PRESETS.register("tiny")
def tiny() -> ModelConfig:
    """The recipe `tiny`: narrow, so that minutes of CPU see many tokens a parameter, which is where experts pay.

    Experts by token id: in so short a life a learned router spends its tokens on learning where to send them.
    Half of the width is one expert of the token's and half a shared one, which learns what all tokens need, such as
    copying: experts by id would each have to learn it from a share of the text. Initial weights of
    0.02, which suit widths in the thousands, are too small for a width of 64. With plain keys, models so small find
    out late, at some seeds not at all, how to copy from what stands before; smeared keys make it a matter of one layer.
    Measurements: docs/LOG.md.
    """
    return ModelConfig(
        dim=64,
        num_layers=4,
        attention=AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=32, smear_keys=True),
        moe=MoEConfig(num_experts=32, hidden=128, shared_hidden=128, router=Hash(k=1), losses=(), init_std=0.06),
        init_std=0.06,
    )


@PRESETS.register("tiny-dense")
def tiny_dense() -> ModelConfig:
    """The dense twin of `tiny`: the same active FLOPs."""
    return ModelConfig(
        dim=64,
        num_layers=4,
        attention=AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=32, smear_keys=True),
        hidden=256,
        init_std=0.06,
    )


@PRESETS.register("smoke")
def smoke() -> ModelConfig:
    """The recipe `smoke`: seconds, to see that everything works."""
    return ModelConfig(
        dim=64,
        num_layers=2,
        attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=32),
        moe=MoEConfig(num_experts=4, hidden=64, router=TopK(k=2)),
        max_seq_len=256,
    )


@PRESETS.register("mixtral-8x7b")
def mixtral_8x7b() -> ModelConfig:
    """Mixtral 8x7B. Source: Jiang et al. 2024, arXiv:2401.04088; config.json of mistralai/Mixtral-8x7B-v0.1."""
    return ModelConfig(
        vocab_size=32_000,
        dim=4096,
        num_layers=32,
        max_seq_len=32_768,
        attention=AttentionConfig(num_heads=32, num_kv_heads=8, head_dim=128, rope_theta=1e6),
        moe=MoEConfig(num_experts=8, hidden=14_336, router=TopK(k=2), losses=(LoadBalance(coefficient=0.02),)),
        tie_embeddings=False,
        norm_eps=1e-5,
    )


@PRESETS.register("mixtral-8x22b")
def mixtral_8x22b() -> ModelConfig:
    """Mixtral 8x22B. Source: config.json of mistralai/Mixtral-8x22B-v0.1."""
    return ModelConfig(
        vocab_size=32_000,
        dim=6144,
        num_layers=56,
        max_seq_len=65_536,
        attention=AttentionConfig(num_heads=48, num_kv_heads=8, head_dim=128, rope_theta=1e6),
        moe=MoEConfig(num_experts=8, hidden=16_384, router=TopK(k=2), losses=(LoadBalance(coefficient=0.001),)),
        tie_embeddings=False,
        norm_eps=1e-5,
    )


@PRESETS.register("deepseek-v3")
def deepseek_v3() -> ModelConfig:
    """DeepSeek-V3 without its multi-token prediction. Source: DeepSeek-AI 2024, arXiv:2412.19437, section 4.2."""
    return ModelConfig(
        vocab_size=129_280,
        dim=7168,
        num_layers=61,
        max_seq_len=163_840,
        attention=MLAConfig(
            num_heads=128,
            q_rank=1536,
            kv_rank=512,
            nope_dim=128,
            rope_dim=64,
            v_dim=128,
            yarn=Yarn(factor=40.0, trained_length=4096),
        ),
        hidden=18_432,
        moe=MoEConfig(
            num_experts=256,
            hidden=2048,
            shared_hidden=2048,
            router=DeepSeekV3(k=8, groups=8, top_groups=4, scale=2.5, init_std=0.006),
            losses=(LoadBalance(coefficient=1e-4, scope="sequence"),),
            init_std=0.006,
        ),
        dense_first=3,
        tie_embeddings=False,
        init_std=0.006,
    )


@PRESETS.register("qwen3-30b-a3b")
def qwen3_30b_a3b() -> ModelConfig:
    """Qwen3-30B-A3B. Source: Qwen team 2025, arXiv:2505.09388; config.json of Qwen/Qwen3-30B-A3B."""
    return ModelConfig(
        vocab_size=151_936,
        dim=2048,
        num_layers=48,
        max_seq_len=40_960,
        attention=AttentionConfig(num_heads=32, num_kv_heads=4, head_dim=128, rope_theta=1e6, qk_norm="head"),
        moe=MoEConfig(
            num_experts=128,
            hidden=768,
            router=TopK(k=8),
            losses=(LoadBalance(coefficient=0.001, scope="global"),),
        ),
        tie_embeddings=False,
    )


@PRESETS.register("olmoe-1b-7b")
def olmoe_1b_7b() -> ModelConfig:
    """OLMoE-1B-7B. Source: Muennighoff et al. 2024, arXiv:2409.02060; config.json of allenai/OLMoE-1B-7B-0924."""
    return ModelConfig(
        vocab_size=50_304,
        dim=2048,
        num_layers=16,
        max_seq_len=4096,
        attention=AttentionConfig(num_heads=16, num_kv_heads=16, head_dim=128, qk_norm="full"),
        moe=MoEConfig(
            num_experts=64,
            hidden=1024,
            router=TopK(k=8, renormalize=False),
            losses=(LoadBalance(coefficient=0.01), RouterZ(coefficient=0.001)),
        ),
        tie_embeddings=False,
        norm_eps=1e-5,
    )


@PRESETS.register("gpt-oss-120b")
def gpt_oss_120b() -> ModelConfig:
    """GPT-OSS-120B. Source: OpenAI 2025, arXiv:2508.10925; config.json of openai/gpt-oss-120b."""
    return _gpt_oss(num_layers=36, num_experts=128)


@PRESETS.register("gpt-oss-20b")
def gpt_oss_20b() -> ModelConfig:
    """GPT-OSS-20B. Source: OpenAI 2025, arXiv:2508.10925; config.json of openai/gpt-oss-20b."""
    return _gpt_oss(num_layers=24, num_experts=32)


def _gpt_oss(*, num_layers: int, num_experts: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=201_088,
        dim=2880,
        num_layers=num_layers,
        max_seq_len=131_072,
        attention=AttentionConfig(
            num_heads=64,
            num_kv_heads=8,
            head_dim=64,
            rope_theta=150_000.0,
            yarn=Yarn(factor=32.0, trained_length=4096, whole_dims=False),
            bias=True,
            sinks=True,
            window=128,
            full_every=2,
        ),
        moe=MoEConfig(
            num_experts=num_experts, hidden=2880, router=TopK(k=4, bias=True), expert="swiglu_clamped", bias=True
        ),
        tie_embeddings=False,
        norm_eps=1e-5,
    )


@PRESETS.register("deepspeed-350m-moe-128")
def deepspeed_350m_moe_128() -> ModelConfig:
    """350M+MoE-128 of DeepSpeed-MoE: GPT-2 with 128 experts in every other block.

    Source: Rajbhandari et al. 2022, arXiv:2201.05596, section 3; examples_deepspeed/MoE/ds_pretrain_gpt_350M_MoE128.sh
        of https://github.com/deepspeedai/Megatron-DeepSpeed.
    """
    return ModelConfig(
        vocab_size=50_304,
        dim=1024,
        num_layers=24,
        max_seq_len=2048,
        attention=AttentionConfig(num_heads=16, num_kv_heads=16, head_dim=64, bias=True),
        positions="learned",
        hidden=4096,
        ffn="gelu",
        ffn_bias=True,
        moe=MoEConfig(
            num_experts=128,
            hidden=4096,
            router=Switch(init_std=0.014),
            capacity=FixedCapacity(factor=1.0, minimum=4),
            expert="gelu",
            bias=True,
            init_std=0.014,
        ),
        moe_every=2,
        norm="layer",
        norm_eps=1e-5,
        init_std=0.014,
    )
