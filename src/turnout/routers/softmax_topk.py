"""Softmax, the best k and their weights in one compiled pass: of few tokens an operator is longer than its work."""

from typing import Any

import torch
from torch import Tensor

from turnout.kernels import Chosen, Kernel, kernel_for
from turnout.routers.pieces import MOST_ARGMAX_PASSES
from turnout.tensors import Assignment, RouterInput, first_order


def softmax_topk(
    logits_RE: Tensor, tokens: RouterInput, k: int, *, renormalize: bool
) -> tuple[Assignment, Tensor] | None:
    """Each token's k highest logits with the softmax over them, or with their share of that over all, and the latter.

    Ties go to the lower index. None where there is no kernel for it.
    Shapes: logits_RE (R, E); returns an assignment of R k, and scores_RE (R, E).
    """
    kernel = kernel_for(logits_RE) if k <= MOST_ARGMAX_PASSES else None
    if kernel is None:
        return None
    if torch.is_grad_enabled() and logits_RE.requires_grad:
        chosen = Chosen(*_SoftmaxTopK.apply(logits_RE, tokens.token_R, k, renormalize, kernel))
    else:
        chosen = kernel.choose(logits_RE.detach(), tokens.token_R, k, renormalize=renormalize)
    assignment = Assignment(
        token_N=chosen.token_N,
        expert_N=chosen.expert_N,
        weight_N=chosen.weight_N,
        choice_N=chosen.choice_N,
        num_tokens=tokens.num_tokens,
        num_experts=logits_RE.shape[1],
        top_k=k,
    )
    return assignment, chosen.scores_RE


class _SoftmaxTopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_RE: Tensor, token_R: Tensor, k: int, renormalize: bool, kernel: Kernel
    ) -> tuple[Tensor, ...]:
        chosen = kernel.choose(logits_RE, token_R, k, renormalize=renormalize)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*chosen[2:])
        ctx.save_for_backward(*chosen[:3])
        ctx.renormalize, ctx.kernel = renormalize, kernel
        return tuple(chosen)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        scores_RE, weight_N, expert_N = ctx.saved_tensors
        chosen = Chosen(scores_RE, weight_N, expert_N, expert_N, expert_N)
        d_logits_RE = ctx.kernel.choose_backward(chosen, grads[0], grads[1], renormalize=ctx.renormalize)
        return d_logits_RE, None, None, None, None
