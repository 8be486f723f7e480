"""What a step, a token and a run cost in dollars and energy; nothing where the machine's description does not say."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from turnout.errors import ConfigError
from turnout.topology import Cluster


@dataclass(frozen=True, kw_only=True)
class Bill:
    """Rent and energy of all devices. None: the cluster gives no price or no power, or no run was asked about."""

    usd_per_device_hour: float | None  # rent
    usd_per_step: float | None
    usd_per_million_tokens: float | None
    network_usd_per_device: float | None  # what the network costs to buy, per endpoint
    network_usd: float | None  # the same for the whole job
    kilowatt: float | None  # devices and their hosts at the power of their data sheets
    joules_per_token: float | None
    run_tokens: float | None
    run_s: float | None
    run_usd: float | None
    run_mwh: float | None  # energy of the run, megawatt-hours

    def to_json(self) -> dict[str, Any]:
        """As `plan time --json` prints it."""
        return asdict(self)


def bill(
    cluster: Cluster,
    *,
    devices: int,
    step_s: float,
    step_tokens: float,
    run_tokens: float = 0.0,
) -> Bill:
    """The bill of `devices` whose step of `step_tokens` takes `step_s`; `run_tokens` 0 asks about no run.

    Raises: ConfigError for a number of tokens below 0.
    """
    _require_amount("run_tokens", run_tokens)
    price = cluster.usd_per_device_hour or None
    watt = devices * (cluster.device_watt + cluster.host_watt) if cluster.device_watt else None
    steps = run_tokens / step_tokens if run_tokens else None
    step_usd = None if price is None else price * devices * step_s / 3600
    network = cluster.network_usd_per_device or None
    return Bill(
        usd_per_device_hour=price,
        usd_per_step=step_usd,
        usd_per_million_tokens=_times(step_usd, 1e6 / step_tokens),
        network_usd_per_device=network,
        network_usd=_times(network, devices),
        kilowatt=_times(watt, 1e-3),
        joules_per_token=_times(watt, step_s / step_tokens),
        run_tokens=run_tokens or None,
        run_s=_times(steps, step_s),
        run_usd=_times(steps, step_usd),
        run_mwh=_times(_times(steps, step_s), None if watt is None else watt / 3.6e9),
    )


def priced(cluster: Cluster, usd_per_device_hour: float) -> Cluster:
    """The cluster at that rent; 0 leaves it its own.

    Raises: ConfigError for a price below 0.
    """
    _require_amount("usd_per_device_hour", usd_per_device_hour)
    return replace(cluster, usd_per_device_hour=usd_per_device_hour) if usd_per_device_hour else cluster


def _require_amount(name: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise ConfigError(f"bill.{name}={value} must be at least 0; nearest legal: 0")


def _times(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a * b
