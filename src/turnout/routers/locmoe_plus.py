"""LocMoE+ (Expert-Token Resonance): tokens choose experts, then experts choose among the tokens that chose them."""

import math
import sys
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from turnout.contracts import Router, RouterConfig
from turnout.errors import ConfigError
from turnout.ranking import keep_best
from turnout.routers.affinity_theory import min_capacity
from turnout.routers.grap import check_blocks, grap_affinity, row_affinity
from turnout.routers.pieces import LinearScore, check_choices, from_topk, select_topk
from turnout.tensors import Assignment, MoEStats, RouterInput, RouterOutput

Mode = Literal["token_choice", "expert_choice", "hybrid"]


@RouterConfig.TABLE.register("locmoe_plus")
@dataclass(frozen=True, kw_only=True)
class LocMoEPlus(RouterConfig):
    """Routing by affinity, the cosine of a token with an expert's gate row.

    hybrid: a token chooses its k best experts, and an expert keeps the best of the tokens that chose it, declining the
    others; token_choice: the first step alone; expert_choice: an expert keeps the best of all tokens, which may leave
    a token with none or with many. An expert keeps the fewest tokens whose affinities reach `threshold` of their sum,
    but not fewer than C_min (remark 7) and not more than factor * k * tokens / experts. The weight is a softmax of the
    affinities, so the task's gradient reaches the gate; a softmax over all experts keeps it at k = 1.

    What the paper leaves open is a setting, and its default is our reading: which tokens are kept (see `ranking`),
    the threshold (0.75 of Gaussian tokens' affinity is that of 60% of them, the reduction it reports), negative
    affinities, the delta_max in C_min (see `limits`), the temperature, evaluation (choice by experts would let a token
    depend on later ones), and the switch, for which it gives theory and no schedule.
    Use it with the capacity policy `none`: a declined choice would hold its place in the queue of another.
    Source: Li et al. 2024, arXiv:2406.00023.
    """

    k: int = 1  # experts a token chooses, the paper's l
    gate: Literal["grap", "learned"] = "grap"  # rows: fixed blocks of features (paper), or learned
    mode: Mode = "hybrid"  # who chooses
    before_switch: Mode = "token_choice"  # who chooses until the switch; without one `mode` holds from the start
    switch_step: int = 0  # optimizer steps until the switch; 0: not by step
    switch_kept: float = 0.0  # mean kept rows of an expert, as a share of the tokens, at which to switch; 0: not by it
    switch_window: int = 100  # optimizer steps over which that mean is taken
    evaluation: Literal["token_choice", "mode"] = "token_choice"  # who chooses in evaluation; mode: as in training
    in_decoder: Literal["refuse", "allow"] = "refuse"  # inside a decoder, evaluation that lets a token see later ones
    threshold: float = 0.75  # share of its tokens' summed affinity that an expert keeps
    mass: Literal["affinity", "weight"] = "affinity"  # what is summed: affinities, negative ones as 0; or the weights
    floor: Literal["mean", "largest", "none"] = "mean"  # delta_max in C_min: tokens' best affinities; none: no C_min
    minimum: int = 1  # least an expert may keep, in rows, whatever C_min
    factor: float = 1.1  # most an expert may keep, over the balanced load
    temperature: float = 0.1  # weights are softmax(affinity / temperature)
    init_std: float = 0.02  # standard deviation of learned rows at the start, of which only the direction counts

    def __post_init__(self) -> None:
        for name, is_legal, legal in (
            ("k", self.k >= 1, "at least 1"),
            ("switch_step", self.switch_step >= 0, "at least 0"),
            ("switch_kept", 0 <= self.switch_kept <= 1, "from 0 to 1"),
            ("switch_window", self.switch_window >= 1, "at least 1"),
            ("threshold", 0 < self.threshold <= 1, "above 0 and at most 1"),
            ("minimum", self.minimum >= 0, "at least 0"),
            ("factor", 0 < self.factor < math.inf, "a number above 0"),
            ("temperature", 0 < self.temperature < math.inf, "a number above 0"),
        ):
            if not is_legal:
                raise ConfigError(f"router.{name}={getattr(self, name)} must be {legal}")
        if self.switch_kept and self.before_switch == "token_choice":
            raise ConfigError(
                f"router.switch_kept={self.switch_kept} would wait forever with before_switch=token_choice, which "
                "keeps every choice; use before_switch=hybrid, or switch_step"
            )

    @property
    def choices(self) -> int:
        return self.k

    @property
    def exact_choices(self) -> bool:
        """An expert's choice may leave a token with none or with many."""
        return self.evaluation == "token_choice" or "expert_choice" not in (self.mode, self.before_switch)

    @property
    def causal(self) -> bool:
        """Before the switch `before_switch` chooses in evaluation too, if that is by `mode`."""
        switches = self.switch_step or self.switch_kept
        choosers = {self.mode, self.before_switch if switches else self.mode}
        return self.evaluation == "token_choice" or choosers == {"token_choice"}

    @property
    def needs_whole_layer(self) -> str:
        return "the number of its tokens, with switch_kept=0 none of it" if self.switch_kept else ""

    def check_decoder(self) -> None:
        """Raises: ConfigError if evaluation looks at later tokens, unless `in_decoder` allows it."""
        if not self.causal and self.in_decoder == "refuse":
            raise ConfigError(
                f"locmoe_plus with evaluation='mode' and mode={self.mode!r} lets a token's experts depend on later "
                "tokens in evaluation; use router.evaluation='token_choice', or set router.in_decoder='allow' if you "
                "want that"
            )

    def build(self, dim: int, num_experts: int) -> Router:
        check_choices(self.k, num_experts)
        if self.gate == "grap":
            check_blocks(dim, num_experts)
        return LocMoEPlusRouter(dim, num_experts, self)


