"""Which formula a row of the router table stands for, and its numbers as the layer's values."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.contracts import paper_locmoe, paper_routers
from tests.contracts.paper_choices import Choices, Own, Paper
from tests.contracts.paper_locmoe import Keeping
from turnout.contracts import RouterConfig
from turnout.routers import (
    Cosine,
    DeviceLimited,
    ExpertChoice,
    LocMoE,
    LocMoEPlus,
    NoisyTopK,
    Quantile,
    ReMoE,
    Sinkhorn,
    TopP,
)
from turnout.tensors import Assignment, LossTerm, RouterOutput

Leaves = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A router's settings and what it sees, all in float64."""

    config: Any
    x_RD: Tensor
    leaves: Leaves
    buffers: Mapping[str, Tensor]
    num_experts: int
    training: bool
    normal: Callable[[tuple[int, ...]], Tensor]  # draws as the layer makes them
    own: Own

    @property
    def score_ED(self) -> Tensor:
        return self.leaves["router.score.weight_ED"]


def _device_limited(ask: Ask) -> Paper:
    settings = {name: getattr(ask.config, name) for name in ("k", "groups", "top_groups", "scale")}
    return paper_routers.device_limited(ask.x_RD, ask.score_ED, **settings, own=ask.own)


def _cosine(ask: Ask) -> Paper:
    weight_PD, bias_P = (ask.leaves[f"router.projection.{name}"] for name in ("weight_ED", "bias_E"))
    return paper_routers.cosine(
        ask.x_RD @ weight_PD.T + bias_P,
        ask.leaves["router.directions"],
        ask.leaves["router.log_scale"],
        k=ask.config.k,
        renormalize=ask.config.renormalize,
        own=ask.own,
    )


def _top_p(ask: Ask) -> Paper:
    return paper_routers.top_p(ask.x_RD, ask.score_ED, p=ask.config.p, most=ask.config.most, own=ask.own)


def _expert_choice(ask: Ask) -> Paper:
    return paper_routers.expert_choice(ask.x_RD, ask.score_ED, k=ask.config.k, own=ask.own)


def _locmoe(ask: Ask) -> Paper:
    least = int(ask.buffers["least_capacity"]) if ask.config.floor == "first_step" else 0
    return paper_locmoe.locmoe(ask.x_RD, ask.num_experts, relu=ask.config.relu, least_capacity=least, own=ask.own)


def _locmoe_plus(ask: Ask) -> Paper:
    config = ask.config
    if config.gate == "grap":
        affinity_RE = paper_locmoe.grap_affinity(ask.x_RD, ask.num_experts)
    else:
        affinity_RE = paper_locmoe.row_affinity(ask.x_RD, ask.score_ED)
    mode = config.mode
    if config.switch_step and not bool(ask.buffers["switched"]):
        mode = config.before_switch
    if not ask.training and config.evaluation == "token_choice":
        mode = "token_choice"
    return paper_locmoe.locmoe_plus(
        affinity_RE,
        ask.x_RD.shape[1],
        k=config.k,
        mode=mode,
        temperature=config.temperature,
        keeping=Keeping(
            threshold=config.threshold,
            mass=config.mass,
            floor=config.floor,
            minimum=config.minimum,
            factor=config.factor,
        ),
        own=ask.own,
    )


def _remoe(ask: Ask) -> Paper:
    config = ask.config
    strength = config.start * config.growth ** int(ask.buffers["growths"])
    return paper_routers.remoe(
        ask.x_RD, ask.score_ED, k=config.k, balanced=config.balanced, strength=strength, own=ask.own
    )


def _sinkhorn(ask: Ask) -> Paper:
    settings = {name: getattr(ask.config, name) for name in ("k", "tolerance", "max_rounds")}
    return paper_routers.sinkhorn(ask.x_RD, ask.score_ED, **settings, training=ask.training, own=ask.own)


def _quantile(ask: Ask) -> Paper:
    settings = {name: getattr(ask.config, name) for name in ("k", "rounds", "activation", "scale")}
    price_E = ask.buffers["price_E"].double()
    return paper_routers.quantile(ask.x_RD, ask.score_ED, price_E, **settings, training=ask.training, own=ask.own)


def _noisy_topk(ask: Ask) -> Paper:
    draw_RE = ask.normal((len(ask.x_RD), ask.num_experts)) if ask.training else None
    noise_ED = ask.leaves["router.noise.weight_ED"]
    return paper_routers.noisy_topk(ask.x_RD, ask.score_ED, noise_ED, draw_RE, k=ask.config.k, own=ask.own)


FORMULAS: dict[type[RouterConfig], Callable[[Ask], Paper]] = {
    Cosine: _cosine,
    DeviceLimited: _device_limited,
    ExpertChoice: _expert_choice,
    LocMoE: _locmoe,
    LocMoEPlus: _locmoe_plus,
    NoisyTopK: _noisy_topk,
    Quantile: _quantile,
    ReMoE: _remoe,
    Sinkhorn: _sinkhorn,
    TopP: _top_p,
}


def own_of(selection: Assignment, token_R: Tensor, tolerance: float) -> Own:
    """The layer's assignment as lists, by row of the routed tokens."""
    row_of = {token: row for row, token in enumerate(token_R.tolist())}
    places = [row_of[token] for token in selection.token_N.tolist()]
    ranked = sorted(zip(places, selection.choice_N.tolist(), selection.expert_N.tolist(), strict=True))
    choices: Choices = [[] for _ in row_of]
    for row, _, expert in ranked:
        choices[row].append(expert)
    declined = [] if selection.declined_N is None else selection.declined_N.nonzero().flatten().tolist()
    experts = selection.expert_N.tolist()
    return Own(choices=choices, declined=frozenset((places[n], experts[n]) for n in declined), tolerance=tolerance)


def by_paper(ask: Ask, token_R: Tensor, num_tokens: int) -> RouterOutput:
    """What the router of the paper says, as the layer's value."""
    paper = FORMULAS[type(ask.config)](ask)
    pairs = [(row, e, choice) for row, experts in enumerate(paper.choices) for choice, e in enumerate(experts)]
    row_N, expert_N, choice_N = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 3).unbind(dim=1)
    declined_N = None
    if paper.declined:
        declined_N = torch.tensor([(row, e) in paper.declined for row, e, _ in pairs])
    priority_RE = paper.priority_RE
    assignment = Assignment(
        token_N=token_R[row_N],
        expert_N=expert_N,
        weight_N=paper.gate_RE[row_N, expert_N],
        choice_N=choice_N,
        num_tokens=num_tokens,
        num_experts=ask.num_experts,
        declined_N=declined_N,
        top_k=ask.config.k if paper.even and hasattr(ask.config, "k") else 1 if paper.even else None,
        priority_N=None if priority_RE is None else priority_RE[row_N, expert_N],
        least_capacity=torch.tensor(paper.least_capacity),
    )
    terms = () if paper.loss is None else (paper.loss,)
    return RouterOutput(
        assignment=assignment,
        logits_RE=paper.logits_RE,
        scores_RE=paper.scores_RE,
        token_R=token_R,
        losses=tuple(LossTerm(name="relu_l1", value=v, coefficient=1.0, scope="micro_batch") for v in terms),
        smooth_load_E=paper.smooth_load_E,
    )
