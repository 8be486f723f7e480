"""Capacity policies and losses of the tables by the papers' formulas."""

import torch
from torch import Tensor

from tests.contracts import paper_capacities, paper_losses
from tests.contracts.paper_capacities import Entry
from turnout import reference
from turnout.contracts import CapacityPolicy, Loss
from turnout.dispatch import AffinityThreshold, FixedCapacity, TutelCapacity
from turnout.losses import (
    CommunicationBalance,
    DeviceBalance,
    Entropy,
    Importance,
    LoadBalance,
    LoadCV,
    Locality,
    RouterZ,
)
from turnout.tensors import Assignment, RouterOutput


def kept_by(policy: CapacityPolicy, given: Assignment, *, training: bool, generator: torch.Generator) -> list[bool]:
    """Which of the assignments the policy of the paper sends, given what their tokens weigh."""
    entries, least = entries_of(given, generator), 0 if given.least_capacity is None else int(given.least_capacity)
    match policy:
        case FixedCapacity():
            keep = paper_capacities.fixed(
                entries,
                given.num_experts,
                factor=policy.factor if training else policy.eval_factor or policy.factor,
                minimum=policy.minimum,
                group_size=policy.group_size,
                priority=policy.priority,
                least=least,
            )
        case TutelCapacity():
            keep = paper_capacities.tutel(
                entries,
                given.num_experts,
                factor=policy.factor,
                alignment=policy.alignment,
                priority=policy.priority,
                least=least,
            )
        case AffinityThreshold():
            keep = paper_capacities.affinity(
                entries,
                given.num_experts,
                threshold=policy.threshold,
                minimum=policy.minimum,
                factor=policy.factor,
                least=least,
            )
        case _:
            keep = [True] * len(entries)
    return [sent and not entry.declined for sent, entry in zip(keep, entries, strict=True)]


def entries_of(given: Assignment, generator: torch.Generator) -> list[Entry]:
    num_choices = len(given.token_N)
    priority_N = given.weight_N if given.priority_N is None else given.priority_N
    declined_N = torch.zeros(num_choices, dtype=torch.bool) if given.declined_N is None else given.declined_N
    draw_N = torch.rand(num_choices, generator=generator, dtype=torch.float32)
    columns = (given.token_N, given.expert_N, given.choice_N, priority_N.detach(), draw_N, declined_N)
    return [
        Entry(token=t, expert=e, choice=c, priority=p, draw=d, declined=gone)
        for t, e, c, p, d, gone in zip(*(column.tolist() for column in columns), strict=True)
    ]


def loss_of_paper(loss: Loss, routing: RouterOutput, length: int) -> Tensor:
    """The value of a loss of the table on that routing; `length` tokens are a sequence."""
    scores_RE, given = routing.scores_RE, routing.assignment
    match loss:
        case RouterZ():
            return reference.z_loss(routing.logits_RE)
        case Entropy():
            return paper_losses.entropy(scores_RE)
        case Importance():
            return paper_losses.importance(scores_RE, given, loss.of)
        case DeviceBalance():
            return paper_losses.device_balance(scores_RE, given, loss.groups)
        case CommunicationBalance():
            return paper_losses.communication_balance(scores_RE, given, loss.groups, loss.top_groups)
        case LoadCV():
            assert routing.smooth_load_E is not None
            return paper_losses.load_cv(routing.smooth_load_E)
        case Locality():
            return paper_losses.locality(scores_RE, loss.local, loss.epsilon)
        case LoadBalance():
            return load_balance(loss, routing, length)
    raise AssertionError(f"no formula of {loss} is known here")


def load_balance(loss: LoadBalance, routing: RouterOutput, length: int) -> Tensor:
    """Over all tokens, or sequence by sequence, each weighed by its share of them."""
    given = routing.assignment
    counts = given.choice_N >= 0 if loss.count == "all" else given.choice_N == 0
    span = length if loss.scope == "sequence" else max(given.num_tokens, 1)
    value = routing.scores_RE.sum() * 0
    for sequence in sorted({token // span for token in routing.token_R.tolist()}):
        own_R, own_N = routing.token_R // span == sequence, given.token_N // span == sequence
        share = int(own_R.sum()) / len(routing.token_R)
        chosen = given.expert_N[own_N & counts]
        value = value + share * reference.load_balance(routing.scores_RE[own_R], chosen[:, None])
    return value
