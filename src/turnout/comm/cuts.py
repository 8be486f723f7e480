"""A call of a layer cut into chunks of neighbouring tokens, each with a dispatch plan of its own.

Routing and capacity were decided on the whole call, so what the chunks send is what the whole would have sent: a token
that goes once to a node or a rank is in one chunk, with all of its choices.
Source: Hwang et al. 2022, Tutel, arXiv:2206.03382, section 4.2 (which cuts blocks along their capacity).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turnout.comm.picks import spread
from turnout.tensors import DispatchPlan


@dataclass(frozen=True, kw_only=True)
class CutPlan:
    """The rows of a plan ordered by (chunk, expert, place in the queue)."""

    tokens: tuple[int, ...]  # tokens of each chunk
    whole: DispatchPlan  # in that order
    counts_GE: Tensor  # rows of each chunk for each expert

    def plans(self, rows: Sequence[int]) -> list[DispatchPlan]:
        """The plan of each chunk; `rows`: how many each has, which only the host can say."""
        whole, parts = self.whole, []
        assignment_M, token_M, by_token_M = (
            each.split(list(rows)) for each in (whole.assignment_M, whole.token_M, whole.row_by_token_M)
        )
        offset_T = whole.row_offset_T.split(list(self.tokens))
        first_token = first_row = 0
        for chunk, (num_tokens, num_rows) in enumerate(zip(self.tokens, rows, strict=True)):
            parts.append(
                DispatchPlan(
                    assignment_M=assignment_M[chunk],
                    token_M=token_M[chunk] - first_token,
                    counts_E=self.counts_GE[chunk],
                    row_by_token_M=by_token_M[chunk] - first_row,
                    row_offset_T=offset_T[chunk] - first_row,
                )
            )
            first_token, first_row = first_token + num_tokens, first_row + num_rows
        return parts


def lengths_of(total: int, chunks: int) -> tuple[int, ...]:
    """`total` in so many runs, as equal as may be."""
    return tuple(total * (chunk + 1) // chunks - total * chunk // chunks for chunk in range(chunks))


def cut_plan(plan: DispatchPlan, num_tokens: int, chunks: int) -> CutPlan:
    """The plan cut by tokens; nothing is read back from the device."""
    tokens, device = lengths_of(num_tokens, chunks), plan.token_M.device
    if chunks == 1:
        return CutPlan(tokens=tokens, whole=plan, counts_GE=plan.counts_E.unsqueeze(0))
    num_experts, num_rows = len(plan.counts_E), len(plan.token_M)
    chunk_M = spread(range(chunks), tokens, device)[plan.token_M]
    order_M = chunk_M.to(torch.int16).argsort(stable=True)
    expert_E = torch.arange(num_experts, device=device)
    expert_M = expert_E.repeat_interleave(plan.counts_E, output_size=num_rows)
    counts = torch.zeros(chunks * num_experts, dtype=torch.int64, device=device)
    counts.index_add_(0, chunk_M * num_experts + expert_M, torch.ones_like(chunk_M))
    place_M = torch.empty_like(order_M).index_copy_(0, order_M, torch.arange(num_rows, device=device))
    whole = DispatchPlan(
        assignment_M=plan.assignment_M[order_M],
        token_M=plan.token_M[order_M],
        counts_E=plan.counts_E,
        row_by_token_M=place_M[plan.row_by_token_M],
        row_offset_T=plan.row_offset_T,
    )
    return CutPlan(tokens=tokens, whole=whole, counts_GE=counts.view(chunks, num_experts))
