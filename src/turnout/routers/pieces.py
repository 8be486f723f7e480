"""What routers are built from: score, activation, restriction, selection, weighting; pure functions."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from turnout.errors import ConfigError
from turnout.kernels import kernel_for
from turnout.tensors import Assignment, RouterInput, fill_normal

# above this many choices one stable sort costs less than the passes
MOST_ARGMAX_PASSES = 8


class LinearScore(nn.Module):
    """logits = x W^T (+ b), in the dtype of x: a router hands it at least float32 whatever the model's dtype."""

    def __init__(self, dim: int, num_experts: int, *, bias: bool, init_std: float) -> None:
        super().__init__()
        self.weight_ED = nn.Parameter(torch.empty(num_experts, dim))
        self.bias_E = nn.Parameter(torch.zeros(num_experts)) if bias else None
        self.init_std = init_std
        self.reset_parameters()

    def reset_parameters(self) -> None:
        fill_normal(self.weight_ED, self.init_std)
        if self.bias_E is not None:
            nn.init.zeros_(self.bias_E)

    def forward(self, x_RD: Tensor) -> Tensor:
        bias_E = None if self.bias_E is None else self.bias_E.to(x_RD.dtype)
        return F.linear(x_RD, self.weight_ED.to(x_RD.dtype), bias_E)


def select_topk(scores_RE: Tensor, k: int) -> Tensor:
    """Experts of the k highest scores, best first, ties broken by the lower index.

    Shapes: scores_RE (R, E); returns expert_RK (R, k) int64.
    """
    if k > MOST_ARGMAX_PASSES:
        return scores_RE.sort(dim=1, descending=True, stable=True).indices[:, :k]
    kernel = kernel_for(scores_RE)
    if kernel is not None:
        return kernel.best(scores_RE, k)
    # argmax returns the first of equal maxima, which topk does not promise, and is the faster of the two
    left_RE = scores_RE.detach().clone() if k > 1 else scores_RE.detach()
    picks = []
    for _ in range(k):
        pick_R1 = left_RE.argmax(dim=1, keepdim=True)
        picks.append(pick_R1)
        if len(picks) < k:
            left_RE.scatter_(1, pick_R1, -torch.inf)
    return torch.cat(picks, dim=1)


