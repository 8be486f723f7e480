"""BASE: in training, tokens are assigned to experts so that all get equally many and the scores' sum is greatest."""

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from turnout.contracts import Router, RouterConfig
from turnout.errors import ConfigError
from turnout.routers.pieces import from_topk, select_topk, sigmoid_shares
from turnout.tensors import RouterInput, RouterOutput

# each phase of an auction bids in steps this much smaller than the phase before
SHRINK = 5


@RouterConfig.TABLE.register("base")
@dataclass(frozen=True, kw_only=True)
class BASE(RouterConfig):
    """One expert a token: in training by balanced assignment, in evaluation the best score; weight sigmoid(score).

    An expert gets floor(T / E) or ceil(T / E) tokens of a training call. `exact` takes the time of (T + E)^3 and
    needs scipy; the auction may miss the greatest mean score a token by `precision` of the spread of scores.
    Source: Lewis et al. 2021, arXiv:2103.16716; initial weights from fairseq/modules/base_layer.py of
    https://github.com/facebookresearch/fairseq. What to do where E does not divide T is ours.
    """

    solver: Literal["auction", "exact"] = "auction"  # auction: near the best sum of scores, at any scale; exact: scipy
    precision: float = 1e-3  # of the auction: mean score a token may lose, in spreads of a token's scores
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
        if self.solver == "exact" and importlib.util.find_spec("scipy") is None:
            raise ConfigError("router.solver='exact' needs the package scipy: pip install scipy, or use 'auction'")
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
            # no bid beats NaN; the training loop names what is not finite
            return select_topk(logits_RE, 1)
        if self.config.solver == "exact":
            return exact_assignment(logits_RE).unsqueeze(1)
        return auction_assignment(logits_RE, precision=self.config.precision).unsqueeze(1)


def exact_assignment(scores_RE: Tensor) -> Tensor:
    """Expert of each token with the greatest sum of scores among all assignments with even loads.

    Shapes: scores_RE (R, E) finite; returns (R,) int64, floor(R / E) or ceil(R / E) of each expert.
    """
    linear_sum_assignment = importlib.import_module("scipy.optimize").linear_sum_assignment
    num_tokens, num_experts = scores_RE.shape
    gain_NE, size = _with_idle_places(scores_RE)
    gain_NN = gain_NE.repeat_interleave(size, dim=1)
    place_N = torch.arange(size * num_experts, device=gain_NN.device)
    # an expert has one place that may stay idle
    gain_NN[num_tokens:, place_N % max(size, 1) != 0] = -torch.inf
    _, places = linear_sum_assignment(gain_NN.cpu().numpy(), maximize=True)
    return torch.as_tensor(places[:num_tokens], device=scores_RE.device) // max(size, 1)


def auction_assignment(scores_RE: Tensor, *, precision: float) -> Tensor:
    """Expert of each token, with even loads and a sum of scores near the greatest.

    Tokens bid for places at their experts, phase after phase in smaller steps from the prices of the phase before.
    With the spread max_t(max_e s - min_e s), the sum is within (R + E) * precision * spread of the greatest.
    Shapes: scores_RE (R, E) finite; returns (R,) int64, floor(R / E) or ceil(R / E) of each expert.
    Source: Bertsekas and Castanon 1989 (auction for transportation problems, similar objects); written anew.
    """
    num_tokens, num_experts = scores_RE.shape
    if num_experts == 1 or num_tokens == 0:
        return torch.zeros(num_tokens, dtype=torch.int64, device=scores_RE.device)
    gain_NE, size = _with_idle_places(scores_RE)
    spread = float(-gain_NE.amin()) or 1.0
    price_E, step = gain_NE.new_zeros(num_experts), spread / SHRINK
    while True:
        step = max(step, precision * spread)
        expert_N, price_E = _auction(gain_NE, price_E, size=size, num_tokens=num_tokens, step=step)
        if step == precision * spread:
            return expert_N[:num_tokens]
        step /= SHRINK


def _with_idle_places(scores_RE: Tensor) -> tuple[Tensor, int]:
    """Scores less their row's best, with a row of zeros for every place that stays idle, and places per expert.

    What a row has in common decides nothing. As an expert may hold one idle place at most, none lacks two tokens.
    """
    num_tokens, num_experts = scores_RE.shape
    size = -(-num_tokens // num_experts)
    gain_RE = scores_RE.detach().double()
    gain_RE = gain_RE - gain_RE.amax(dim=1, keepdim=True)
    return torch.cat([gain_RE, gain_RE.new_zeros(size * num_experts - num_tokens, num_experts)]), size


def _auction(gain_NE: Tensor, price_E: Tensor, *, size: int, num_tokens: int, step: float) -> tuple[Tensor, Tensor]:
    """One phase; ends because every bid is above the price it meets by at least `step`.

    A token bids what makes its best expert worth as much to it as its second best, and `step` more. To idle places
    all experts are worth the same: they take the cheapest, and bid together up to the cheapest that is left. An
    expert keeps its `size` highest bids; once it is full, the lowest of them is the price of entry.
    """
    first_E, num_experts = price_E, len(price_E)
    expert_N = torch.full_like(gain_NE[:, 0], -1, dtype=torch.int64)
    bid_N = torch.zeros_like(gain_NE[:, 0])
    while len(out := (expert_N < 0).nonzero().squeeze(1)):
        idle, out = out[out >= num_tokens], out[out < num_tokens]
        worth = gain_NE[out] - price_E
        best_two = select_topk(worth, 2)
        lead = worth.gather(1, best_two).diff(dim=1).neg().squeeze(1)
        if len(idle):
            resting = expert_N[num_tokens:]
            cheapest = price_E.index_fill(0, resting[resting >= 0], torch.inf).sort(stable=True)
            expert_N[idle] = cheapest.indices[: len(idle)]
            bid_N[idle] = cheapest.values[len(idle)] + step
        expert_N[out] = best_two[:, 0]
        bid_N[out] = price_E[best_two[:, 0]] + lead + step
        expert_N = _keep_highest(expert_N, bid_N, size, num_experts)
        held = expert_N >= 0
        lowest_E = torch.full_like(price_E, torch.inf).scatter_reduce(0, expert_N[held], bid_N[held], "amin")
        is_full_E = torch.bincount(expert_N[held], minlength=num_experts) == size
        price_E = torch.where(is_full_E, lowest_E, first_E)
    return expert_N, price_E


def _keep_highest(expert_N: Tensor, bid_N: Tensor, size: int, num_experts: int) -> Tensor:
    """The experts, -1 for bidders whose bid is not of the `size` highest of their expert's; all have one."""
    order_N = bid_N.argsort(descending=True, stable=True)
    order_N = order_N[expert_N[order_N].argsort(stable=True)]
    counts_E = torch.bincount(expert_N, minlength=num_experts)
    start_E = counts_E.cumsum(0) - counts_E
    rank_N = torch.arange(len(order_N), device=order_N.device) - start_E[expert_N[order_N]]
    return expert_N.index_fill(0, order_N[rank_N >= size], -1)
