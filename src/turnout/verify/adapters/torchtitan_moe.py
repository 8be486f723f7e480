"""torchtitan's MoE (torchtitan.models.common.moe), in one process: sigmoid scores, a bias in place of a loss."""

import functools
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from turnout.verify.adapters.library import known_layer, library_module, versions
from turnout.verify.subject import Expert, Layer, NotApplicable, Sizes, Subject

TORCHTITAN_LAYERS = ("moe",)
_INSTALL = "torchtitan triton"  # it imports triton without asking for it


def from_torchtitan(name: str) -> Subject:
    """torchtitan's MoE with its own settings; it has no capacity, and no shared expert unless it is given one.

    Raises: ConfigError if torchtitan is not installed or the layer is unknown.
    """
    known_layer("torchtitan", name, TORCHTITAN_LAYERS)
    library_module("torchtitan.models.common.moe", install=_INSTALL)
    return Subject(
        name=f"torchtitan:{name} (sigmoid scores; experts in bfloat16 whatever the dtype)",
        build=_build,
        versions=versions("torchtitan"),
    )


class TorchTitanLayer(Layer):
    """A torchtitan MoE."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            raise NotApplicable("its forward takes no mask")
        return self.module(x)

    def gates(self, x_TD: Tensor) -> Tensor:
        router = self.module.get_submodule("router")
        weight_1TK, expert_1TK, _ = router(x_TD.unsqueeze(0), self.module.get_buffer("expert_bias_E"))
        gate_TE = weight_1TK.new_zeros(len(x_TD), self.num_experts)
        return gate_TE.scatter(1, expert_1TK[0], weight_1TK[0])

    def experts(self) -> list[Expert]:
        return [
            functools.partial(_swiglu, *stacked) for stacked in zip(*self.expert_parameters().values(), strict=True)
        ]

    def expert_parameters(self) -> Mapping[str, Tensor]:
        names = (f"routed_experts.inner_experts.{name}" for name in ("w1_EFD", "w2_EDF", "w3_EFD"))
        return {name: self.module.get_parameter(name) for name in names}

    def router_parameters(self) -> Mapping[str, Tensor]:
        return {f"router.{n}": p for n, p in self.module.get_submodule("router").named_parameters()}

    def auxiliary_loss(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        raise NotApplicable("balances with a bias, without a loss")

    def counts(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """It counts in training alone, and adds up over calls."""
        was_training, counter_E = self.module.training, self.module.get_buffer("tokens_per_expert_E")
        before_E = counter_E.clone()
        self.module.train()
        with torch.no_grad():
            self.forward(x, mask)
        self.module.train(was_training)
        counted_E = counter_E - before_E
        counter_E.copy_(before_E)
        return counted_E.long()


def _swiglu(w1_FD: Tensor, w2_DF: Tensor, w3_FD: Tensor, x_TD: Tensor) -> Tensor:
    """GroupedExperts rounds rows and weights to bfloat16, each where it is used, and goes on in it."""
    h_TF = F.silu(x_TD.bfloat16() @ w1_FD.bfloat16().T) * (x_TD.bfloat16() @ w3_FD.bfloat16().T)
    return (h_TF @ w2_DF.bfloat16().T).type_as(x_TD)


def _build(sizes: Sizes) -> TorchTitanLayer:
    if sizes.dim % 8 or sizes.hidden % 8:
        raise NotApplicable(f"its grouped product needs sizes in eights; dim={sizes.dim}, hidden={sizes.hidden}")
    moe = library_module("torchtitan.models.common.moe", install=_INSTALL)
    config = moe.MoE.Config(
        num_experts=sizes.num_experts,
        routed_experts=moe.RoutedExperts.Config(
            inner_experts=moe.GroupedExperts.Config(
                dim=sizes.dim, hidden_dim=sizes.hidden, num_experts=sizes.num_experts
            ),
            token_dispatcher=moe.LocalTokenDispatcher.Config(num_experts=sizes.num_experts, top_k=sizes.k),
        ),
        router=moe.TokenChoiceTopKRouter.Config(
            num_experts=sizes.num_experts,
            gate=moe.Linear.Config(in_features=sizes.dim, out_features=sizes.num_experts),
            top_k=sizes.k,
        ),
    )
    return TorchTitanLayer(config.build(), dim=sizes.dim, num_experts=sizes.num_experts)
