"""The locality loss of LocMoE: draws a node's tokens to the experts that stand on that node."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from turnout.config import is_whole
from turnout.contracts import Loss, RouterConfig
from turnout.errors import ConfigError, ShapeError
from turnout.placement import Site
from turnout.tensors import Admission, LossTerm, RouterOutput


def locality_loss(scores_RE: Tensor, local_E: Tensor) -> Tensor:
    """KL(D_c || D_l) of the tokens' mean score D_c and the local distribution D_l; 0 with no tokens.

    That D_c is the mean score, which makes it differentiable, is our reading: the paper says only that it is the
    current distribution over experts.

    Shapes: scores_RE (R, E), rows sum to 1; local_E (E,), above 0, sums to 1; returns ().
    Raises: ShapeError if the two disagree on E.
    Source: Li et al. 2024, arXiv:2401.13920, the locality loss (without mu).
    """
    num_routed, num_experts = scores_RE.shape
    if local_E.shape != (num_experts,):
        raise ShapeError(f"local_E has shape {tuple(local_E.shape)}; scores_RE needs ({num_experts},)")
    current_E = scores_RE.sum(dim=0) / max(num_routed, 1)
    # an expert of share 0 adds 0; bounded, its log and the gradient of that stay finite
    least = torch.finfo(current_E.dtype).tiny
    return (current_E * (current_E.clamp(min=least).log() - local_E.log())).sum()


def local_distribution(scores_RE: Tensor, local: Sequence[int], epsilon: float) -> Tensor:
    """D_l: 1 - epsilon evenly on the experts `local`, in rising order, epsilon evenly on the others.

    In the dtype and on the device of the scores.
    Shapes: scores_RE (R, E) with E above len(local); returns (E,), above 0, sums to 1.
    Source: Li et al. 2024, arXiv:2401.13920; epsilon is ours, for with all on local experts the loss would be infinite.
    """
    num_experts, num_local = scores_RE.shape[1], len(local)
    local_E = scores_RE.new_full((num_experts,), epsilon / (num_experts - num_local))
    # slices: an index would be copied to the device, which the host waits for
    for first, stop in _runs(local):
        local_E[first:stop] = (1 - epsilon) / num_local
    return local_E


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of each run of neighbours, in order."""
    there = set(numbers)
    starts = [number for number in numbers if number - 1 not in there]
    stops = [number + 1 for number in numbers if number + 1 not in there]
    return zip(starts, stops, strict=True)


@Loss.TABLE.register("locality")
@dataclass(frozen=True, kw_only=True)
class Locality(Loss):
    """Locality loss of one call: its tokens are drawn to the experts on the node of the rank that has them.

    Which experts those are the layout says: `parallel.apply` gives every rank the loss of its own place, from the
    placement of the experts and the ranks of a node. Where no expert is on another node the loss is 0, with a gradient
    of 0: nothing could be nearer, and to spread tokens over experts is for a balance loss. So it is in one process too,
    where a model is built before it is laid out on many; `parallel.apply` says so once.

    `local` simulates a node in one process; where ranks share a model it is refused, for all would be on that node.
    D_c is of the tokens of one call on one rank: the mean over a node's ranks is at least the divergence of all their
    tokens together, for the divergence is convex, and equal where they route alike.
    Source: Li et al. 2024, arXiv:2401.13920; epsilon and coefficient, which the paper does not give, are ours.
    """

    coefficient: float = 0.01  # weight of the term in the total loss, the paper's mu
    local: tuple[int, ...] = ()  # experts of a node to simulate in one process; empty: those the layout puts near
    epsilon: float = 0.05  # share of the tokens that may leave the node at no loss

    def __post_init__(self) -> None:
        for name, is_legal, legal in (
            ("coefficient", self.coefficient >= 0, "at least 0"),
            ("local", _rises(self.local), "a tuple of experts in rising order, counted from 0"),
            ("epsilon", 0 < self.epsilon < 1, "between 0 and 1"),
        ):
            if not is_legal:
                raise ConfigError(f"locality.{name}={getattr(self, name)!r} must be {legal}")

    def check_own(self, router: RouterConfig, num_experts: int) -> None:
        """Raises: ConfigError if the layer has not all of the experts `local`, or no others."""
        del router
        if self.local and self.local[-1] >= num_experts:
            raise ConfigError(
                f"locality.local={list(self.local)} names expert {self.local[-1]}; num_experts={num_experts}, so legal "
                f"are 0 to {num_experts - 1}"
            )
        if len(self.local) == num_experts:
            raise ConfigError(
                f"locality.local={list(self.local)} are all experts of the layer, which makes the loss 0; leave some "
                "to another node, or leave the loss out"
            )

    def placed(self, site: Site) -> "Locality":
        """Raises: ConfigError if a node is simulated: ranks that share a model stand on nodes of their own."""
        if self.local:
            raise ConfigError(
                f"locality.local={list(self.local)} simulates a node in one process; on several ranks the layout says "
                "which experts are near: leave it out, local=()"
            )
        return replace(self, local=site.near)

    def remark(self, site: Site) -> str:
        if self.local or len(site.near) < site.placement.num_experts:
            return ""
        return (
            f"the locality loss is 0: all {len(site.near)} experts of a layer are on one node, so no token can leave it"
        )

    def term(
        self, routing: RouterOutput, admission: Admission, *, sequence_length: int, step_stats: object = None
    ) -> LossTerm:
        """Counts every token of the call, whatever is dropped later."""
        del admission, sequence_length, step_stats
        return LossTerm(
            name="locality", value=self._value(routing.scores_RE), coefficient=self.coefficient, scope="micro_batch"
        )

    def _value(self, scores_RE: Tensor) -> Tensor:
        if len(self.local) in (0, scores_RE.shape[1]):
            return 0 * scores_RE.sum()
        return locality_loss(scores_RE, local_distribution(scores_RE, self.local, self.epsilon))


def _rises(experts: tuple[int, ...]) -> bool:
    """Whether they are whole numbers from 0 on, each above the one before."""
    if not isinstance(experts, tuple) or not all(is_whole(expert) for expert in experts):
        return False
    return list(experts) == sorted(set(experts)) and min(experts, default=0) >= 0
