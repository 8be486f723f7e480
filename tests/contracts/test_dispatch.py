"""Capacity, permutation and combination: laws over every capacity policy and over ugly assignments."""

import math
import random
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.contracts.cases import draw, draw_case, error, own_selection
from turnout import reference
from turnout.contracts import CapacityPolicy
from turnout.dispatch import (
    AffinityThreshold,
    Dropless,
    FixedCapacity,
    TutelCapacity,
    combine,
    pack,
    plan_dispatch,
    queue_position,
    unpack,
)
from turnout.tensors import Admission, Assignment

POLICIES = CapacityPolicy.TABLE.names()


def any_assignment(seed: int, num_tokens: int, num_experts: int, is_topk: bool, declines: bool) -> Assignment:
    """A flat list of (token, expert, weight): K choices for each token, or another number for each in any order."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    k = rng.randint(1, num_experts)
    triples = []
    for token in range(num_tokens):
        count = k if is_topk else rng.randint(0, num_experts)
        triples += [(token, expert, i) for i, expert in enumerate(rng.sample(range(num_experts), count))]
    if not is_topk:
        rng.shuffle(triples)
    columns = torch.tensor(triples, dtype=torch.int64).reshape(-1, 3)
    return Assignment(
        token_N=columns[:, 0],
        expert_N=columns[:, 1],
        choice_N=columns[:, 2],
        weight_N=torch.rand(len(triples), generator=generator, dtype=torch.float64),
        num_tokens=num_tokens,
        num_experts=num_experts,
        declined_N=torch.rand(len(triples), generator=generator) < 0.3 if declines else None,
        top_k=k if is_topk else None,
    )


assignments = st.builds(
    any_assignment, st.integers(0, 10**6), st.integers(0, 12), st.integers(1, 6), st.booleans(), st.booleans()
)
priorities = st.sampled_from(["position", "score", "random"])
policies = st.one_of(
    st.just(Dropless()),
    st.builds(
        FixedCapacity,
        factor=st.sampled_from([0.1, 0.5, 1.0, 1.25, 3.0]),
        minimum=st.integers(0, 3),
        group_size=st.integers(0, 5),
        priority=priorities,
        eval_factor=st.sampled_from([0.0, 0.5, 2.0]),
    ),
    st.builds(
        TutelCapacity,
        factor=st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.25]),
        alignment=st.sampled_from([1, 2, 8]),
        priority=priorities,
    ),
    st.builds(
        AffinityThreshold,
        threshold=st.sampled_from([0.1, 0.6, 0.75, 1.0]),
        minimum=st.integers(0, 3),
        factor=st.sampled_from([0.0, 0.5, 1.1]),
    ),
)
factors = st.sampled_from([None, None, -1.5, -0.5, 0.0, 0.5, 1.0])


@settings(max_examples=150)
@given(assignment=assignments, policy=policies, training=st.booleans(), factor=factors)
def test_kept_and_dropped_make_all_assignments_by_expert_and_by_reason(
    assignment: Assignment, policy: CapacityPolicy, training: bool, factor: float | None
) -> None:
    if isinstance(policy, Dropless) and factor:
        factor = 0.0
    admission = policy.admit(assignment, training=training, generator=chance(), factor=factor)
    keep_N = kept(admission, assignment)
    kept_E = torch.bincount(assignment.expert_N[keep_N], minlength=assignment.num_experts)
    assert set(admission.dropped_E) == {"capacity", "policy"}
    assert torch.equal(kept_E + sum(admission.dropped_E.values()), assignment.counts_E)
    assert all((dropped_E >= 0).all() for dropped_E in admission.dropped_E.values())
    if admission.capacity is not None:
        assert kept_E.max() <= admission.capacity
    if assignment.declined_N is not None:
        assert not (keep_N & assignment.declined_N).any(), "a declined choice was sent"


@pytest.mark.parametrize("name", POLICIES)
def test_no_expert_takes_more_rows_than_the_capacity_says(name: str) -> None:
    row = CapacityPolicy.TABLE[name]
    cases = [case for case in (draw_case(seed) for seed in range(400)) if isinstance(case.capacity, row)]  # type: ignore[arg-type]
    for case in cases[:60]:
        layer, inputs = draw(case)
        assignment = own_selection(layer, inputs, case.seed)
        admission = case.capacity.admit(assignment, generator=chance())
        plan = plan_dispatch(assignment, admission)
        assert admission.capacity is None or int(plan.counts_E.max()) <= admission.capacity, case
        assert int(plan.counts_E.sum()) == len(plan.token_M) == int(kept(admission, assignment).sum()), case


@settings(max_examples=150)
@given(assignment=assignments)
def test_the_queue_is_by_choice_then_by_token(assignment: Assignment) -> None:
    position_N = queue_position(assignment, assignment.expert_N, assignment.num_experts)
    taken = [0] * assignment.num_experts
    order = sorted(range(len(position_N)), key=lambda n: (int(assignment.choice_N[n]), int(assignment.token_N[n])))
    for n in order:
        assert int(position_N[n]) == taken[int(assignment.expert_N[n])]
        taken[int(assignment.expert_N[n])] += 1
    if assignment.top_k is not None:
        places_TK = reference.places(assignment.as_topk()[0], assignment.num_experts)
        assert torch.equal(position_N.view(-1, assignment.top_k), places_TK)


@settings(max_examples=150)
@given(assignment=assignments, group_size=st.integers(1, 5), factor=st.sampled_from([0.5, 1.0, 1.25]))
def test_a_group_keeps_what_it_would_keep_alone(assignment: Assignment, group_size: int, factor: float) -> None:
    policy = FixedCapacity(factor=factor, group_size=group_size)
    keep_N = kept(policy.admit(assignment), assignment)
    group_N = assignment.token_N // group_size
    for group in group_N.unique():
        inside_N = group_N == group
        alone = Assignment(
            token_N=assignment.token_N[inside_N],
            expert_N=assignment.expert_N[inside_N],
            weight_N=assignment.weight_N[inside_N],
            choice_N=assignment.choice_N[inside_N],
            num_tokens=assignment.num_tokens,
            num_experts=assignment.num_experts,
            declined_N=None if assignment.declined_N is None else assignment.declined_N[inside_N],
        )
        assert torch.equal(keep_N[inside_N], kept(FixedCapacity(factor=factor).admit(alone), alone))


@example(hundredths=955, num_assignments=1_546_640, num_experts=2)
@example(hundredths=110, num_assignments=10, num_experts=1)
@given(hundredths=st.integers(1, 1000), num_assignments=st.integers(0, 10**9), num_experts=st.integers(1, 300))
def test_capacity_is_the_ceiling_in_exact_arithmetic(hundredths: int, num_assignments: int, num_experts: int) -> None:
    policy = FixedCapacity(factor=hundredths / 100, minimum=0)
    exact = math.ceil(Fraction(hundredths, 100) * num_assignments / num_experts)
    assert policy.rows(num_assignments, num_experts) == exact
    assert FixedCapacity(factor=hundredths / 100, minimum=7).rows(num_assignments, num_experts) == max(7, exact)


@settings(max_examples=150)
@given(assignment=assignments, policy=policies, layout=st.sampled_from(["ragged", "padded"]), fixed=st.booleans())
def test_identity_experts_give_each_token_the_sum_of_its_kept_weights(
    assignment: Assignment, policy: CapacityPolicy, layout: str, fixed: bool
) -> None:
    """Permute, then unpermute, then combine; forward and backward in x and in the weights."""
    admission = policy.admit(assignment, generator=chance())
    plan = plan_dispatch(assignment, admission)
    x_TD = torch.randn(assignment.num_tokens, 3, dtype=torch.float64).requires_grad_()
    weight_N = assignment.weight_N.clone().requires_grad_()
    weighted = replace(assignment, weight_N=weight_N)
    capacity = admission.capacity if fixed else None
    rows = pack(x_TD, plan, layout="padded" if layout == "padded" else "ragged", capacity=capacity)
    x_MD = unpack(rows, plan)
    assert torch.equal(x_MD, x_TD[plan.token_M])
    y_TD = combine(x_MD, weighted, plan)
    keep_N = kept(admission, assignment)
    total_T = torch.zeros(assignment.num_tokens, dtype=torch.float64)
    total_T = total_T.index_add(0, assignment.token_N[keep_N], assignment.weight_N[keep_N])
    assert error(y_TD.detach(), total_T.unsqueeze(1) * x_TD.detach()) < 1e-14
    y_grad = torch.randn_like(y_TD)
    x_grad, weight_grad = torch.autograd.grad(y_TD, [x_TD, weight_N], y_grad)
    assert error(x_grad, total_T.unsqueeze(1) * y_grad) < 1e-14
    dots_T = (x_TD.detach() * y_grad).sum(dim=1)
    assert error(weight_grad, dots_T[assignment.token_N] * keep_N) < 1e-14


@settings(max_examples=150)
@given(assignment=assignments, policy=policies)
def test_a_plan_orders_rows_by_expert_and_sends_each_kept_assignment_once(
    assignment: Assignment, policy: CapacityPolicy
) -> None:
    admission = policy.admit(assignment, generator=chance())
    plan = plan_dispatch(assignment, admission)
    expert_M = assignment.expert_N[plan.assignment_M]
    assert torch.equal(expert_M, expert_M.sort().values)
    assert torch.equal(plan.assignment_M.sort().values, kept(admission, assignment).nonzero().flatten())
    assert torch.equal(plan.token_M, assignment.token_N[plan.assignment_M])
    assert torch.equal(plan.counts_E, torch.bincount(expert_M, minlength=assignment.num_experts))
    assert torch.equal(plan.row_by_token_M.sort().values, torch.arange(len(expert_M)))
    assert torch.equal(plan.token_M[plan.row_by_token_M], plan.token_M.sort().values)


def test_more_experts_than_a_narrow_sort_key_holds_are_ordered_too() -> None:
    expert_N = torch.tensor([40_000, 3, 32_768, 0, 32_767])
    assignment = Assignment(
        token_N=torch.arange(5),
        expert_N=expert_N,
        weight_N=torch.ones(5),
        choice_N=torch.zeros(5, dtype=torch.int64),
        num_tokens=5,
        num_experts=40_001,
        top_k=1,
    )
    plan = plan_dispatch(assignment, Dropless().admit(assignment))
    assert expert_N[plan.assignment_M].tolist() == sorted(expert_N.tolist())


def test_the_fast_path_adds_nothing_a_general_assignment_would_not() -> None:
    """`top_k` only tells what is so; the same triples without it give the same rows and sums."""
    for seed in range(60):
        case = draw_case(seed)
        layer, inputs = draw(case)
        fast = own_selection(layer, inputs, case.seed)
        if fast.top_k is None:
            continue
        plain = replace(fast, top_k=None)
        plans = [plan_dispatch(a, case.capacity.admit(a, generator=chance())) for a in (fast, plain)]
        for name in ("assignment_M", "token_M", "counts_E", "row_by_token_M", "row_offset_T"):
            assert torch.equal(getattr(plans[0], name), getattr(plans[1], name)), (name, case)


def kept(admission: Admission, assignment: Assignment) -> Tensor:
    return torch.ones_like(assignment.token_N, dtype=torch.bool) if admission.keep_N is None else admission.keep_N


def chance() -> torch.Generator:
    """The same draws for every call."""
    return torch.Generator().manual_seed(0)
