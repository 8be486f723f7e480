"""What each capacity policy keeps, against loops over tokens and experts."""

import math
import random
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.contracts.cases import error
from tests.contracts.test_dispatch import any_assignment, assignments, chance, kept
from turnout import MoE
from turnout.contracts import CapacityPolicy
from turnout.dispatch import AffinityThreshold, Dropless, FixedCapacity, TutelCapacity, arrival_order
from turnout.dispatch.queue import Priority
from turnout.routers import TopK
from turnout.tensors import Assignment

topk_assignments = st.builds(
    any_assignment, st.integers(0, 10**6), st.integers(0, 24), st.integers(1, 6), st.just(True), st.booleans()
)
LATTICE = (0.0, 0.25, 0.5, 1.0)


def with_priorities(assignment: Assignment, seed: int, *, lattice: bool = False) -> Assignment:
    """The assignment with priorities of its own, some negative; on a lattice many are equal and sums are exact."""
    generator = torch.Generator().manual_seed(seed)
    count = len(assignment.token_N)
    drawn_N = torch.randn(count, generator=generator, dtype=torch.float64)
    if lattice:
        drawn_N = torch.tensor(LATTICE, dtype=torch.float64)[torch.randint(0, 4, (count,), generator=generator)]
    return replace(assignment, priority_N=drawn_N)


def by_loop(assignment: Assignment, order: list[int], capacity: float) -> list[bool]:
    """Serve the assignments in this order; an expert takes `capacity` of them, and a declined one holds its place."""
    taken, keep = [0] * assignment.num_experts, [False] * len(order)
    for n in order:
        expert = int(assignment.expert_N[n])
        declined = assignment.declined_N is not None and bool(assignment.declined_N[n])
        keep[n] = taken[expert] < capacity and not declined
        taken[expert] += 1
    return keep


def order_by_loop(assignment: Assignment, priority: str) -> list[int]:
    """First choices of all tokens, then second choices; within a choice by token, or by the token's best priority."""
    given_N = assignment.weight_N if assignment.priority_N is None else assignment.priority_N
    best: dict[int, float] = {}
    for token, value in zip(assignment.token_N.tolist(), given_N.tolist(), strict=True):
        best[token] = max(value, best.get(token, -math.inf))
    token, choice = assignment.token_N.tolist(), assignment.choice_N.tolist()
    score = [-best[t] if priority == "score" else 0.0 for t in token]
    return sorted(range(len(token)), key=lambda n: (choice[n], score[n], token[n]))


@settings(max_examples=150)
@given(
    assignment=assignments,
    seed=st.integers(0, 99),
    priority=st.sampled_from(["position", "score"]),
    given_priorities=st.sampled_from(["none", "normal", "lattice"]),
    factor=st.sampled_from([0.25, 0.5, 1.0]),
)
def test_a_queue_serves_first_choices_first_and_within_them_by_position_or_by_best_score(
    assignment: Assignment, seed: int, priority: Priority, given_priorities: str, factor: float
) -> None:
    if given_priorities != "none":
        assignment = with_priorities(assignment, seed, lattice=given_priorities == "lattice")
    order = order_by_loop(assignment, priority)
    assert arrival_order(assignment, priority).tolist() == order
    policy = FixedCapacity(factor=factor, priority=priority)
    capacity = policy.rows(len(order), assignment.num_experts)
    assert kept(policy.admit(assignment), assignment).tolist() == by_loop(assignment, order, capacity)


@settings(max_examples=100)
@given(assignment=assignments)
def test_a_random_queue_still_serves_first_choices_first(assignment: Assignment) -> None:
    order_N = arrival_order(assignment, "random", chance())
    assert sorted(order_N.tolist()) == list(range(len(assignment.token_N)))
    assert assignment.choice_N[order_N].tolist() == sorted(assignment.choice_N.tolist())
    assert torch.equal(order_N, arrival_order(assignment, "random", chance()))


