"""The call for few tokens is trusted once it does what the calls for many do, one after another."""

from collections.abc import Callable
from itertools import product
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from turnout.kernels.arguments import Int8Weights, Routing, Weights
from turnout.kernels.kernel import Kernel
from turnout.tensors import SoftmaxChoice

W = TypeVar("W", Weights, Int8Weights)
# whole vectors and parts of them, one expert of many with all tokens: tokens, dim, experts, choices
SIZES = ((16, 160, 40, 3), (7, 37, 5, 2), (1, 5, 2, 1), (16, 33, 1, 1))
DTYPES = (torch.float32, torch.bfloat16)


def few_error(
    kernel: Kernel,
    draw: Callable[[int, int], W],
    computed: Callable[[Tensor, Tensor, W, Routing], Tensor],
    *,
    digits: int = 0,
) -> float:
    """Largest difference of the router's logits from float64; infinite if anything else differs in a bit.

    `draw` makes weights of so many experts for so wide a token; `computed` is the pass they have for many tokens.
    """
    worst = 0.0
    for sizes, dtype, score, renormalize in product(SIZES, DTYPES, DTYPES, (False, True)):
        num_tokens, dim, num_experts, k = sizes
        generator = torch.Generator().manual_seed(sum(sizes))
        x_TD = torch.randn(num_tokens, dim, generator=generator).to(dtype)
        weight_ED = torch.randn(num_experts, dim, generator=generator).to(score)
        bias_E = torch.randn(num_experts, generator=generator) if renormalize else None
        weights = draw(num_experts, dim)
        choice = SoftmaxChoice(weight_ED, bias_E, k, renormalize)
        y_TD, route = kernel.few(choice, weights, dtype=dtype, digits=digits)(x_TD)
        got, rows_TD = route(), x_TD.float()
        want_RE = F.linear(x_TD.double(), weight_ED.double(), None if bias_E is None else bias_E.double())
        chosen = kernel.choose(got.logits_RE, got.token_R, k, renormalize=renormalize)
        own = got.assignment
        want_TD = computed(rows_TD, chosen.weight_N, weights, kernel.sort(own, None)).to(dtype)
        parts = (got.scores_RE, own.weight_N, own.expert_N, own.token_N, own.choice_N, y_TD)
        if not all(map(torch.equal, parts, (*chosen, want_TD))):
            return torch.inf
        error = float((got.logits_RE.double() - want_RE).abs().max() / want_RE.abs().max())
        # not max: it would drop NaN
        worst = error if not error <= worst else worst
    return worst
