"""Which auxiliary losses a router is compared with: those somebody asks for, or else those of its paper."""

from collections.abc import Sequence

from turnout.config import override, to_dict
from turnout.contracts import Loss, RouterConfig
from turnout.layers.moe import MoEConfig
from turnout.losses import CommunicationBalance, DeviceBalance, Entropy, Importance, LoadBalance, LoadCV
from turnout.routers import DeepSeekV3, DeviceLimited, GShardTop2, NoisyTopK, TopP
from turnout.train.recipes import load_recipe


def asked_losses(name_or_path: str, overrides: Sequence[str] = ()) -> tuple[Loss, ...] | None:
    """The losses that an override names, or that the recipe has in place of the default; None: nobody asks for any.

    A recipe whose router can have no loss says nothing about those of others.
    Raises: ConfigError as `load_recipe` does.
    """
    own, chosen = load_recipe(name_or_path), load_recipe(name_or_path, overrides).model.moe
    if own.model.moe is None or chosen is None:
        return None
    unnamed = to_dict(own)
    del unnamed["model"]["moe"]["losses"]
    if "losses" in override(unnamed, overrides)["model"]["moe"]:
        return chosen.losses
    could_have = own.model.moe.router.scores_have_gradient
    return own.model.moe.losses if could_have and own.model.moe.losses != MoEConfig().losses else None


def paper_losses(router: RouterConfig) -> tuple[Loss, ...]:
    """The losses the router's paper trains it with; the load-balance loss where its paper has none of its own.

    A loss that the router itself returns (ReMoE's L1) is not among them. LocMoE's locality loss is left out: in one
    process all experts are on the one node, where it could only balance. Top-p's balance loss is here that of all
    routers, whose loads sum to 1; the paper's sum to a token's mean number of experts.
    Source: Shazeer et al. 2017, arXiv:1701.06538, appendix A (of the gates, each 0.1); Lepikhin et al. 2020,
        arXiv:2006.16668, algorithm 1 (first choices); Huang et al. 2024, arXiv:2403.07652 (0.01 and 1e-4); DeepSeek-AI
        2024, arXiv:2405.04434, section 3.1.2 (0.003, 0.05 and 0.02), and arXiv:2412.19437, section 4.2 (1e-4).
    """
    match router:
        case NoisyTopK():
            return (Importance(of="weights"), LoadCV())
        case TopP():
            return (LoadBalance(), Entropy())
        case GShardTop2():
            return (LoadBalance(count="first"),)
        case DeepSeekV3() if router.own_balance:
            return (LoadBalance(coefficient=1e-4, scope="sequence"),)
        case DeviceLimited() if router.groups > 1:
            groups, top_groups = router.groups, router.top_groups
            over_devices = (DeviceBalance(groups=groups), CommunicationBalance(groups=groups, top_groups=top_groups))
            return (LoadBalance(coefficient=0.003), *over_devices)
        case DeviceLimited():
            return (LoadBalance(coefficient=0.003),)
    return balance_alone(router)


def balance_alone(router: RouterConfig) -> tuple[Loss, ...]:
    """The load-balance loss at its default, for a router that a loss can move and that does not balance itself."""
    return () if router.own_balance or not router.scores_have_gradient else (LoadBalance(),)
