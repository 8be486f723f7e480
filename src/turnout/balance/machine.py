"""What rows and experts cost on a machine: one that was measured, or one that is described."""

from dataclasses import dataclass

from turnout.balance.cost import Prices
from turnout.plan.parameters import fitted
from turnout.topology import Cluster, Link

PASSES = 3  # a backward pass computes twice what the forward one does


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Ranks that compute, and links between them."""

    flops_per_s: float  # of a rank's experts
    intra: Link  # a rank to the others of its node
    inter: Link  # a rank to those of other nodes
    shares_card: bool = False  # ranks of a node have one card between them, and `inter` is a rank's part of its rate

    @classmethod
    def of(cls, cluster: Cluster, precision: str, *, nodes: int) -> "Machine":
        """A described cluster, at the rate that the planner's fit gives its products of experts.

        Raises: ConfigError if the device does not compute in that precision.
        """
        fit, device = fitted(), cluster.device
        rate = device.flops_per_s(precision) * fit.gemm(device.generation) * fit.grouped
        # rows go straight to any place of another node
        crossing = 1 - 1 / cluster.devices_per_node
        return cls(flops_per_s=rate, intra=cluster.alltoall_intra(), inter=cluster.inter_over(nodes, crossing))


@dataclass(frozen=True, kw_only=True)
class ExpertShape:
    """The experts of a layer."""

    dim: int  # that they work in
    hidden: int  # of one expert, all slices of it
    gated: bool
    element_bytes: float  # of a row on the wire

    @property
    def params(self) -> int:
        """Weights of one expert, without biases."""
        return (3 if self.gated else 2) * self.dim * self.hidden

    def prices(self, machine: Machine, *, expert_bytes: float, period: int, gradient_bytes: float = 0.0) -> Prices:
        """`expert_bytes`: that a rank has of an expert; `period`: steps that a move must pay for itself in;
        `gradient_bytes`: that copies of an expert exchange in a step.
        """
        return Prices(
            row_s=2 * PASSES * self.params / machine.flops_per_s,
            row_bytes=self.dim * self.element_bytes,
            expert_bytes=expert_bytes,
            gradient_bytes=gradient_bytes,
            intra=machine.intra,
            inter=machine.inter,
            period=period,
            shares_card=machine.shares_card,
        )
