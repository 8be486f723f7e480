"""Softmax or sigmoid, the best k, their weights and counts per expert by one Triton kernel, where there is a GPU."""

from typing import Any

import torch
from torch import Tensor

from turnout.kernels.arguments import like_first
from turnout.kernels.gpu import MOST_EXPERTS, chooser, device_failure, gates_failure, is_interpreting
from turnout.kernels.gpu.configs import chosen_room
from turnout.tensors import Assignment, BlockCounts, RouterInput, first_order

MOST_CHOICES = 16  # each is a pass over the registers that hold a row


def triton_topk(
    logits_RE: Tensor,
    tokens: RouterInput,
    k: int,
    *,
    sigmoid: bool = False,
    renormalize: bool,
    scale: float = 1.0,
    bias_E: Tensor | None = None,
) -> tuple[Assignment, Tensor] | None:
    """Each token's k best experts with their weights, as `TopK` and `DeepSeekV3` have them, and the scores of all.

    Chosen are the highest logits, or with a bias the highest of sigmoid + bias; a NaN is higher than everything. Ties
    go to the lower index, and no expert is chosen twice. None where there is no kernel for it.
    Shapes: logits_RE (R, E), bias_E (E,); returns an assignment of R k, and scores_RE (R, E).
    """
    if _failure(logits_RE, k, sigmoid=sigmoid, renormalize=renormalize):
        return None
    scores_RE, weight_N, expert_N, token_N, choice_N, count_BE = triton_gates(
        logits_RE, tokens.token_R, bias_E, k, sigmoid, renormalize, scale
    )
    assignment = Assignment(
        token_N=token_N,
        expert_N=expert_N,
        weight_N=weight_N,
        choice_N=choice_N,
        num_tokens=tokens.num_tokens,
        num_experts=logits_RE.shape[1],
        top_k=k,
        block_counts=BlockCounts(expert_N=expert_N, count_BE=count_BE),
    )
    return assignment, scores_RE


def _failure(logits_RE: Tensor, k: int, *, sigmoid: bool, renormalize: bool) -> str:
    """Why torch's operators do it, or nothing."""
    if not (logits_RE.is_cuda or (logits_RE.device.type == "cpu" and is_interpreting())):
        return f"the kernel chooses on CUDA, not on {logits_RE.device.type}"
    if logits_RE.dtype != torch.float32:
        return f"the kernel chooses by float32, not by {logits_RE.dtype}"
    if k > MOST_CHOICES or logits_RE.shape[1] > MOST_EXPERTS:
        return f"the kernel chooses up to {MOST_CHOICES} of up to {MOST_EXPERTS} experts"
    return device_failure(logits_RE.device) or gates_failure(logits_RE.device, sigmoid, renormalize)


@torch.library.custom_op("turnout::triton_gates", mutates_args=())
def triton_gates(
    logits_RE: Tensor,
    token_R: Tensor,
    bias_E: Tensor | None,
    k: int,
    sigmoid: bool,
    renormalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """scores_RE; weight_N, expert_N, token_N and choice_N, a token's side by side; counts of blocks of tokens."""
    bias_E = None if bias_E is None else bias_E.float().contiguous()
    gate = chooser().Gate(k=k, sigmoid=sigmoid, renormalize=renormalize, scale=scale)
    with torch.cuda.device_of(logits_RE):
        chosen, count_BE = chooser().choose(logits_RE.contiguous(), token_R.contiguous(), bias_E, gate)
    return (*chosen, count_BE)


@triton_gates.register_fake
def _(logits_RE: Tensor, token_R: Tensor, bias_E: Tensor | None, k: int, *_: object) -> tuple[Tensor, ...]:
    chosen, count_BE = chosen_room(logits_RE, k)
    return (*chosen, count_BE)


@torch.library.custom_op("turnout::triton_gates_backward", mutates_args=())
def triton_gates_backward(
    logits_RE: Tensor,
    scores_RE: Tensor,
    weight_N: Tensor,
    expert_N: Tensor,
    scores_grad_RE: Tensor | None,
    weight_grad_N: Tensor | None,
    k: int,
    sigmoid: bool,
    renormalize: bool,
    scale: float,
) -> Tensor:
    """The gradient of the logits."""
    gate = chooser().Gate(k=k, sigmoid=sigmoid, renormalize=renormalize, scale=scale)
    given = (None if grad is None else grad.contiguous() for grad in (scores_grad_RE, weight_grad_N))
    with torch.cuda.device_of(logits_RE):
        return chooser().choose_backward(logits_RE.contiguous(), scores_RE, weight_N, expert_N, *given, gate)


triton_gates_backward.register_fake(like_first)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], *output[:3])
    ctx.gate = inputs[3:]


def _backward(
    ctx: Any, scores_grad_RE: Tensor | None, weight_grad_N: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    found = None
    if scores_grad_RE is not None or weight_grad_N is not None:
        found = triton_gates_backward(*ctx.saved_tensors, scores_grad_RE, weight_grad_N, *ctx.gate)
    return found, None, None, None, None, None, None


triton_gates.register_autograd(first_order(_backward), setup_context=_remember)