def marked_topk(scores_AB: Tensor, k: int) -> Tensor:
    """Marks in each row its k highest scores, ties broken by the lower index; without a sort of rows that are long.

    Shapes: scores_AB (A, B), k from 1 to B; returns (A, B) bool. A row with NaN marks at least k.
    """
    least_A1 = scores_AB.topk(k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    above_AB, ties_AB = ~(scores_AB <= least_A1), scores_AB == least_A1
    missing_A1 = k - above_AB.sum(dim=1, keepdim=True)
    return above_AB | (ties_AB & (ties_AB.cumsum(dim=1, dtype=torch.int32) <= missing_A1))


def within_best_groups(scores_RE: Tensor, groups: int, top_groups: int, *, best: int = 2) -> Tensor:
    """The scores, -inf outside the `top_groups` groups whose `best` best scores have the highest sum.

    Shapes: scores_RE (R, E), expert e in group e // (E / groups); returns (R, E).
    """
    if groups == top_groups:
        return scores_RE
    by_group = scores_RE.unflatten(1, (groups, -1))
    group_score = by_group.topk(min(best, by_group.shape[2]), dim=2).values.sum(dim=2)
    reached = torch.zeros_like(group_score, dtype=torch.bool).scatter(1, select_topk(group_score, top_groups), True)
    return by_group.masked_fill(~reached.unsqueeze(2), -torch.inf).flatten(1)


def check_scale(scale: float) -> None:
    """Raises: ConfigError unless weights can sum to it."""
    if not 0 < scale < math.inf:
        raise ConfigError(f"router.scale={scale} must be above 0 and finite")


def check_choices(k: int, num_experts: int, *, least: int = 1) -> None:
    """Raises: ConfigError if a token would have more choices than there are experts."""
    if k > num_experts:
        raise ConfigError(f"router.k={k} is more than num_experts={num_experts}; legal: {least} to {num_experts}")


def check_reach(k: int, *, groups: int, top_groups: int, num_experts: int) -> None:
    """Raises: ConfigError if the groups cannot be equal, or the groups of a token hold fewer than k experts."""
    if num_experts % groups:
        legal = [n for n in range(1, num_experts + 1) if num_experts % n == 0]
        raise ConfigError(f"router.groups={groups} must divide num_experts={num_experts}; legal: {legal}")
    reachable = num_experts // groups * top_groups
    if k > reachable:
        raise ConfigError(
            f"router.k={k} is more than the {reachable} experts in top_groups={top_groups} of groups={groups}, "
            f"num_experts={num_experts}"
        )


def reach_remark(groups: int, top_groups: int, units: str, spread: int, there: int) -> str:
    """What a limit to `top_groups` of `groups` is worth where one group lies on `spread` of `there` ranks or nodes."""
    if spread == 1 or top_groups == groups:
        return ""
    return (
        f"router.groups={groups}: the experts of one group lie on {spread} of the {there} {units} of this layout, so "
        f"top_groups={top_groups} lets a token reach {min(there, spread * top_groups)} {units}; groups={there} are its "
        f"{units}"
    )


def normal_draw(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers in the shape of `like`; drawn in float32 whatever its dtype: one seed is one noise."""
    return torch.randn(like.shape, dtype=torch.float32, device=like.device, generator=generator).to(like.dtype)


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel numbers of uniform ones in [0, 1): added to logits, their greatest is a draw from the softmax.

    0 gives +inf and nothing gives -inf, so what is masked by -inf is never drawn.
    """
    return -torch.log(-torch.log1p(-uniform))


def smooth_load(clean_RE: Tensor, threshold: Tensor, std: Tensor | float) -> Tensor:
    """Sum over tokens of P(clean + std * N(0, 1) > threshold): a load per expert with a gradient.

    Shapes: clean_RE (R, E), scores without noise; threshold and std broadcast to it; returns (E,).
    """
    return torch.special.ndtr((clean_RE - threshold) / std).sum(dim=0)


def sigmoid_shares(logits_RE: Tensor) -> Tensor:
    """Each sigmoid over the sum of its row's; also where they all underflow, which would be 0 / 0.

    Shapes: logits_RE (R, E); returns (R, E), rows sum to 1.
    """
    return F.logsigmoid(logits_RE).softmax(dim=1)


def from_topk(
    expert_RK: Tensor,
    weight_RK: Tensor,
    tokens: RouterInput,
    *,
    num_experts: int,
    declined_N: Tensor | None = None,
) -> Assignment:
    """Token-major assignment of K choices for each of R tokens."""
    num_rows, top_k = expert_RK.shape
    # for one token repeat() and repeat_interleave() take longer than the choice of its experts
    choice_RK = torch.arange(top_k, device=expert_RK.device).expand(num_rows, top_k)
    return Assignment(
        token_N=tokens.token_R.unsqueeze(1).expand(num_rows, top_k).reshape(-1),
        expert_N=expert_RK.reshape(-1),
        weight_N=weight_RK.reshape(-1),
        choice_N=choice_RK.reshape(-1),
        num_tokens=tokens.num_tokens,
        num_experts=num_experts,
        declined_N=declined_N,
        top_k=top_k,
    )


def from_chosen(chosen_RE: Tensor, weight_RE: Tensor, tokens: RouterInput) -> Assignment:
    """Token-major assignment of a varying number of experts to each token; choice 0 is its highest weight.

    Shapes: chosen_RE (R, E) bool; weight_RE (R, E).
    """
    row_N, expert_N = chosen_RE.nonzero(as_tuple=True)
    weight_N = weight_RE.flatten().gather(0, row_N * chosen_RE.shape[1] + expert_N)
    # what was chosen is sorted, not all there is to choose from
    best_first_N = weight_N.detach().argsort(descending=True, stable=True)
    best_first_N = best_first_N[row_N[best_first_N].argsort(stable=True)]
    taken_R = torch.bincount(row_N, minlength=len(chosen_RE))
    rank_N = torch.arange(len(row_N), device=row_N.device) - (taken_R.cumsum(0) - taken_R)[row_N]
    return Assignment(
        token_N=tokens.token_R[row_N],
        expert_N=expert_N,
        weight_N=weight_N,
        choice_N=torch.empty_like(rank_N).index_copy(0, best_first_N, rank_N),
        num_tokens=tokens.num_tokens,
        num_experts=chosen_RE.shape[1],
    )
