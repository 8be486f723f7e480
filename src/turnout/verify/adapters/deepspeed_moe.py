"""DeepSpeed's MoE: MOELayer with TopKGate and Experts, in one process and without a process group."""

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from turnout.verify.adapters.library import known_layer, library_module, versions
from turnout.verify.subject import Expert, Layer, NotApplicable, Sizes, Subject

# the gate has a function of its own for one choice, for two, and for more
CHOICES: Mapping[str, int] = {"top1": 1, "top2": 2, "topk": 3}
DEEPSPEED_LAYERS = tuple(CHOICES)


def from_deepspeed(name: str) -> Subject:
    """DeepSpeed's layer with one of its gates, set so that nothing is dropped and nothing drawn.

    Raises: ConfigError if deepspeed is not installed or the layer is unknown.
    """
    known_layer("deepspeed", name, DEEPSPEED_LAYERS)
    library_module("deepspeed.moe.sharded_moe", install="deepspeed")
    k = CHOICES[name]
    return Subject(
        name=f"deepspeed:{name} (k={k}, drop_tokens=False, use_rts=False, top2_2nd_expert_sampling=False)",
        build=functools.partial(_build, k),
        versions=versions("deepspeed"),
        rounding=1e-6,
    )


class DeepSpeedLayer(Layer):
    """A MOELayer; its gate computes in float32 whatever the input is."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.module(x, self._used(mask))

    def gates(self, x_TD: Tensor) -> Tensor:
        _, combine_TEC, _, _ = self.module.get_submodule("gate")(x_TD)
        return combine_TEC.sum(dim=2)

    def experts(self) -> list[Expert]:
        return list(self.module.get_submodule("experts.deepspeed_experts").children())

    def expert_parameters(self) -> Mapping[str, Tensor]:
        raise NotApplicable("its experts are modules of their own")

    def router_parameters(self) -> Mapping[str, Tensor]:
        return {"gate.wg.weight": self.module.get_parameter("gate.wg.weight")}

    def auxiliary_loss(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self.forward(x, mask)
        return self.module.l_aux  # pyright: ignore[reportReturnType]

    def counts(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            self.forward(x, mask)
        return self.module.exp_counts  # pyright: ignore[reportReturnType]

    def _used(self, mask: Tensor | None) -> Tensor | None:
        """As the gate for one choice wants it: integers, one a token; the other gates do not read it."""
        if mask is None:
            return None
        if self.module.get_submodule("gate").k != 1:
            raise NotApplicable("its gate reads used_token for k=1 alone")
        return mask.flatten().long()


def _build(k: int, sizes: Sizes) -> DeepSpeedLayer:
    if sizes.num_experts < k:
        raise NotApplicable(f"k={k} needs {k} experts")
    sharded = library_module("deepspeed.moe.sharded_moe", install="deepspeed")
    experts = library_module("deepspeed.moe.experts", install="deepspeed")
    gate = sharded.TopKGate(
        sizes.dim,
        sizes.num_experts,
        k,
        min_capacity=0,
        drop_tokens=False,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    )
    bank = experts.Experts(_expert(sizes), sizes.num_experts, "ep_size_1")
    module = sharded.MOELayer(gate, bank, "ep_size_1", 1, sizes.num_experts)
    return DeepSpeedLayer(module, dim=sizes.dim, num_experts=sizes.num_experts)


def _expert(sizes: Sizes) -> nn.Module:
    """DeepSpeed leaves the expert to its user."""
    return nn.Sequential(nn.Linear(sizes.dim, sizes.hidden), nn.GELU(), nn.Linear(sizes.hidden, sizes.dim))