def test_random_token_selection_keeps_every_place_of_the_batch_equally_often() -> None:
    """By position the last tokens are always dropped; at random each of 40 is kept half of 2000 times, 5 sigma."""
    assignment = one_choice_each(expert_N=torch.zeros(40, dtype=torch.int64), num_experts=2)
    policy, generator = FixedCapacity(factor=1.0, priority="random"), chance()
    keeps = torch.stack([kept(policy.admit(assignment, generator=generator), assignment) for _ in range(2000)])
    assert (keeps.sum(dim=1) == 20).all()
    assert (keeps.double().mean(dim=0) - 0.5).abs().max() < 5 * (0.25 / 2000) ** 0.5
    plain = kept(FixedCapacity(factor=1.0).admit(assignment), assignment)
    assert plain.tolist() == [True] * 20 + [False] * 20


@pytest.mark.parametrize("priority", ["position", "score", "random"])
def test_where_a_token_stands_among_padding_does_not_change_what_is_kept(priority: Priority) -> None:
    policies = [FixedCapacity(factor=0.5, priority=priority), TutelCapacity(factor=0.5, priority=priority)]
    for seed in range(20):
        dense = any_assignment(seed, 12, 4, seed % 2 == 0, True)
        spread = replace(dense, token_N=3 * dense.token_N + 1, num_tokens=40)
        for policy in [*policies, AffinityThreshold()]:
            keeps = [kept(policy.admit(a, generator=chance()), a) for a in (dense, spread)]
            assert torch.equal(*keeps), (seed, policy)


@settings(max_examples=100)
@given(assignment=assignments, factor=st.sampled_from([0.25, 0.5, 1.0, 2.0]), group_size=st.sampled_from([0, 4]))
def test_a_factor_for_one_call_replaces_the_one_of_the_policy(
    assignment: Assignment, factor: float, group_size: int
) -> None:
    policy = FixedCapacity(factor=7.0, minimum=0, group_size=group_size)
    asked, own = policy.admit(assignment, factor=factor), replace(policy, factor=factor).admit(assignment)
    below = policy.admit(assignment, factor=-factor)
    assert torch.equal(kept(asked, assignment), kept(own, assignment))
    assert torch.equal(kept(below, assignment), kept(own, assignment))
    assert asked.capacity == own.capacity
    assert below.capacity == min(own.capacity or 0, int(assignment.counts_E.max()))


@pytest.mark.parametrize("policy", [Dropless(), FixedCapacity(factor=0.25), TutelCapacity(factor=0.25)])
@pytest.mark.parametrize("training", [True, False])
def test_a_factor_of_zero_for_one_call_drops_nothing(policy: CapacityPolicy, training: bool) -> None:
    for seed in range(20):
        assignment = any_assignment(seed, 9, 3, seed % 2 == 0, False)
        admission = policy.admit(assignment, training=training, factor=0.0)
        assert kept(admission, assignment).all()
        assert not sum(admission.dropped_E.values(), torch.zeros(3)).any()


def test_a_factor_of_zero_leaves_the_affinity_threshold_in_force() -> None:
    assignment = any_assignment(3, 12, 3, True, False)
    alone = AffinityThreshold(threshold=0.5, factor=0.0).admit(assignment)
    asked = AffinityThreshold(threshold=0.5, factor=0.25).admit(assignment, factor=0.0)
    assert torch.equal(kept(asked, assignment), kept(alone, assignment))
    assert not asked.dropped_E["capacity"].any()
    assert asked.dropped_E["policy"].any()


def test_evaluation_has_a_factor_of_its_own_where_one_is_set() -> None:
    assignment = any_assignment(0, 12, 3, True, False)
    policy = FixedCapacity(factor=0.5, eval_factor=2.0)
    for training, factor in ((True, 0.5), (False, 2.0)):
        got, want = policy.admit(assignment, training=training), FixedCapacity(factor=factor).admit(assignment)
        assert got.capacity == want.capacity
        assert torch.equal(kept(got, assignment), kept(want, assignment))
    assert replace(policy, eval_factor=0.0).admit(assignment, training=False).capacity == policy.rows(
        len(assignment.token_N), 3
    )


def test_a_layer_hands_the_policy_its_mode_and_the_factor_of_the_call() -> None:
    layer = MoE(8, 6, 4, router=TopK(k=2), capacity=FixedCapacity(factor=0.25, eval_factor=8.0))
    x = torch.randn(64, 8)
    assert layer(x).stats.dropped_capacity_E.any()
    assert not layer(x, capacity_factor=0.0).stats.dropped_capacity_E.any()
    assert not layer.eval()(x).stats.dropped_capacity_E.any()
    assert layer(x, capacity_factor=0.25).stats.dropped_capacity_E.any()


