"""The kernels of gates.py, called on tensors."""

# see launch.py
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from turnout.kernels.arguments import Chosen
from turnout.kernels.gpu.configs import chosen_room, counted_rows
from turnout.kernels.gpu.gates import choose_grad_kernel, choose_kernel
from turnout.kernels.gpu.grid import given

BLOCK = 2048  # logits that a program holds at once


@dataclass(frozen=True, kw_only=True)
class Gate:
    """How scores and weights are made of logits."""

    k: int
    sigmoid: bool
    renormalize: bool
    scale: float

    @property
    def constants(self) -> dict:
        """What both kernels are compiled with."""
        block_k = max(2, triton.next_power_of_2(self.k))
        return {"K": self.k, "SIGMOID": self.sigmoid, "RENORMALIZE": self.renormalize, "BLOCK_K": block_k}


def choose(logits_RE: Tensor, token_R: Tensor, bias_E: Tensor | None, gate: Gate) -> tuple[Chosen, Tensor]:
    """What a router chooses, and counts per expert of each block of `counted_rows(k)` rows, in int32.

    Shapes: logits_RE (R, E) float32, token_R (R,) int64, bias_E (E,) float32.
    """
    num_rows, num_experts = logits_RE.shape
    rows, block_e = counted_rows(gate.k), _width(num_experts)
    chosen, count_BE = chosen_room(logits_RE, gate.k)
    if num_rows:
        choose_kernel[(len(count_BE),)](
            logits_RE, given(bias_E, logits_RE), token_R, *chosen, count_BE, num_rows, gate.scale,
            E=num_experts, HAS_BIAS=bias_E is not None, ROWS=rows, BLOCK_R=min(rows, max(1, BLOCK // block_e)),
            BLOCK_E=block_e, **gate.constants,
        )  # fmt: skip
    return chosen, count_BE


def choose_backward(
    logits_RE: Tensor,
    scores_RE: Tensor,
    weight_N: Tensor,
    expert_N: Tensor,
    scores_grad_RE: Tensor | None,
    weight_grad_N: Tensor | None,
    gate: Gate,
) -> Tensor:
    """The gradient of the logits; None: nothing depends on it."""
    num_rows, num_experts = logits_RE.shape
    block_e, logits_grad_RE = _width(num_experts), torch.empty_like(logits_RE)
    block_r = max(1, BLOCK // block_e)
    if num_rows:
        choose_grad_kernel[(triton.cdiv(num_rows, block_r),)](
            logits_RE, scores_RE, weight_N, expert_N,
            given(scores_grad_RE, scores_RE),
            given(weight_grad_N, weight_N),
            logits_grad_RE, num_rows, gate.scale,
            E=num_experts, BY_SCORES=scores_grad_RE is not None, BY_WEIGHTS=weight_grad_N is not None,
            BLOCK_R=block_r, BLOCK_E=block_e, **gate.constants,
        )  # fmt: skip
    return logits_grad_RE


def _width(num_experts: int) -> int:
    return max(8, triton.next_power_of_2(num_experts))
