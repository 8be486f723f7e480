"""The published models with every option kept and every size made small."""

from dataclasses import replace

from turnout.layers.attention import AttentionConfig, AttentionKind
from turnout.layers.mla import MLAConfig
from turnout.layers.moe import MoEConfig
from turnout.models import PRESETS, ModelConfig
from turnout.routers import DeepSeekV3, TopK

# made small, mixtral-8x22b and gpt-oss-20b are their brothers
ARCHITECTURES = [
    "deepseek-v3",
    "deepspeed-350m-moe-128",
    "gpt-oss-120b",
    "mixtral-8x7b",
    "olmoe-1b-7b",
    "qwen3-30b-a3b",
]


def small(name: str) -> ModelConfig:
    """The preset `name` of four narrow blocks."""
    full = PRESETS[name]()
    assert full.moe is not None
    return replace(
        full,
        vocab_size=50,
        dim=64,
        num_layers=4,
        max_seq_len=64,
        hidden=20,
        dense_first=min(full.dense_first, 2),
        attention=_small_attention(full.attention),
        moe=_small_moe(full.moe),
    )


def _small_attention(attention: AttentionKind) -> AttentionKind:
    assert isinstance(attention, AttentionConfig | MLAConfig)
    # a trained length at which the ramp of these few dimensions has a slope
    yarn = None if attention.yarn is None else replace(attention.yarn, trained_length=512)
    if isinstance(attention, MLAConfig):
        widths = {"q_rank": 12, "kv_rank": 10, "nope_dim": 8, "rope_dim": 8, "v_dim": 6}
        return replace(attention, num_heads=3, yarn=yarn, **widths)
    kv_heads = 4 if attention.num_kv_heads == attention.num_heads else 2
    window = 5 if attention.window else 0
    return replace(attention, num_heads=4, num_kv_heads=kv_heads, head_dim=16, window=window, yarn=yarn)


def _small_moe(moe: MoEConfig) -> MoEConfig:
    router = moe.router
    if isinstance(router, DeepSeekV3):
        router = replace(router, k=3, groups=4, top_groups=2)
    elif isinstance(router, TopK):
        router = replace(router, k=min(router.k, 3))
    return replace(moe, num_experts=12, hidden=10, router=router, shared_hidden=10 if moe.shared_hidden else 0)