@settings(max_examples=200)
@given(
    assignment=topk_assignments,
    setting=st.sampled_from([-4.0, -1.1, -1.0, -0.5, 0.0, 0.3, 0.5, 1.0, 1.1, 2.0]),
    alignment=st.sampled_from([1, 2, 3, 8]),
    priority=st.sampled_from(["position", "score"]),
    per_call=st.booleans(),
)
def test_tutel_capacity_is_that_of_its_code(
    assignment: Assignment, setting: float, alignment: int, priority: Priority, per_call: bool
) -> None:
    k = assignment.top_k
    assert k is not None
    policy = TutelCapacity(factor=3.0 if per_call else setting, alignment=alignment, priority=priority)
    admission = policy.admit(assignment, factor=setting if per_call else None)
    num_tokens, needed = len(assignment.token_N) // k, max(assignment.counts_E.tolist())
    samples_per_expert = math.ceil(num_tokens / assignment.num_experts)
    capacity = k * int(setting * samples_per_expert) if setting > 0 else needed
    if setting < 0:
        capacity = min(needed, k * int(-setting * samples_per_expert))
    while capacity % alignment:
        capacity += 1
    assert admission.capacity == capacity
    order = order_by_loop(assignment, priority)
    assert kept(admission, assignment).tolist() == by_loop(assignment, order, capacity)
    if setting == 0:
        assert not admission.dropped_E["capacity"].any()
    if setting < 0 and needed <= k * int(-setting * samples_per_expert):
        assert not admission.dropped_E["capacity"].any(), "what is needed fits, and still something was dropped"


@settings(max_examples=100)
@given(seed=st.integers(0, 10**6), num_tokens=st.integers(1, 24), num_experts=st.integers(1, 6))
def test_tutel_capacity_of_one_holds_a_balanced_load_of_any_router(
    seed: int, num_tokens: int, num_experts: int
) -> None:
    """Also where tokens differ in their number of choices, which Tutel's own formula does not cover."""
    choosing = any_assignment(seed, num_tokens, num_experts, False, False)
    capacity = TutelCapacity(factor=1.0).admit(choosing).capacity
    assert capacity is not None
    assert capacity * num_experts >= len(choosing.token_N)
    fast = any_assignment(seed, num_tokens, num_experts, True, False)
    plain = replace(fast, top_k=None)
    assert TutelCapacity(factor=0.7).admit(plain).capacity == TutelCapacity(factor=0.7).admit(fast).capacity


@settings(max_examples=200)
@given(
    assignment=assignments,
    seed=st.integers(0, 99),
    lattice=st.booleans(),
    threshold=st.sampled_from([0.2, 0.5, 0.75, 1.0]),
    minimum=st.integers(0, 3),
    factor=st.sampled_from([0.0, 0.25, 0.5, 1.1]),
)
def test_affinity_keeps_the_shortest_prefix_that_reaches_the_threshold(
    assignment: Assignment, seed: int, lattice: bool, threshold: float, minimum: int, factor: float
) -> None:
    assignment = with_priorities(assignment, seed, lattice=lattice)
    policy = AffinityThreshold(threshold=threshold, minimum=minimum, factor=factor)
    admission = policy.admit(assignment)
    keep, reasons = affinity_by_loop(assignment, policy)
    assert kept(admission, assignment).tolist() == keep
    for reason, dropped_E in admission.dropped_E.items():
        want = [
            sum(reasons[n] == reason for n in range(len(keep)) if int(assignment.expert_N[n]) == expert)
            for expert in range(assignment.num_experts)
        ]
        assert dropped_E.tolist() == want, reason


