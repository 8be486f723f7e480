"""MoE blocks of Hugging Face transformers (5.x: experts as three-dimensional parameters, routers of their own)."""

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from turnout.errors import ConfigError
from turnout.verify.adapters.library import versions
from turnout.verify.subject import Expert, Layer, NotApplicable, Sizes, Subject


@dataclass(frozen=True, kw_only=True)
class Block:
    """Where a model's MoE block is, and how its configuration spells the suite's sizes."""

    module: str
    config: str
    block: str
    router: str = "gate"  # attribute of the block
    settings: Callable[[Sizes], dict[str, Any]]


def _usual(sizes: Sizes, experts: str) -> dict[str, Any]:
    return {"hidden_size": sizes.dim, experts: sizes.num_experts, "num_experts_per_tok": sizes.k}


def _deepseek(sizes: Sizes) -> dict[str, Any]:
    if sizes.num_experts < 2:
        raise NotApplicable("its group score needs two experts a group")
    return _usual(sizes, "n_routed_experts") | {
        "moe_intermediate_size": sizes.hidden,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
    }


BLOCKS: Mapping[str, Block] = {
    "mixtral": Block(
        module="mixtral",
        config="MixtralConfig",
        block="MixtralSparseMoeBlock",
        settings=lambda s: _usual(s, "num_local_experts") | {"intermediate_size": s.hidden},
    ),
    "qwen3_moe": Block(
        module="qwen3_moe",
        config="Qwen3MoeConfig",
        block="Qwen3MoeSparseMoeBlock",
        settings=lambda s: _usual(s, "num_experts") | {"moe_intermediate_size": s.hidden, "norm_topk_prob": True},
    ),
    "olmoe": Block(
        module="olmoe",
        config="OlmoeConfig",
        block="OlmoeSparseMoeBlock",
        settings=lambda s: _usual(s, "num_experts") | {"intermediate_size": s.hidden},
    ),
    "deepseek_v3": Block(module="deepseek_v3", config="DeepseekV3Config", block="DeepseekV3MoE", settings=_deepseek),
    "gpt_oss": Block(
        module="gpt_oss",
        config="GptOssConfig",
        block="GptOssMLP",
        router="router",
        settings=lambda s: _usual(s, "num_local_experts") | {"intermediate_size": s.hidden},
    ),
}


def from_transformers(name: str, implementation: str = "eager") -> Subject:
    """A block of BLOCKS, its experts run by one of transformers' implementations (eager, batched_mm, grouped_mm).

    Raises: ConfigError if transformers is not installed or the block is unknown.
    """
    if name not in BLOCKS:
        raise ConfigError(f"unknown transformers block {name!r}; available: {', '.join(BLOCKS)}")
    try:
        importlib.import_module("transformers")
    except ImportError as error:
        raise ConfigError("transformers is not installed: pip install 'turnout[bench]'") from error
    return Subject(
        name=f"transformers:{name}:{implementation}",
        build=functools.partial(_build, BLOCKS[name], implementation),
        versions=versions("transformers"),
        rounding=1e-6,
    )


class TransformersLayer(Layer):
    """A block whose router returns (logits, weights, indices)."""

    def __init__(self, module: nn.Module, router: str, sizes: Sizes) -> None:
        super().__init__(module, dim=sizes.dim, num_experts=sizes.num_experts)
        self.router = router

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            raise NotApplicable("its forward takes no mask")
        out = self.module(x)
        return out[0] if isinstance(out, tuple) else out

    def gates(self, x_TD: Tensor) -> Tensor:
        _, weight_TK, expert_TK = self.module.get_submodule(self.router)(x_TD)
        return weight_TK.new_zeros(len(x_TD), self.num_experts).scatter(1, expert_TK, weight_TK)

    def experts(self) -> list[Expert]:
        bank = self.module.get_submodule("experts")
        interleaved = hasattr(bank, "gate_up_proj_bias")
        make = _interleaved if interleaved else _gated
        return [functools.partial(make, bank, e) for e in range(self.num_experts)]

    def shared(self, x_TD: Tensor) -> Tensor:
        if not hasattr(self.module, "shared_experts"):
            return torch.zeros_like(x_TD)
        return self.module.get_submodule("shared_experts")(x_TD)

    def expert_parameters(self) -> Mapping[str, Tensor]:
        return {f"experts.{n}": p for n, p in self.module.get_submodule("experts").named_parameters()}

    def router_parameters(self) -> Mapping[str, Tensor]:
        return {f"{self.router}.{n}": p for n, p in self.module.get_submodule(self.router).named_parameters()}


def _gated(bank: Any, e: int, x_TD: Tensor) -> Tensor:
    gate_TF, up_TF = (x_TD @ bank.gate_up_proj[e].T).chunk(2, dim=1)
    return (F.silu(gate_TF) * up_TF) @ bank.down_proj[e].T


def _interleaved(bank: Any, e: int, x_TD: Tensor) -> Tensor:
    """GPT-OSS: columns of gate and up take turns, both clamped at 7, biases, up + 1. Source: arXiv:2508.10925."""
    both_TG = x_TD @ bank.gate_up_proj[e] + bank.gate_up_proj_bias[e]
    gate_TF, up_TF = both_TG[:, ::2].clamp(max=7.0), both_TG[:, 1::2].clamp(-7.0, 7.0)
    return ((up_TF + 1) * gate_TF * torch.sigmoid(1.702 * gate_TF)) @ bank.down_proj[e] + bank.down_proj_bias[e]


def _build(block: Block, implementation: str, sizes: Sizes) -> TransformersLayer:
    package = f"transformers.models.{block.module}"
    modeling = importlib.import_module(f"{package}.modeling_{block.module}")
    configuration = importlib.import_module(f"{package}.configuration_{block.module}")
    config = getattr(configuration, block.config)(**block.settings(sizes))
    config._experts_implementation = implementation
    return TransformersLayer(getattr(modeling, block.block)(config), block.router, sizes)
