"""MoE layers with the settings of the papers; what a function does not set is the library's default.

`hidden` is the hidden width of one routed expert. Initial weights are the library's, not the papers'.
"""

from turnout.dispatch import FixedCapacity, TutelCapacity
from turnout.layers import MoE
from turnout.losses import LoadBalance, Locality, RouterZ
from turnout.routers import DeepSeekV3, ExpertChoice, GShardTop2, LocMoE, LocMoEPlus, Switch, TopK


def gshard(
    dim: int,
    hidden: int,
    num_experts: int,
    *,
    coefficient: float = 0.01,
    group_size: int = 0,
    backend: str = "auto",
) -> MoE:
    """GShard: top-2, the second expert by chance, capacity 2S/E, ReLU experts, balance loss on first choices.

    `group_size` is the paper's S, the tokens that share a capacity; 0 takes the batch as one group. The paper does
    not print its loss coefficient: 0.01 is that of its open descendant in mesh-tensorflow, with the loss times E^2.
    Source: Lepikhin et al. 2020, arXiv:2006.16668, section 2.2 and algorithm 1.
    """
    return MoE(
        dim,
        hidden,
        num_experts,
        router=GShardTop2(),
        expert="relu",
        capacity=FixedCapacity(factor=1.0, group_size=group_size),
        losses=(LoadBalance(coefficient=coefficient, count="first"),),
        backend=backend,
    )


def switch(
    dim: int,
    hidden: int,
    num_experts: int,
    *,
    capacity_factor: float = 1.25,
    coefficient: float = 0.01,
    jitter: float = 0.01,
    backend: str = "auto",
) -> MoE:
    """Switch: top-1 with jittered router input, capacity 1.25 T/E, ReLU experts.

    Source: Fedus et al. 2021, arXiv:2101.03961, eq. 1-6 and section 2.4 (jitter).
    """
    return MoE(
        dim,
        hidden,
        num_experts,
        router=Switch(jitter=jitter),
        expert="relu",
        capacity=FixedCapacity(factor=capacity_factor),
        losses=(LoadBalance(coefficient=coefficient),),
        backend=backend,
    )


def mixtral(
    dim: int, hidden: int, num_experts: int = 8, *, k: int = 2, coefficient: float = 0.02, backend: str = "auto"
) -> MoE:
    """Mixtral: top-2 of 8, softmax over the chosen logits, SwiGLU experts, no capacity.

    Source: Jiang et al. 2024, arXiv:2401.04088, section 2.1; the coefficient is that of the released 8x7B config.
    """
    return MoE(
        dim,
        hidden,
        num_experts,
        router=TopK(k=k),
        losses=(LoadBalance(coefficient=coefficient),),
        backend=backend,
    )


def olmoe(
    dim: int,
    hidden: int,
    num_experts: int = 64,
    *,
    k: int = 8,
    coefficient: float = 0.01,
    z_coefficient: float = 0.001,
    backend: str = "auto",
) -> MoE:
    """OLMoE: top-8 of 64 small SwiGLU experts, weights of the full softmax, dropless, balance and z-loss.

    Source: Muennighoff et al. 2024, arXiv:2409.02060, section 2.
    """
    return MoE(
        dim,
        hidden,
        num_experts,
        router=TopK(k=k, renormalize=False),
        losses=(LoadBalance(coefficient=coefficient), RouterZ(coefficient=z_coefficient)),
        backend=backend,
    )


def qwen3_moe(
    dim: int, hidden: int, num_experts: int = 128, *, k: int = 8, coefficient: float = 0.001, backend: str = "auto"
) -> MoE:
    """Qwen3-MoE: top-8 of 128, renormalised weights, no shared expert, balance counted over the global batch.

    Source: Yang et al. 2025, arXiv:2505.09388, section 2; loss: Qiu et al. 2025, arXiv:2501.11873; the coefficient
        is that of the released configs.
    """
    return MoE(
        dim,
        hidden,
        num_experts,
        router=TopK(k=k),
        losses=(LoadBalance(coefficient=coefficient, scope="global"),),
        backend=backend,
    )


def deepseek_moe(
    dim: int,
    hidden: int,
    num_experts: int = 64,
    *,
    k: int = 6,
    num_shared: int = 2,
    coefficient: float = 0.001,
    backend: str = "auto",
) -> MoE:
    """DeepSeekMoE: top-6 of 64 fine-grained experts, weights of the full softmax, and shared experts for all tokens.

    The `num_shared` shared experts are computed as one of `num_shared * hidden` columns, which is the same function.
    Source: Dai et al. 2024, arXiv:2401.06066, section 3; settings of the 16B model.
    """
    return MoE(
        dim,
        hidden,
        num_experts,
        router=TopK(k=k, renormalize=False),
        losses=(LoadBalance(coefficient=coefficient),),
        shared_hidden=num_shared * hidden,
        backend=backend,
    )


