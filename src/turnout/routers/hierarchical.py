"""Hierarchical: a router over groups of experts, and in each group a router over its own."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from turnout.contracts import Router, RouterConfig
from turnout.errors import ConfigError
from turnout.routers.switch import Switch
from turnout.routers.topk import TopK
from turnout.tensors import Assignment, LossTerm, MoEStats, RouterInput, RouterOutput


@RouterConfig.TABLE.register("hierarchical")
@dataclass(frozen=True, kw_only=True)
class Hierarchical(RouterConfig):
    """A token goes to groups by `outer`, and within each of them to experts by the group's own `inner` router.

    A choice weighs the product of its two weights. An `inner` that is hierarchical itself makes the tree deeper.
    Expert e stands in group e // (E / groups). An inner router sees only its group's tokens, so the scores of experts
    in a group a token did not ask are those of an undecided router: the group's score, divided evenly.
    Both levels gshard with later_groups="first" is MoE2D of Mesh TensorFlow, up to 3 experts a token: the choice that
    is sent to a later group carries the weights of those that are not.
    Source: Shazeer et al. 2017, arXiv:1701.06538, appendix B; transformer_moe_layer_v2 in
        https://github.com/tensorflow/mesh/blob/master/mesh_tensorflow/transformer/moe.py.
    """

    groups: int = 2  # equal groups the experts stand in
    outer: RouterConfig = Switch()  # how a token chooses groups
    inner: RouterConfig = TopK()  # how it chooses experts within a group; each group has its own parameters
    later_groups: Literal["all", "first"] = "all"  # which choices within a token's second, third .. group are sent

    def __post_init__(self) -> None:
        if self.groups < 2:
            raise ConfigError(f"router.groups={self.groups} must be at least 2; for one group use its router alone")

    @property
    def choices(self) -> int:
        return self.outer.choices * self.inner.choices

    @property
    def exact_choices(self) -> bool:
        return self.outer.exact_choices and self.inner.exact_choices

    @property
    def own_balance(self) -> str:
        outer, inner = self.outer.own_balance, self.inner.own_balance
        return f"{outer}; within groups {inner}" if outer and inner else ""

    @property
    def gives_smooth_load(self) -> bool:
        return self.outer.gives_smooth_load and self.inner.gives_smooth_load

    @property
    def scores_have_gradient(self) -> bool:
        return self.outer.scores_have_gradient or self.inner.scores_have_gradient

    @property
    def causal(self) -> bool:
        return self.outer.causal and self.inner.causal

    def check_decoder(self) -> None:
        """Raises: ConfigError if either level's router does."""
        self.outer.check_decoder()
        self.inner.check_decoder()

    def build(self, dim: int, num_experts: int) -> Router:
        for level, part in (("outer", self.outer), ("inner", self.inner)):
            if part.needs_whole_layer:
                raise ConfigError(
                    f"router.{level}: the router {type(part).__name__} learns from what a step did with all tokens of "
                    f"its layer ({part.needs_whole_layer}), which no router within a tree is told; "
                    "use it alone, or one such as topk or deepseek_v3 here"
                )
        if num_experts % self.groups or num_experts == self.groups:
            legal = [n for n in range(2, num_experts // 2 + 1) if num_experts % n == 0]
            raise ConfigError(
                f"router.groups={self.groups} must divide num_experts={num_experts} into groups of at least 2; "
                f"legal: {legal}"
            )
        return HierarchicalRouter(dim, num_experts, self)


class HierarchicalRouter(Router):
    """The module of `Hierarchical`: owns the outer router and an inner one for each group."""

    def __init__(self, dim: int, num_experts: int, config: Hierarchical) -> None:
        super().__init__(dim, num_experts)
        self.config = config
        self.group_size = num_experts // config.groups
        self.outer = _build("outer", config.outer, dim, config.groups)
        self.inner = nn.ModuleList(_build("inner", config.inner, dim, self.group_size) for _ in range(config.groups))

    def route(self, tokens: RouterInput) -> RouterOutput:
        """Each router is called on its tokens alone, which it counts from 0."""
        outer: RouterOutput = self.outer(tokens.x_RD, tokens.token_ids_R, None, tokens.generator)
        branches = self._branches(outer.assignment, tokens)
        num_routed = len(tokens.token_R)
        logits = [_spread(b.row_M, b.routing.logits_RE, num_routed, undecided=0.0) for b in branches]
        scores = [_spread(b.row_M, b.routing.scores_RE, num_routed, undecided=1 / self.group_size) for b in branches]
        return RouterOutput(
            assignment=_joined(outer.assignment, branches, tokens, self.config.later_groups),
            logits_RE=(outer.logits_RE.unsqueeze(2) + torch.stack(logits, dim=1)).flatten(1),
            scores_RE=(outer.scores_RE.unsqueeze(2) * torch.stack(scores, dim=1)).flatten(1),
            token_R=tokens.token_R,
            losses=(*outer.losses, *(term for branch in branches for term in _weighed(branch, num_routed))),
            smooth_load_E=_smooth_load(outer, branches),
        )

    def before_training(self, token_counts_V: Tensor) -> None:
        """Every router of the tree is told of the whole text."""
        for router in (self.outer, *self.inner):
            if isinstance(router, Router):
                router.before_training(token_counts_V)

    def after_step(self, stats: MoEStats) -> None:
        """The outer router learns of its groups' sums, each inner one of its own experts."""
        groups = self.config.groups
        own_stats = [_stats_of(stats, lambda v_E: v_E.view(groups, -1).sum(dim=1))]
        own_stats += [_stats_of(stats, lambda v_E, g=g: v_E.view(groups, -1)[g]) for g in range(groups)]
        for router, own in zip((self.outer, *self.inner), own_stats, strict=True):
            if isinstance(router, Router):
                router.after_step(own)

    def _branches(self, groups: Assignment, tokens: RouterInput) -> "list[Branch]":
        # one host copy of the counts serves all groups
        choices = groups.expert_N.argsort(stable=True).split(groups.counts_E.tolist())
        branches = []
        for router, choice_M in zip(self.inner, choices, strict=True):
            row_M = groups.token_N[choice_M]
            ids_M = None if tokens.token_ids_R is None else tokens.token_ids_R[row_M]
            # index_select, whose gradient adds rows without sorting them
            routing = router(tokens.x_RD.index_select(0, row_M), ids_M, None, tokens.generator)
            branches.append(Branch(choice_M=choice_M, row_M=row_M, routing=routing))
        return branches


@dataclass(frozen=True, kw_only=True)
class Branch:
    """What became of one group's M tokens."""

    choice_M: Tensor  # index into the outer router's choices
    row_M: Tensor  # index into the R routed tokens
    routing: RouterOutput  # its tokens are the M


def _build(level: str, config: RouterConfig, dim: int, num_choices: int) -> nn.Module:
    try:
        return config.build(dim, num_choices)
    except ConfigError as error:
        raise ConfigError(f"the {level} router chooses among {num_choices}: {error}") from error


def _weighed(branch: Branch, num_routed: int) -> list[LossTerm]:
    """The group's own terms by its share of the tokens, so that the sum over groups is a mean over tokens."""
    share = len(branch.row_M) / max(num_routed, 1)
    return [replace(term, value=share * term.value) for term in branch.routing.losses]


def _joined(groups: Assignment, branches: list[Branch], tokens: RouterInput, later_groups: str) -> Assignment:
    """The tree's choices as one assignment: token-major, by choice of group, then by choice within it."""
    parts = [branch.routing.assignment for branch in branches]
    group_size = parts[0].num_experts
    expert_N = torch.cat([part.expert_N + g * group_size for g, part in enumerate(parts)])
    within_N = torch.cat([part.choice_N for part in parts])
    # the choice of group by which each of them came
    via_N = torch.cat([branch.choice_M[part.token_N] for branch, part in zip(branches, parts, strict=True)])
    row_N, outer_N = groups.token_N[via_N], groups.choice_N[via_N]
    declined_N, inner_N = _either_declines(groups, parts, via_N), torch.cat([part.weight_N for part in parts])
    if later_groups == "first":
        beyond_N = (outer_N > 0) & (within_N > 0)
        declined_N = beyond_N if declined_N is None else declined_N | beyond_N
        whole_N = torch.zeros_like(groups.weight_N, dtype=inner_N.dtype).index_add(0, via_N, inner_N)[via_N]
        inner_N = torch.where(outer_N > 0, whole_N, inner_N)
    priority_N = _priority(groups, parts, via_N)
    order_N = ((row_N * len(branches) + outer_N) * group_size + within_N).argsort(stable=True)
    row_N = row_N[order_N]
    taken_R = torch.bincount(row_N, minlength=len(tokens.token_R))
    first_R = taken_R.cumsum(0) - taken_R
    return Assignment(
        token_N=tokens.token_R[row_N],
        expert_N=expert_N[order_N],
        weight_N=(groups.weight_N[via_N] * inner_N)[order_N],
        choice_N=torch.arange(len(row_N), device=row_N.device) - first_R[row_N],
        num_tokens=tokens.num_tokens,
        num_experts=group_size * len(branches),
        declined_N=None if declined_N is None else declined_N[order_N],
        # all groups have routers of one config
        top_k=None if groups.top_k is None or parts[0].top_k is None else groups.top_k * parts[0].top_k,
        priority_N=None if priority_N is None else priority_N[order_N],
    )


def _either_declines(groups: Assignment, parts: list[Assignment], via_N: Tensor) -> Tensor | None:
    if all(part.declined_N is None for part in (groups, *parts)):
        return None
    outer_N, *inner = (
        torch.zeros_like(p.expert_N, dtype=torch.bool) if p.declined_N is None else p.declined_N
        for p in (groups, *parts)
    )
    return outer_N[via_N] | torch.cat(inner)


def _priority(groups: Assignment, parts: list[Assignment], via_N: Tensor) -> Tensor | None:
    """The product of the two, where a level has its own and the other's is its weight."""
    if all(part.priority_N is None for part in (groups, *parts)):
        return None
    outer_N, *inner = (p.weight_N.detach() if p.priority_N is None else p.priority_N for p in (groups, *parts))
    return outer_N[via_N] * torch.cat(inner)


def _spread(row_M: Tensor, values: Tensor, num_routed: int, *, undecided: float) -> Tensor:
    """The group's values in rows of their own among the R, `undecided` in the others."""
    return values.new_full((num_routed, values.shape[1]), undecided).index_copy(0, row_M, values)


def _smooth_load(outer: RouterOutput, branches: list[Branch]) -> Tensor | None:
    """The group's load times the expert's share of it; None where a router has none. Source: as the router's."""
    loads = [branch.routing.smooth_load_E for branch in branches]
    if outer.smooth_load_E is None or any(load is None for load in loads):
        return None
    shares = [load_E / max(len(b.row_M), 1) for b, load_E in zip(branches, loads, strict=True) if load_E is not None]
    return (outer.smooth_load_E.unsqueeze(1) * torch.stack(shares)).flatten()


def _stats_of(stats: MoEStats, part: Callable[[Tensor], Tensor]) -> MoEStats:
    names = ("assigned_E", "dropped_capacity_E", "dropped_policy_E")
    return replace(stats, **{name: part(getattr(stats, name)) for name in names})
