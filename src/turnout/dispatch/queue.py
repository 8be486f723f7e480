"""The queues before the experts: in which order assignments come, and the place each of them gets."""

from typing import Literal

import torch
from torch import Tensor

from turnout.contracts import RouterConfig
from turnout.errors import ConfigError
from turnout.tensors import Assignment

Priority = Literal["position", "score", "random"]
InDecoder = Literal["refuse", "allow"]


def arrival_order(
    assignment: Assignment, priority: Priority = "position", generator: torch.Generator | None = None
) -> Tensor:
    """The assignments as experts take them: first choices of all tokens, then second choices, and so on.

    Within one choice: `position`, by token; `score`, the token with the highest best priority first, of equals the
    earlier one; `random`, by one draw for each assignment, in training and evaluation alike.

    Shapes: returns (N,) int64, indices into the assignments.
    Source: position: Lepikhin et al. 2020, arXiv:2006.16668, section 2.2; score: batch prioritised routing, Riquelme
        et al. 2021, arXiv:2106.05974, section 4; random: random token selection, Kim et al. 2021, arXiv:2109.10465,
        whose code (DeepSpeed, top1gating) has first choices alone.
    """
    order_N = _by_position(assignment)
    if priority == "position":
        return order_N
    if priority == "score":
        rank_N = _best_by_token(assignment)[assignment.token_N]
    else:
        device = assignment.token_N.device
        # one draw for each assignment, none for padding, which must not change what real tokens get
        rank_N = torch.rand(len(order_N), dtype=torch.float32, device=device, generator=generator)
    order_N = _best_first(order_N, rank_N)
    return order_N[assignment.choice_N[order_N].argsort(stable=True)]


def order_by_priority(assignment: Assignment) -> Tensor:
    """The assignments by their own priority, highest first, whichever choice they are; of equals the earlier arrival.

    Shapes: returns (N,) int64, indices into the assignments.
    """
    return _best_first(_by_position(assignment), priorities(assignment))


def priorities(assignment: Assignment) -> Tensor:
    """What a capacity by score keeps first, without a gradient: the router's priority, or else its weights.

    Shapes: returns (N,).
    """
    given_N = assignment.weight_N if assignment.priority_N is None else assignment.priority_N
    return given_N.detach()


def overtaken_by(priority: Priority, router: RouterConfig) -> str:
    """Which rows of later tokens come before an earlier token's in such a queue; empty: none."""
    if priority == "position":
        # where one choice is all there is, tokens queue as they stand
        return "" if router.exact_choices and router.choices == 1 else "first choices"
    return "rows of higher score" if priority == "score" else "rows drawn before it"


def refuse_in_decoder(policy: str, in_decoder: InDecoder, *, overtaken: str, instead: str) -> None:
    """Raises: ConfigError if later tokens' rows overtake a token's, unless `in_decoder` allows it."""
    if overtaken and in_decoder == "refuse":
        raise ConfigError(
            f"{policy} lets what is sent of a token depend on later tokens in evaluation: their {overtaken} take its "
            f"place; {instead}, or set capacity.in_decoder='allow' if you want that"
        )


def queue_position(assignment: Assignment, queue_N: Tensor, num_queues: int, arrival_N: Tensor | None = None) -> Tensor:
    """Place of each assignment in its queue, counting from 0, in the order of arrival (None: by choice, then token).

    Shapes: queue_N (N,) int64 in [0, num_queues); arrival_N (N,) int64, a permutation; returns (N,) int64.
    """
    if arrival_N is None:
        arrival_N = _by_position(assignment)
    queue_sorted_N, order_N = queue_N[arrival_N].sort(stable=True)
    start_by_queue = torch.bincount(queue_N, minlength=num_queues).cumsum(0).roll(1)
    start_by_queue[:1] = 0
    place_N = torch.arange(len(queue_N), device=queue_N.device) - start_by_queue[queue_sorted_N]
    return torch.empty_like(queue_N).index_copy_(0, arrival_N[order_N], place_N)


def _by_position(assignment: Assignment) -> Tensor:
    if assignment.top_k is not None:
        index_N = torch.arange(len(assignment.token_N), device=assignment.token_N.device)
        return index_N.view(-1, assignment.top_k).t().reshape(-1)
    return (assignment.choice_N * assignment.num_tokens + assignment.token_N).argsort(stable=True)


def _best_first(order_N: Tensor, rank_N: Tensor) -> Tensor:
    return order_N[rank_N[order_N].argsort(descending=True, stable=True)]


def _best_by_token(assignment: Assignment) -> Tensor:
    rank_N = priorities(assignment)
    lowest_T = rank_N.new_full((assignment.num_tokens,), -torch.inf)
    return lowest_T.scatter_reduce(0, assignment.token_N, rank_N, reduce="amax")