class LocMoEPlusRouter(Router):
    """The module of `LocMoEPlus`: owns the learned rows, if any, and the counts that decide the switch.

    The counts are integers, which no change of dtype rounds.
    """

    steps: Tensor
    kept: Tensor  # rows kept, over the window so far
    routed: Tensor  # tokens routed, over the window so far
    switched: Tensor

    def __init__(self, dim: int, num_experts: int, config: LocMoEPlus) -> None:
        super().__init__(dim, num_experts)
        self.config = config
        is_learned = config.gate == "learned"
        self.score = LinearScore(dim, num_experts, bias=False, init_std=config.init_std) if is_learned else None
        for name in ("steps", "kept", "routed"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))
        self.register_buffer("switched", torch.zeros((), dtype=torch.bool))

    def reset_parameters(self) -> None:
        """The score resets itself."""
        for count in self.buffers(recurse=False):
            count.zero_()

    def route(self, tokens: RouterInput) -> RouterOutput:
        affinity_RE = self._affinity(tokens.x_RD)
        logits_RE = affinity_RE / self.config.temperature
        scores_RE = logits_RE.softmax(dim=1)
        mode = self._mode()
        if mode == "expert_choice":
            assignment = self._by_experts(affinity_RE.detach(), scores_RE, tokens)
        else:
            assignment = self._by_tokens(affinity_RE.detach(), scores_RE, tokens, declines=mode == "hybrid")
        return RouterOutput(assignment=assignment, logits_RE=logits_RE, scores_RE=scores_RE, token_R=tokens.token_R)

    @torch.no_grad()
    def after_step(self, stats: MoEStats) -> None:
        """Counts the step, and switches for good once the steps are done or a window kept few enough."""
        settings = self.config
        self.steps.add_(1)
        self.kept.add_((stats.assigned_E - stats.dropped_capacity_E - stats.dropped_policy_E).sum())
        self.routed.add_(stats.num_routed)
        is_full = self.steps % settings.switch_window == 0
        if settings.switch_kept:
            self.switched.logical_or_(is_full & (self.kept < settings.switch_kept * self.num_experts * self.routed))
        if settings.switch_step:
            self.switched.logical_or_(self.steps >= settings.switch_step)
        for count in (self.kept, self.routed):
            count.mul_(~is_full)

    def limits(self, affinity_RE: Tensor) -> tuple[Tensor | int, int]:
        """Fewest and most tokens an expert may keep of a batch with these affinities; the most wins.

        C_min needs a delta_max, which the paper does not define. Read as the mean over tokens of their best affinity
        it is 0.027 for random tokens at d=4096 and n=16, near the 0.03 the paper measures, and asks for one row of
        them at any width. Read as the largest of the batch it hangs on a single token, and often asks for them all.

        Shapes: affinity_RE (R, E); returns () int64 or a number, and a number.
        """
        settings, (num_routed, num_experts) = self.config, affinity_RE.shape
        # a product such as 1.1 * 10 must not be lifted to the next integer by its last bits
        most = settings.factor * (num_routed * settings.k) / num_experts * (1 - 4 * sys.float_info.epsilon)
        capacity = max(settings.minimum, math.ceil(min(most, num_routed)))
        if settings.floor == "none" or num_routed == 0:
            return settings.minimum, capacity
        best_R = affinity_RE.amax(dim=1)
        floor = min_capacity(
            best_R.mean() if settings.floor == "mean" else best_R.max(),
            dim=self.dim,
            num_experts=num_experts,
            num_tokens=num_routed,
            minimum=settings.minimum,
        )
        return floor, capacity

    def _affinity(self, x_RD: Tensor) -> Tensor:
        if self.score is None:
            return grap_affinity(x_RD, self.num_experts)
        return row_affinity(x_RD, self.score.weight_ED.to(x_RD.dtype))

    def _mode(self) -> Mode:
        settings = self.config
        if not self.training and settings.evaluation == "token_choice":
            return "token_choice"
        # a switch costs a wait for the device; without one nothing is read
        if not (settings.switch_step or settings.switch_kept) or bool(self.switched):
            return settings.mode
        return settings.before_switch

    def _kept(self, affinity_RE: Tensor, affinity_N: Tensor, weight_N: Tensor, expert_N: Tensor) -> Tensor:
        floor, capacity = self.limits(affinity_RE)
        return keep_best(
            affinity_N,
            weight_N.detach() if self.config.mass == "weight" else affinity_N.clamp(min=0),
            expert_N,
            num_experts=self.num_experts,
            threshold=self.config.threshold,
            floor=floor,
            capacity=capacity,
        )

    def _by_tokens(self, affinity_RE: Tensor, scores_RE: Tensor, tokens: RouterInput, *, declines: bool) -> Assignment:
        """Every token's k best experts; what an expert does not keep is declined."""
        expert_RK = select_topk(affinity_RE, self.config.k)
        assignment = from_topk(expert_RK, scores_RE.gather(1, expert_RK), tokens, num_experts=self.num_experts)
        affinity_N = affinity_RE.gather(1, expert_RK).reshape(-1)
        declined_N = None
        if declines:
            declined_N = ~self._kept(affinity_RE, affinity_N, assignment.weight_N, assignment.expert_N)
        return replace(assignment, declined_N=declined_N, priority_N=affinity_N)

    def _by_experts(self, affinity_RE: Tensor, scores_RE: Tensor, tokens: RouterInput) -> Assignment:
        """Every expert's best tokens of all; a token's choices are counted from its best."""
        num_routed, num_experts = affinity_RE.shape
        expert_N = torch.arange(num_experts, device=affinity_RE.device).repeat(num_routed)
        kept_N = self._kept(affinity_RE, affinity_RE.reshape(-1), scores_RE.reshape(-1), expert_N)
        own_RE = affinity_RE.masked_fill(~kept_N.view_as(affinity_RE), -math.inf)
        choice_RE = own_RE.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        pair_N = kept_N.nonzero().squeeze(1)
        return Assignment(
            token_N=tokens.token_R[pair_N // num_experts],
            expert_N=expert_N[pair_N],
            weight_N=scores_RE.reshape(-1)[pair_N],
            choice_N=choice_RE.reshape(-1)[pair_N],
            num_tokens=tokens.num_tokens,
            num_experts=num_experts,
            priority_N=affinity_RE.reshape(-1)[pair_N],
        )
