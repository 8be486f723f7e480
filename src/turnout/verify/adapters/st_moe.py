"""The MoE of st-moe-pytorch: ST-MoE's top-n gating over dense one-hot dispatch."""

from collections.abc import Mapping

from torch import Tensor

from turnout.verify.adapters.library import known_layer, library_module, versions
from turnout.verify.subject import Expert, Layer, NotApplicable, Sizes, Subject

ST_MOE_LAYERS = ("moe",)


def from_st_moe_pytorch(name: str) -> Subject:
    """Its MoE with room for every token and every choice taken; the rest as it comes.

    Raises: ConfigError if st-moe-pytorch is not installed or the layer is unknown.
    """
    known_layer("st_moe_pytorch", name, ST_MOE_LAYERS)
    library_module("st_moe_pytorch", install="st-moe-pytorch")
    return Subject(
        name=f"st_moe_pytorch:{name} (threshold=0, capacity_factor=num_experts)",
        build=_build,
        versions=versions("st-moe-pytorch"),
    )


class StMoELayer(Layer):
    """An st_moe_pytorch MoE; its experts have a hidden size of their own."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            raise NotApplicable("its forward takes no mask")
        return self.module(x).outputs

    def gates(self, x_TD: Tensor) -> Tensor:
        _, combine_1TEC, _, _ = self.module.get_submodule("gate")(x_TD.unsqueeze(0))
        return combine_1TEC[0].sum(dim=2)

    def experts(self) -> list[Expert]:
        return list(self.module.get_submodule("experts.experts").children())

    def expert_parameters(self) -> Mapping[str, Tensor]:
        raise NotApplicable("its experts are modules of their own")

    def router_parameters(self) -> Mapping[str, Tensor]:
        return {f"gate.{n}": p for n, p in self.module.get_submodule("gate").named_parameters()}

    def auxiliary_loss(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """It has one in training alone."""
        if mask is not None:
            raise NotApplicable("its forward takes no mask")
        was_training = self.module.training
        self.module.train()
        loss = self.module(x).total_aux_loss
        self.module.train(was_training)
        return loss


def _build(sizes: Sizes) -> StMoELayer:
    if sizes.k < 2 or sizes.num_experts < sizes.k:
        raise NotApplicable(f"its gate needs k of 2 or more and as many experts; k={sizes.k}")
    module = library_module("st_moe_pytorch", install="st-moe-pytorch").MoE(
        dim=sizes.dim,
        num_experts=sizes.num_experts,
        gating_top_n=sizes.k,
        threshold_train=0.0,
        threshold_eval=0.0,
        capacity_factor_train=float(sizes.num_experts),
        capacity_factor_eval=float(sizes.num_experts),
    )
    return StMoELayer(module, dim=sizes.dim, num_experts=sizes.num_experts)