def deepseek_v3(
    dim: int,
    hidden: int,
    num_experts: int = 256,
    *,
    k: int = 8,
    groups: int = 8,
    top_groups: int = 4,
    num_shared: int = 1,
    coefficient: float = 1e-4,
    backend: str = "auto",
) -> MoE:
    """DeepSeek-V3: top-8 of 256 by sigmoid plus a bias that balances, 4 of 8 groups a token, one shared expert.

    Source: DeepSeek-AI 2024, arXiv:2412.19437, sections 2.1.2 and 4.2; the loss, by sequence, is its complement.
    """
    return MoE(
        dim,
        hidden,
        num_experts,
        router=DeepSeekV3(k=k, groups=groups, top_groups=top_groups),
        losses=(LoadBalance(coefficient=coefficient, scope="sequence"),),
        shared_hidden=num_shared * hidden,
        backend=backend,
    )


def tutel(
    dim: int,
    hidden: int,
    num_experts: int,
    *,
    k: int = 2,
    capacity_factor: float = 1.0,
    coefficient: float = 0.01,
    backend: str = "auto",
) -> MoE:
    """Tutel: top-2, renormalised weights, ReLU experts, capacity by Tutel's setting (0: whatever is needed).

    k and the setting may change from call to call (`top_k`, `capacity_factor`). The loss is its gshard_loss, on
    first choices, whose coefficient Tutel leaves to its user; of those its paper tries on SwinV2, 0.01 is the best.
    Source: Hwang et al. 2022, arXiv:2206.03382, section 4.1.
    """
    return MoE(
        dim,
        hidden,
        num_experts,
        router=TopK(k=k),
        expert="relu",
        capacity=TutelCapacity(factor=capacity_factor),
        losses=(LoadBalance(coefficient=coefficient, count="first"),),
        backend=backend,
    )


def expert_choice(dim: int, hidden: int, num_experts: int, *, k: int = 2, backend: str = "auto") -> MoE:
    """Expert choice: every expert takes its k T / E best tokens, so there is nothing to balance; ReLU experts.

    For encoders: who is taken depends on the whole call.
    Source: Zhou et al. 2022, arXiv:2202.09368, section 3, capacity factor 2.
    """
    return MoE(dim, hidden, num_experts, router=ExpertChoice(k=k), expert="relu", losses=(), backend=backend)


def locmoe(
    dim: int,
    hidden: int,
    num_experts: int,
    *,
    local: tuple[int, ...] = (),
    capacity_factor: float = 1.1,
    minimum: int = 1,
    coefficient: float = 0.01,
    backend: str = "auto",
) -> MoE:
    """LocMoE: top-1 by a gate that learns nothing, GELU experts, balance and locality loss.

    `parallel.apply` tells the locality loss which experts are near; `local` are those of a node to simulate in one
    process, and empty it is 0 there.
    The paper gives no coefficient of the locality loss: it is taken to be that of the balance loss.
    Source: Li et al. 2024, arXiv:2401.13920.
    """
    return MoE(
        dim,
        hidden,
        num_experts,
        router=LocMoE(),
        expert="gelu",
        capacity=FixedCapacity(factor=capacity_factor, minimum=minimum),
        losses=_locmoe_losses(coefficient, local),
        backend=backend,
    )


def locmoe_plus(
    dim: int,
    hidden: int,
    num_experts: int,
    *,
    k: int = 1,
    threshold: float = 0.75,
    local: tuple[int, ...] = (),
    coefficient: float = 0.01,
    backend: str = "auto",
) -> MoE:
    """LocMoE+: tokens choose experts by affinity, experts keep the best of them; losses and experts as in `locmoe`.

    Its capacity is the router's own: between the lower bound of remark 7 and 1.1 times the balanced load.
    Source: Li et al. 2024, arXiv:2406.00023.
    """
    return MoE(
        dim,
        hidden,
        num_experts,
        router=LocMoEPlus(k=k, threshold=threshold),
        expert="gelu",
        losses=_locmoe_losses(coefficient, local),
        backend=backend,
    )


def _locmoe_losses(coefficient: float, local: tuple[int, ...]) -> tuple[LoadBalance, Locality]:
    return LoadBalance(coefficient=coefficient), Locality(coefficient=coefficient, local=local)
