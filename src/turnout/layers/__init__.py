"""Layers: the MoE layer and what stands around it in a transformer block."""

from turnout.layers.moe import MoE, MoEConfig

__all__ = ["MoE", "MoEConfig"]
