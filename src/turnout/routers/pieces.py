"""What routers are built from: score, activation, restriction, selection, weighting; pure functions."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from turnout.tensors import Assignment, RouterInput

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
        nn.init.normal_(self.weight_ED, std=self.init_std)
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
    # argmax returns the first of equal maxima, which topk does not promise, and is the faster of the two
    left_RE = scores_RE.detach().clone() if k > 1 else scores_RE.detach()
    picks = []
    for _ in range(k):
        pick_R1 = left_RE.argmax(dim=1, keepdim=True)
        picks.append(pick_R1)
        if len(picks) < k:
            left_RE.scatter_(1, pick_R1, -torch.inf)
    return torch.cat(picks, dim=1)


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
    top_k = expert_RK.shape[1]
    return Assignment(
        token_N=tokens.token_R.repeat_interleave(top_k),
        expert_N=expert_RK.reshape(-1),
        weight_N=weight_RK.reshape(-1),
        choice_N=torch.arange(top_k, device=expert_RK.device).repeat(len(tokens.token_R)),
        num_tokens=tokens.num_tokens,
        num_experts=num_experts,
        declined_N=declined_N,
        top_k=top_k,
    )
