"""The device-level balance loss of DeepSeekMoE: devices, not experts, get the same load."""

from dataclasses import dataclass

from torch import Tensor

from turnout.contracts import Loss, RouterConfig
from turnout.errors import ConfigError
from turnout.losses.load_balance import load_balance_loss
from turnout.placement import Site
from turnout.tensors import Admission, LossTerm, RouterOutput


def device_size(num_experts: int, groups: int) -> int:
    """Experts on each of `groups` devices; expert e stands on device e // size.

    Raises: ConfigError unless the devices hold equal numbers.
    """
    if num_experts % groups:
        legal = [n for n in range(1, num_experts + 1) if num_experts % n == 0]
        raise ConfigError(
            f"groups={groups} of a balance loss over devices must divide num_experts={num_experts}; legal: {legal}"
        )
    return num_experts // groups


def check_devices(name: str, groups: int, num_experts: int) -> None:
    """Raises: ConfigError if the loss would be a constant, or the devices do not hold equal numbers of experts."""
    if groups == 1:
        raise ConfigError(
            f"{name}.groups=1 makes the loss a constant: one device alone is always balanced; set groups to the number "
            f"of devices that num_experts={num_experts} stand on, or use load_balance, which is over experts"
        )
    device_size(num_experts, groups)


def are_devices(groups: int, site: Site) -> bool:
    """Whether the groups of a balance loss are the ranks of a layout, or its nodes; true where nothing travels."""
    units = {site.placement.ranks: 1, site.nodes: site.node_size}
    return site.placement.ranks == 1 or (groups in units and site.spread(groups, units[groups]) == 1)


def sum_by_device(value_E: Tensor, groups: int) -> Tensor:
    """Each device's experts added up, along the last axis.

    Shapes: value_E (..., E); returns (..., groups).
    Raises: ConfigError unless the devices hold equal numbers of experts.
    """
    return value_E.unflatten(-1, (groups, device_size(value_E.shape[-1], groups))).sum(dim=-1)


@Loss.TABLE.register("device_balance")
@dataclass(frozen=True, kw_only=True)
class DeviceBalance(Loss):
    """sum_i f'_i P'_i over devices: f'_i the mean of f_e over the device's experts, P'_i the sum of their P_e.

    As f'_i is D times the device's share of the choices, it is the load-balance loss with devices in the place of
    experts: 1 when devices are balanced, whatever their experts.
    Load is counted over the micro-batch: other with more micro-batches or ranks (docs/layers.md).
    Source: Dai et al. 2024 (DeepSeekMoE), arXiv:2401.06066, eq. 15-17; DeepSeek-AI 2024, arXiv:2405.04434, eq. 26-28,
        whose alpha_2 is the coefficient.
    """

    coefficient: float = 0.05  # weight of the term in the total loss
    groups: int = 1  # devices, with equal numbers of neighbouring experts; at least 2: one alone is always balanced

    def __post_init__(self) -> None:
        if not self.coefficient >= 0:
            raise ConfigError(f"device_balance.coefficient={self.coefficient} must be at least 0")
        if self.groups < 1:
            raise ConfigError(f"device_balance.groups={self.groups} must be at least 1")

    def check_own(self, router: RouterConfig, num_experts: int) -> None:
        """Raises: ConfigError if the groups do not divide the experts, or are one: the loss would be a constant."""
        del router
        check_devices("device_balance", self.groups, num_experts)

    def remark(self, site: Site) -> str:
        """Devices that are parts of a rank are balanced like ranks; those that lie on two ranks are not."""
        ranks = site.spread(self.groups)
        if ranks == 1 or are_devices(self.groups, site):
            return ""
        return (
            f"device_balance.groups={self.groups}: the experts of one device lie on {ranks} ranks of this layout, "
            f"whose loads may differ; groups={site.placement.ranks} are its ranks"
        )

    def term(
        self, routing: RouterOutput, admission: Admission, *, sequence_length: int, step_stats: object = None
    ) -> LossTerm:
        """Counts every choice made, dropped or not.

        Raises: ConfigError if the groups do not divide the experts.
        """
        del admission, sequence_length, step_stats
        counts = sum_by_device(routing.assignment.counts_E, self.groups)
        value = load_balance_loss(sum_by_device(routing.scores_RE, self.groups), counts)
        return LossTerm(name="device_balance", value=value, coefficient=self.coefficient, scope="micro_batch")
