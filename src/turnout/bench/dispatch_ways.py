"""Who runs in the case `dispatch`: from tokens to rows of experts in slots and back, by dense masks and by indices.

All have the same choices, and drop alike: an expert takes as many as it has slots, first choices of all tokens before
second ones (GShard's order).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from turnout.contracts import ExpertBackend
from turnout.dispatch import FixedCapacity, LocalDispatcher, combine, pack, plan_dispatch, unpack
from turnout.experts import FFNExperts, choose_backend
from turnout.layers.expert_pass import pass_experts
from turnout.tensors import Admission, Assignment, Padded

OURS, ARGSORT, DENSE = "turnout", "argsort", "gshard-einsum"
Rows = Callable[[Tensor], Tensor]  # (E, C, D) to (E, C, D)


@dataclass(frozen=True, kw_only=True)
class Routed:
    """Tokens and what a router said of them; the same for everybody."""

    x_TD: Tensor
    choice_TK: Tensor
    weight_TK: Tensor
    num_experts: int
    factor: float  # capacity over the balanced load

    @property
    def capacity(self) -> int:
        """Slots of an expert."""
        return FixedCapacity(factor=self.factor).rows(self.choice_TK.numel(), self.num_experts)

    @property
    def assignment(self) -> Assignment:
        """The same as our routers have it."""
        num_tokens, k = self.choice_TK.shape
        return Assignment(
            token_N=torch.arange(num_tokens).repeat_interleave(k),
            expert_N=self.choice_TK.flatten(),
            weight_N=self.weight_TK.flatten(),
            choice_N=torch.arange(k).repeat(num_tokens),
            num_tokens=num_tokens,
            num_experts=self.num_experts,
            top_k=k,
        )

    @property
    def admission(self) -> Admission:
        """What of it is within the capacity."""
        return FixedCapacity(factor=self.factor).admit(self.assignment)


def by_masks(routed: Routed, experts: Rows) -> Tensor:
    """One-hot masks of tokens, experts and slots, multiplied with the tokens and with the experts' rows.

    Shapes: returns (T, D). Source: Lepikhin et al. 2020, arXiv:2006.16668, algorithm 2; masks as DeepSpeed makes them.
    """
    combine_TEC, taken_E = None, 0
    for choice_T, weight_T in zip(routed.choice_TK.unbind(1), routed.weight_TK.unbind(1), strict=True):
        mask_TE = F.one_hot(choice_T, routed.num_experts)
        place_T = ((mask_TE.cumsum(0) - mask_TE + taken_E) * mask_TE).sum(1)
        taken_E = taken_E + mask_TE.sum(0)
        kept_T = place_T < routed.capacity
        slot_TC = F.one_hot(place_T * kept_T, routed.capacity).to(weight_T.dtype)
        gate_TE = (weight_T * kept_T)[:, None] * mask_TE
        found_TEC = torch.einsum("te,tc->tec", gate_TE, slot_TC)
        combine_TEC = found_TEC if combine_TEC is None else combine_TEC.add_(found_TEC)
        del found_TEC
    assert combine_TEC is not None
    dispatch_TEC = combine_TEC.bool().to(routed.x_TD.dtype)
    rows_ECD = experts(torch.einsum("tec,td->ecd", dispatch_TEC, routed.x_TD))
    return torch.einsum("tec,ecd->td", combine_TEC, rows_ECD)


def by_argsort(routed: Routed, experts: Rows) -> Tensor:
    """The choices sorted by expert, tokens gathered in that order, rows gathered back, weighted and added up.

    So transformers' grouped_mm does it, which has no capacity. Shapes: returns (T, D).
    """
    num_tokens, k = routed.choice_TK.shape
    capacity, width = routed.capacity, routed.x_TD.shape[1]
    # first choices of all tokens come first
    expert_N = routed.choice_TK.t().reshape(-1)
    order_N = expert_N.argsort(stable=True)
    in_order_N = expert_N[order_N]
    counts_E = torch.bincount(expert_N, minlength=routed.num_experts)
    place_N = torch.arange(len(expert_N)) - (counts_E.cumsum(0) - counts_E)[in_order_N]
    kept_N = place_N < capacity
    slot_in_order_N = in_order_N * capacity + place_N
    token_M = (order_N % num_tokens)[kept_N]
    rows_PD = routed.x_TD.new_zeros(routed.num_experts * capacity, width)
    rows_PD.index_copy_(0, slot_in_order_N[kept_N], routed.x_TD.index_select(0, token_M))
    y_PD = experts(rows_PD.view(routed.num_experts, capacity, width)).flatten(0, 1)
    slot_N = torch.empty_like(order_N).index_copy_(0, order_N, slot_in_order_N * kept_N)
    within_N = torch.empty_like(kept_N).index_copy_(0, order_N, kept_N)
    weight_N = routed.weight_TK.t().reshape(-1) * within_N
    return (y_PD.index_select(0, slot_N) * weight_N[:, None]).view(k, num_tokens, width).sum(0)


def by_plan(routed: Routed, experts: Rows) -> Tensor:
    """As a layer of ours with padded rows does it. Shapes: returns (T, D)."""
    assignment = routed.assignment
    plan = plan_dispatch(assignment, FixedCapacity(factor=routed.factor).admit(assignment))
    rows = pack(routed.x_TD, plan, layout="padded", capacity=routed.capacity)
    done = Padded(x_LCD=experts(rows.x), counts_L=plan.counts_E)
    return combine(unpack(done, plan), assignment, plan)


WAYS: dict[str, Callable[[Routed, Rows], Tensor]] = {DENSE: by_masks, ARGSORT: by_argsort, OURS: by_plan}


def layer_of_ours(routed: Routed, experts: FFNExperts) -> Tensor:
    """The whole of it with the backend that a layer here takes, which may gather tokens block by block."""
    backend: ExpertBackend = choose_backend(experts, "auto", dtype=routed.x_TD.dtype, device=routed.x_TD.device)
    assignment = routed.assignment
    admission = FixedCapacity(factor=routed.factor).admit(assignment)
    return pass_experts(experts, backend, routed.x_TD, assignment, admission, dispatcher=LocalDispatcher())


def batched(experts: FFNExperts) -> Rows:
    """The same experts on padded rows, as two batched products."""

    def run(rows_ECD: Tensor) -> Tensor:
        return torch.bmm(F.gelu(torch.bmm(rows_ECD, experts.up_EDG)), experts.down_EFD)

    return run


def mask_bytes(routed_tokens: int, *, experts: int, capacity: int, backward: bool) -> int:
    """The least that the masks take: weights, places as numbers and as truth values, the gradient of the weights."""
    numbers = 3 if backward else 2
    return (4 * numbers + 1) * routed_tokens * experts * capacity
