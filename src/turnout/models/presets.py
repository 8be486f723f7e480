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


def smoke() -> ModelConfig:
    """The recipe `smoke`: seconds, to see that everything works."""
    return ModelConfig(
        dim=64,
        num_layers=2,
        attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=32),
        moe=MoEConfig(num_experts=4, hidden=64, router=TopK(k=2)),
        max_seq_len=256,
    )
