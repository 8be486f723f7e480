"""Which experts a batch touches, and where their weights lie: on devices, or in host memory behind a link."""

from dataclasses import dataclass
from math import exp, lgamma, log, log1p

from turnout.errors import ConfigError
from turnout.topology import Device, Link

GB = 1e9
# One direction of the link between a device and its host, as the data sheets count it: an upper bound.
# V100, A100, H100, B200 and MI300X data sheets: PCIe 3, 4, 5, 5 and 5, 16 lanes; GB200: NVLink-C2C.
HOST_LINKS = {
    "volta": Link(bytes_per_s=16 * GB),
    "ampere": Link(bytes_per_s=32 * GB),
    "hopper": Link(bytes_per_s=64 * GB),
    "blackwell": Link(bytes_per_s=64 * GB),
    "cdna3": Link(bytes_per_s=64 * GB),
}
COHERENT = {"GB200": Link(bytes_per_s=450 * GB), "GB300": Link(bytes_per_s=450 * GB)}


@dataclass(frozen=True, kw_only=True)
class Offload:
    """Experts kept in host memory and fetched when a token asks for them."""

    cached: int = 0  # experts of a layer that a device keeps; 0: all of its own
    hit_rate: float = 0.0  # share of touched experts found on the device; 0: that of a cache blind to the load
    host_bytes_per_s: float = 0.0  # from host to one device; 0: that of the device's data sheet

    def __post_init__(self) -> None:
        if self.cached < 0:
            raise ConfigError(f"offload.cached={self.cached} must be at least 0; nearest legal: 0")
        if not 0 <= self.hit_rate <= 1:
            near = min(1.0, max(0.0, self.hit_rate))
            raise ConfigError(f"offload.hit_rate={self.hit_rate} must be in 0..1; nearest legal: {near:g}")
        if not 0 <= self.host_bytes_per_s < float("inf"):
            raise ConfigError(f"offload.host_bytes_per_s={self.host_bytes_per_s} must be at least 0; nearest legal: 0")

    def resident_share(self, local: float) -> float:
        """Share of a device's `local` experts of a layer whose weights it keeps."""
        return min(1.0, self.cached / local) if self.cached else 1.0

    def missed(self, touched: float, local: float) -> float:
        """Experts of `touched` that are fetched; routing that is uniform finds as many as there are kept."""
        kept = self.resident_share(local)
        return 0.0 if kept == 1.0 else touched * (1 - (self.hit_rate or kept))

    def link(self, device: Device) -> Link:
        """From host memory to a device.

        Raises: ConfigError where the data sheet's is not known and nothing says it.
        """
        if self.host_bytes_per_s:
            return Link(bytes_per_s=self.host_bytes_per_s)
        for name, link in COHERENT.items():
            if device.name.startswith(name):
                return link
        if device.generation not in HOST_LINKS:
            raise ConfigError(f"offload.host_bytes_per_s=0: the host link of {device.name} is not known; give it")
        return HOST_LINKS[device.generation]


def touched(num_experts: int, top_k: int, tokens: float) -> float:
    """Expected distinct experts that `tokens` tokens touch: E (1 - (1 - k/E)^n), every set of k as likely."""
    return num_experts * (1 - (1 - top_k / num_experts) ** tokens)


def touched_at_busiest(num_experts: int, top_k: int, tokens: float, ranks: int) -> float:
    """Expected experts touched on the rank that has most of them, of `ranks` that hold as many experts each.

    An expert is touched with p = 1 - (1 - k/E)^n; ranks count theirs as binomials, taken as independent: E[max] = sum
    over j of 1 - P(one rank has at most j)^ranks. Some rank has at least one, and no fewer than the mean.
    """
    local, mean = round(num_experts / ranks), touched(num_experts, top_k, tokens) / ranks
    most, below = 0.0, 0.0
    for count in range(local if ranks > 1 else 0):
        below += _binomial(local, count, mean / local)
        most += 1 - min(1.0, below) ** ranks
    return min(local, tokens * top_k, max(most, mean, 1.0))


def _binomial(trials: int, count: int, share: float) -> float:
    """Probability of `count` successes; by logarithms, for a layer may have thousands of experts."""
    if share >= 1:
        return float(count == trials)
    ways = lgamma(trials + 1) - lgamma(count + 1) - lgamma(trials - count + 1)
    return exp(ways + count * log(share) + (trials - count) * log1p(-share))
