"""Next-token cross-entropy without ever holding all logits."""

from typing import Any

import torch
from torch import Tensor

from turnout.tensors import first_order

IGNORE = -100
_CHUNK_BYTES = 32 << 20  # logits held at a time, at most: enough for the matrix products to be at full speed
_CORE_BYTES = 2 << 20  # of a core's own cache, which logits need not leave between softmax and products


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
        counted_T = target_T != IGNORE
        # an ignored row is all zeros from here on: its logits are finite, and it adds nothing to W's gradient
        h_TD = h_TD.masked_fill(~counted_T.unsqueeze(1), 0.0)
        target_T1 = target_T.clamp(min=0).unsqueeze(1)
        vocab_size, dim = weight_VD.shape
        grad_h = torch.empty_like(h_TD) if wants_grad else None
        grad_w_DV = weight_VD.new_zeros(dim, vocab_size) if wants_grad else None
        chosen_T1 = torch.empty(target_T1.shape, dtype=wide, device=h_TD.device)
        chunk = rows_at_a_time(vocab_size, dim, h_TD.device)
        for start in range(0, len(h_TD), chunk):
            rows = slice(start, start + chunk)
            h_CD, target_C1 = h_TD[rows], target_T1[rows]
            log_share_CV = (h_CD @ weight_VD.t()).to(wide).log_softmax(dim=1)
            chosen_T1[rows] = log_share_CV.gather(1, target_C1)
            if grad_h is not None and grad_w_DV is not None:
                # softmax minus one-hot; the division by the number of targets waits for the small tensors
                grad_CV = log_share_CV.exp_()
                grad_CV.scatter_add_(1, target_C1, grad_CV.new_full(target_C1.shape, -1.0))
                grad_CV = grad_CV.to(h_TD.dtype)
                torch.mm(grad_CV, weight_VD, out=grad_h[rows])
                # a (D, V) product of a wide right side is the faster one on CPU
                grad_w_DV.addmm_(h_CD.t(), grad_CV)
        count = counted_T.sum().clamp(min=1)
        ctx.save_for_backward(grad_h, grad_w_DV, counted_T, count)
        return -chosen_T1.squeeze(1).masked_fill(~counted_T, 0.0).sum() / count

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_h, grad_w_DV, counted_T, count = ctx.saved_tensors
        scale = grads[0] / count
        grad_w = torch.empty_like(grad_w_DV.t(), memory_format=torch.contiguous_format)
        torch.mul(grad_w_DV.t(), scale.to(grad_w.dtype), out=grad_w)
        scale_T1 = torch.where(counted_T, scale, 0.0).unsqueeze(1).to(grad_h.dtype)
        return grad_h * scale_T1, grad_w, None


def rows_at_a_time(vocab_size: int, dim: int, device: torch.device) -> int:
    """Tokens whose logits are held at a time."""
    most = max(1, _CHUNK_BYTES // (4 * vocab_size))
    if device.type != "cpu":
        return most
    # with fewer rows than some widths of the model it is W that is read again and again
    return min(most, max(torch.get_num_threads() * _CORE_BYTES // (4 * vocab_size), 2 * dim))
