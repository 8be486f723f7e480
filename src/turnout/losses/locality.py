"""The locality loss of LocMoE: draws a node's tokens to the experts that stand on that node."""

from dataclasses import dataclass

import torch
from torch import Tensor

from turnout.contracts import Loss
from turnout.errors import ConfigError, ShapeError
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


@Loss.TABLE.register("locality")
@dataclass(frozen=True, kw_only=True)
class Locality(Loss):
    """Locality loss over the micro-batch of one node.

    Node i holds the experts from i * experts_per_node on, as neighbours: for experts spread evenly over a mesh of
    (node, device), experts_per_node is num_experts / nodes and `node` is this process's place on the node axis, so
    each node's processes get settings of their own. All tokens of a call count as that node's.

    The local distribution has 1 - epsilon evenly on the node's experts and epsilon evenly on the others: our reading,
    for the paper's wholly local one would make the loss infinite.
    Source: Li et al. 2024, arXiv:2401.13920; epsilon and coefficient, which the paper does not give, are ours.
    """

    coefficient: float = 0.01  # weight of the term in the total loss, the paper's mu
    experts_per_node: int = 1  # experts that stand on one node
    node: int = 0  # this node, counting from 0
    epsilon: float = 0.05  # share of the tokens that may leave the node at no loss

    def __post_init__(self) -> None:
        for name, is_legal, legal in (
            ("coefficient", self.coefficient >= 0, "at least 0"),
            ("experts_per_node", self.experts_per_node >= 1, "at least 1"),
            ("node", self.node >= 0, "at least 0"),
            ("epsilon", 0 < self.epsilon < 1, "between 0 and 1"),
        ):
            if not is_legal:
                raise ConfigError(f"locality.{name}={getattr(self, name)} must be {legal}")

    def term(
        self, routing: RouterOutput, admission: Admission, *, sequence_length: int, step_stats: object = None
    ) -> LossTerm:
        """Raises: ConfigError if the layer has no experts on that node."""
        del admission, sequence_length, step_stats
        return LossTerm(
            name="locality",
            value=locality_loss(routing.scores_RE, self.local_distribution(routing.scores_RE)),
            coefficient=self.coefficient,
            scope="micro_batch",
        )

    def local_distribution(self, scores_RE: Tensor) -> Tensor:
        """D_l in the dtype and on the device of the scores; uniform where one node holds every expert.

        Shapes: scores_RE (R, E); returns (E,), above 0, sums to 1.
        Raises: ConfigError if the layer has no experts on that node.
        """
        num_experts, num_local = scores_RE.shape[1], self.experts_per_node
        first = self.node * num_local
        if first + num_local > num_experts:
            raise ConfigError(
                f"locality: node={self.node} would hold experts {first} to {first + num_local - 1} at "
                f"experts_per_node={num_local}; num_experts={num_experts}"
            )
        if num_local == num_experts:
            return scores_RE.new_full((num_experts,), 1 / num_experts)
        local_E = scores_RE.new_full((num_experts,), self.epsilon / (num_experts - num_local))
        local_E[first : first + num_local] = (1 - self.epsilon) / num_local
        return local_E
