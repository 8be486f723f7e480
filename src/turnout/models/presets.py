"""Named model shapes."""

from turnout.layers.attention import AttentionConfig
from turnout.layers.moe import MoEConfig
from turnout.models.decoder import ModelConfig
from turnout.routers import TopK


def tiny() -> ModelConfig:
    """The recipe `tiny`."""
    return ModelConfig(
        attention=AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=64),
        moe=MoEConfig(num_experts=16, hidden=512, router=TopK(k=2)),
    )


def tiny_dense() -> ModelConfig:
    """The dense twin of `tiny`: the same active FLOPs."""
    return ModelConfig(attention=AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=64), hidden=1024)
