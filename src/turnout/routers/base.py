"""BASE: in training, tokens are assigned to experts so that all get equally many and the scores' sum is greatest."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from turnout.contracts import Router, RouterConfig
from turnout.errors import ConfigError
from turnout.routers.pieces import from_topk, select_topk, sigmoid_shares
from turnout.tensors import RouterInput, RouterOutput

# of the search for prices: the first temperature is a spread over WARM; at each, so many ROUNDS
WARM, ROUNDS = 5, 4


@RouterConfig.TABLE.register("base")
@dataclass(frozen=True, kw_only=True)
class BASE(RouterConfig):
    """One expert a token: in training by balanced assignment, in evaluation the best score; weight sigmoid(score).

    An expert gets floor(T / E) or ceil(T / E) tokens of a training call. The mean score a token is the greatest there
    is, but for `precision` of the spread of scores.
    Source: Lewis et al. 2021, arXiv:2103.16716; initial weights from fairseq/modules/base_layer.py of
    https://github.com/facebookresearch/fairseq. What to do where E does not divide T is ours.
    """

    precision: float = 1e-4  # of the assignment: mean score a token may lose, in spreads of a token's scores
    init_gain: float = 0.1  # length of the experts' initial weights, which are orthogonal

    def __post_init__(self) -> None:
        if not 1e-6 <= self.precision < 1:
            raise ConfigError(f"router.precision={self.precision} must be from 1e-6 up to 1")

    @property
    def choices(self) -> int:
        return 1

    @property
    def own_balance(self) -> str:
        return "balanced assignment in training"

    def build(self, dim: int, num_experts: int) -> Router:
        return BASERouter(dim, num_experts, self)


class BASERouter(Router):
    """The module of `BASE`: owns a weight vector for each expert (the paper's expert embedding)."""

    def __init__(self, dim: int, num_experts: int, config: BASE) -> None:
        super().__init__(dim, num_experts)
        self.config = config
        self.weight_ED = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        # the decomposition behind it knows no bfloat16
        drawn_ED = torch.empty_like(self.weight_ED, dtype=torch.float32)
        self.weight_ED.copy_(nn.init.orthogonal_(drawn_ED, gain=self.config.init_gain))

    def route(self, tokens: RouterInput) -> RouterOutput:
        logits_RE = F.linear(tokens.x_RD, self.weight_ED.to(tokens.x_RD.dtype))
        expert_R1 = self._balanced(logits_RE.detach()) if self.training else select_topk(logits_RE, 1)
        assignment = from_topk(
            expert_R1, logits_RE.gather(1, expert_R1).sigmoid(), tokens, num_experts=self.num_experts
        )
        scores_RE = sigmoid_shares(logits_RE)
        return RouterOutput(assignment=assignment, logits_RE=logits_RE, scores_RE=scores_RE, token_R=tokens.token_R)

    def _balanced(self, logits_RE: Tensor) -> Tensor:
        if not bool(logits_RE.isfinite().all()):
            # no path is cheapest with NaN; the training loop names what is not finite
            return select_topk(logits_RE, 1)
        return even_assignment(logits_RE, precision=self.config.precision).unsqueeze(1)


def even_assignment(scores_RE: Tensor, *, precision: float) -> Tensor:
    """Expert of each token, with even loads and the greatest sum of the scores in steps of `precision` spreads.

    The spread is max_e s - min_e s of a token, on average over tokens. With scores that are whole multiples of a step
    no even assignment has a greater sum; otherwise the sum is within R * precision * spread of the greatest. Prices
    of entry are found as Sinkhorn finds its scalings; every token goes where score less price is greatest, which is
    the best assignment with the loads it has; then tokens move along the cheapest paths from experts with too many to
    experts with too few, which keeps it the best.
    Shapes: scores_RE (R, E) finite; returns (R,) int64, floor(R / E) or ceil(R / E) of each expert.
    Source: Ahuja, Magnanti, Orlin 1993, Network Flows, 9.7 (successive shortest paths); on the experts' graph alone,
    from prices of entropic transport: ours.
    """
    num_tokens, num_experts = scores_RE.shape
    if num_experts == 1 or num_tokens == 0:
        return torch.zeros(num_tokens, dtype=torch.int64, device=scores_RE.device)
    # what a row has in common decides nothing
    gain_RE = scores_RE.detach().double()
    gain_RE = gain_RE - gain_RE.amax(dim=1, keepdim=True)
    step = max(precision * float(-gain_RE.amin(dim=1).mean()), torch.finfo(gain_RE.dtype).tiny)
    # whole numbers: sums of gains are exact, and so many tokens tie that one path serves all of them
    gain_RE = (gain_RE / step).round()
    price_E = _even_prices(gain_RE.float(), warmest=1 / (WARM * precision)).round().double()
    expert_R1 = select_topk(gain_RE - price_E, 1)
    return _Loads(gain_RE.cpu(), expert_R1.squeeze(1).cpu(), price_E.cpu()).evened().to(scores_RE.device)


def _even_prices(gain_RE: Tensor, *, warmest: float) -> Tensor:
    """Prices at which softmax((gain - price) / tau) gives even loads, tau falling from `warmest` to one step."""
    num_experts = gain_RE.shape[1]
    price_E, tau = gain_RE.new_zeros(num_experts), max(warmest, 1.0)
    while True:
        for _ in range(ROUNDS):
            share_E = ((gain_RE - price_E) / tau).softmax(dim=1).mean(dim=0)
            price_E = price_E + tau * (share_E * num_experts).clamp(min=torch.finfo(share_E.dtype).tiny).log()
        if tau == 1:
            return price_E
        tau = max(tau / 2, 1)


class _Loads:
    """Tokens at experts, no assignment with the same loads being better, on their way to even loads.

    Every expert has ceil(R / E) places, of which one may stay idle: E * ceil(R / E) - R do, at first those of the
    lowest prices; an idle place moves at no cost to an expert that has none.
    Shapes: gain_RE (R, E) whole numbers in float64, expert_R (R,), price_E (E,); all on the CPU.
    """

    def __init__(self, gain_RE: Tensor, expert_R: Tensor, price_E: Tensor) -> None:
        num_tokens, num_experts = gain_RE.shape
        self.gain_RE, self.expert_R = gain_RE, expert_R
        self.size = -(-num_tokens // num_experts)
        self.has_idle_E = torch.zeros(num_experts, dtype=torch.bool)
        self.has_idle_E[price_E.argsort(stable=True)[: self.size * num_experts - num_tokens]] = True
        self.excess_E = torch.bincount(expert_R, minlength=num_experts) + self.has_idle_E - self.size
        self.cost_EE = torch.full((num_experts, num_experts), torch.inf, dtype=gain_RE.dtype)
        self._price_moves(range(num_experts))

    def evened(self) -> Tensor:
        """The expert of each token once all loads are even: (R,) int64."""
        while bool((self.excess_E > 0).any()):
            path = self._cheapest_path()
            self._move_along(path)
            self._price_moves(path)
        return self.expert_R

    def _price_moves(self, experts: Iterable[int]) -> None:
        """What the cheapest move of a token from each of the experts to every other one costs."""
        for expert in experts:
            own_N = (self.expert_R == expert).nonzero().squeeze(1)
            if len(own_N):
                gain_NE = self.gain_RE[own_N]
                self.cost_EE[expert] = (gain_NE[:, expert, None] - gain_NE).amin(dim=0)
            else:
                self.cost_EE[expert] = torch.inf

    def _idle_moves(self) -> Tensor:
        """Which idle places may move: (E, E) bool, from row to column."""
        return self.has_idle_E[:, None] & ~self.has_idle_E

    def _cheapest_path(self) -> list[int]:
        """Experts along the cheapest moves from one with too many to one with too few (Bellman and Ford)."""
        cost_EE = self.cost_EE.where(~self._idle_moves(), self.cost_EE.clamp(max=0))
        far_E = torch.where(self.excess_E > 0, 0.0, torch.inf).double()
        before_E = torch.full_like(self.excess_E, -1)
        while True:
            nearer_E, via_E = (far_E[:, None] + cost_EE).min(dim=0)
            is_nearer_E = nearer_E < far_E
            if not bool(is_nearer_E.any()):
                break
            far_E, before_E = nearer_E.where(is_nearer_E, far_E), via_E.where(is_nearer_E, before_E)
        path = [int(far_E.where(self.excess_E < 0, torch.inf).argmin())]
        while (previous := int(before_E[path[-1]])) >= 0:
            path.append(previous)
        return path[::-1]

    def _move_along(self, path: list[int]) -> None:
        """As many as are too many, may come, and cost the same at each of the path's moves."""
        most = min(int(self.excess_E[path[0]]), -int(self.excess_E[path[-1]]))
        idle_moves_EE, moves = self._idle_moves(), []
        for here, there in itertools.pairwise(path):
            if bool(idle_moves_EE[here, there]) and self.cost_EE[here, there] > 0:
                moves.append(None)
                most = 1
            else:
                own_N = (self.expert_R == here).nonzero().squeeze(1)
                loss_N = self.gain_RE[own_N, here] - self.gain_RE[own_N, there]
                moves.append(own_N[loss_N == self.cost_EE[here, there]])
                most = min(most, len(moves[-1]))
        for (here, there), movers_N in zip(itertools.pairwise(path), moves, strict=True):
            if movers_N is None:
                self.has_idle_E[here], self.has_idle_E[there] = False, True
            else:
                self.expert_R[movers_N[:most]] = there
        self.excess_E[path[0]] -= most
        self.excess_E[path[-1]] += most
