"""Next-token cross-entropy without ever holding all logits."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100
CHUNK_BYTES = 8 << 20  # logits held at a time: about what stays in cache


def lm_loss(h_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
    """Mean cross-entropy of softmax(h W^T) against the targets, over targets that are not -100.

    The gradients of h and W are computed chunk by chunk on the way forward, in float32, so memory does not
    grow with tokens times vocabulary (the idea of Liger-Kernel's fused linear cross-entropy).
    Shapes: h_TD (T, D); weight_VD (V, D); target_T (T,) int64; returns (). With no target it is 0.
    """
    return _LinearCrossEntropy.apply(h_TD, weight_VD, target_T)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
        wants_grad = any(ctx.needs_input_grad)
        wide = torch.promote_types(h_TD.dtype, torch.float32)
        count = (target_T != IGNORE).sum().clamp(min=1)
        grad_h, grad_w = (torch.empty_like(h_TD), torch.zeros_like(weight_VD)) if wants_grad else (None, None)
        total = torch.zeros((), dtype=wide, device=h_TD.device)
        chunk = max(1, CHUNK_BYTES // (4 * weight_VD.shape[0]))
        for start in range(0, len(h_TD), chunk):
            rows = slice(start, start + chunk)
            h_CD = h_TD[rows]
            loss_C, grad_CV = _chunk_loss((h_CD @ weight_VD.t()).to(wide), target_T[rows])
            total += loss_C.sum()
            if grad_h is not None and grad_w is not None:
                grad_CV = grad_CV.div_(count).to(h_TD.dtype)
                torch.mm(grad_CV, weight_VD, out=grad_h[rows])
                grad_w.addmm_(grad_CV.t(), h_CD)
        ctx.save_for_backward(grad_h, grad_w)
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_h, grad_w = ctx.saved_tensors
        scale = grads[0]
        return grad_h * scale.to(grad_h.dtype), grad_w * scale.to(grad_w.dtype), None


def _chunk_loss(logits_CV: Tensor, target_C: Tensor) -> tuple[Tensor, Tensor]:
    """Losses, and softmax minus one-hot written over the logits; both zero where the target is ignored."""
    counted_C1 = (target_C != IGNORE).unsqueeze(1)
    target_C1 = target_C.clamp(min=0).unsqueeze(1)
    logits_CV.sub_(logits_CV.amax(dim=1, keepdim=True))
    chosen_C1 = logits_CV.gather(1, target_C1)
    sum_C1 = logits_CV.exp_().sum(dim=1, keepdim=True)
    loss_C1 = (sum_C1.log() - chosen_C1).masked_fill(~counted_C1, 0.0)
    logits_CV.mul_(counted_C1 / sum_C1)
    logits_CV.scatter_add_(1, target_C1, -counted_C1.to(logits_CV.dtype))
    return loss_C1.squeeze(1), logits_CV