def affinity_by_loop(assignment: Assignment, policy: AffinityThreshold) -> tuple[list[bool], list[str]]:
    """Expert by expert, in exact arithmetic: what is kept, and why the rest is not."""
    assert assignment.priority_N is not None
    count, priority = len(assignment.token_N), assignment.priority_N.tolist()
    arrival = order_by_loop(assignment, "position")
    capacity = float("inf")
    if policy.factor:
        exact = Fraction(policy.factor).limit_denominator(100) * count / assignment.num_experts
        capacity = max(policy.minimum, math.ceil(exact))
    keep, reasons = [False] * count, [""] * count
    for expert in range(assignment.num_experts):
        queue = [n for n in arrival if int(assignment.expert_N[n]) == expert]
        queue.sort(key=lambda n: -priority[n])
        amounts = [max(Fraction(priority[n]), Fraction(0)) for n in queue]
        enough, ahead = Fraction(policy.threshold * (1 - 1e-9)) * sum(amounts), Fraction(0)
        for place, (n, amount) in enumerate(zip(queue, amounts, strict=True)):
            wanted = ahead < enough or place < policy.minimum
            declined = assignment.declined_N is not None and bool(assignment.declined_N[n])
            keep[n] = wanted and place < capacity and not declined
            reasons[n] = "" if keep[n] else "capacity" if wanted and place >= capacity else "policy"
            ahead += amount
    return keep, reasons


def test_equal_affinities_keep_the_share_that_was_asked_for() -> None:
    """0.7 * 10 is a little more than 7 in floating point, and must not keep an eighth row."""
    for threshold, rows in ((0.1, 1), (0.3, 3), (0.6, 6), (0.7, 7), (0.75, 8), (1.0, 10)):
        for value in (0.1, 1 / 3, 1e-30, 1e30):
            assignment = one_choice_each(expert_N=torch.zeros(10, dtype=torch.int64), num_experts=1)
            assignment = replace(assignment, priority_N=torch.full((10,), value))
            keep_N = kept(AffinityThreshold(threshold=threshold, factor=0.0).admit(assignment), assignment)
            assert keep_N.tolist() == [True] * rows + [False] * (10 - rows)


def test_without_a_positive_affinity_the_minimum_is_kept() -> None:
    for value in (0.0, -0.5):
        assignment = one_choice_each(expert_N=torch.tensor([0, 0, 0, 1]), num_experts=3)
        assignment = replace(assignment, priority_N=torch.full((4,), value))
        keep_N = kept(AffinityThreshold(minimum=2).admit(assignment), assignment)
        assert keep_N.tolist() == [True, True, False, True]


def test_an_expert_of_faint_affinities_is_not_drowned_by_the_others() -> None:
    rng = random.Random(0)
    faint, loud = [rng.random() * 1e-20 for _ in range(30)], [rng.random() * 1e20 for _ in range(30)]
    assignment = one_choice_each(expert_N=torch.tensor([0] * 30 + [1] * 30), num_experts=2)
    assignment = replace(assignment, priority_N=torch.tensor(faint + loud, dtype=torch.float64))
    policy = AffinityThreshold(factor=0.0)
    assert kept(policy.admit(assignment), assignment).tolist() == affinity_by_loop(assignment, policy)[0]


def one_choice_each(expert_N: Tensor, num_experts: int) -> Assignment:
    count = len(expert_N)
    return Assignment(
        token_N=torch.arange(count),
        expert_N=expert_N,
        weight_N=torch.ones(count, dtype=torch.float64),
        choice_N=torch.zeros(count, dtype=torch.int64),
        num_tokens=count,
        num_experts=num_experts,
        top_k=1,
    )


@pytest.mark.parametrize("backend", ["padded_bmm", "loop"])
@pytest.mark.parametrize(
    "policy",
    [
        FixedCapacity(factor=1e308),
        FixedCapacity(factor=1e308, group_size=4),
        FixedCapacity(minimum=10**12),
        FixedCapacity(minimum=2**62, group_size=4),
        TutelCapacity(factor=1e308),
        TutelCapacity(alignment=10**12),
        AffinityThreshold(threshold=1.0, factor=1e308),
        AffinityThreshold(minimum=10**12),
    ],
    ids=str,
)
def test_room_beyond_any_batch_drops_nothing_and_takes_no_memory(policy: CapacityPolicy, backend: str) -> None:
    torch.manual_seed(0)
    plain = MoE(8, 4, 3, router=TopK(k=2), backend=backend)
    roomy = MoE(8, 4, 3, router=TopK(k=2), capacity=policy, backend=backend)
    roomy.load_state_dict(plain.state_dict())
    x_TD = torch.randn(11, 8, dtype=torch.float64)
    out = roomy.double()(x_TD)
    assert not out.stats.dropped_capacity_E.any()
    assert not out.stats.dropped_policy_E.any()
    assert error(out.y, plain.double()(x_TD).y) < 1e-14
