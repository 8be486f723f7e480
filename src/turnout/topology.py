"""What a training job runs on: links, devices, a cluster of nodes, and ranks laid out on nodes."""

from dataclasses import dataclass, fields, replace
from math import ceil, prod
from typing import Literal

from turnout.errors import ConfigError
from turnout.registry import nearest


@dataclass(frozen=True, kw_only=True)
class Link:
    """What one device can send over one tier of the network: m bytes in latency_s + m / bytes_per_s.

    So a message of m bytes reaches m / (m + half_bytes) of the bandwidth. Source: Hockney 1994, Parallel Computing 20,
    The communication challenge for MPP (r_inf and n_1/2); nccl-tests' bus bandwidth.
    """

    bytes_per_s: float  # one way, per device, as a large transfer sees it
    latency_s: float = 0.0  # of one message, from call to arrival

    def __post_init__(self) -> None:
        _require(self.bytes_per_s > 0, "link.bytes_per_s", self.bytes_per_s, "above 0")
        _require(self.latency_s >= 0, "link.latency_s", self.latency_s, "at least 0")

    @property
    def half_bytes(self) -> float:
        """Size of the message that reaches half of the bandwidth."""
        return self.latency_s * self.bytes_per_s

    def time_s(self, sent_bytes: float, messages: float) -> float:
        """Seconds to send `sent_bytes` cut into `messages` one after the other."""
        return self.latency_s * messages + sent_bytes / self.bytes_per_s


@dataclass(frozen=True, kw_only=True)
class PeakFlops:
    """Dense peak of a device in FLOP/s by precision of the operands; 0 where the hardware has none."""

    fp32: float = 0.0  # on the matrix unit (tf32 on NVIDIA)
    fp16: float = 0.0
    bf16: float = 0.0
    fp8: float = 0.0
    fp4: float = 0.0

    def at_power(self, share: float) -> "PeakFlops":
        """The peak a device sustains when it is held to that share of the power it is designed for.

        Power of switching goes as voltage squared times frequency, and voltage with frequency, so frequency as the cube
        root of power. Source: Rabaey, Chandrakasan and Nikolic 2003, Digital Integrated Circuits, section 5.5.
        """
        clock = share ** (1 / 3)
        return PeakFlops(**{field.name: clock * getattr(self, field.name) for field in fields(self)})


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator."""

    name: str
    generation: str  # the key of fitted efficiencies: volta, ampere, hopper, blackwell, cdna3, tpu, ascend
    peak_flops_per_s: PeakFlops  # dense, without sparsity
    memory_bytes: float  # as the data sheet counts (10^9 a GB)
    memory_bytes_per_s: float
    units: int = 0  # streaming multiprocessors or cores that a communication kernel can take; 0 where it takes none

    def __post_init__(self) -> None:
        _require(self.memory_bytes > 0, "device.memory_bytes", self.memory_bytes, "above 0")
        _require(self.memory_bytes_per_s > 0, "device.memory_bytes_per_s", self.memory_bytes_per_s, "above 0")

    @property
    def usual_precision(self) -> Literal["bf16", "fp16", "fp32"]:
        """What a job here trains in unless it says otherwise."""
        peaks = self.peak_flops_per_s
        return "bf16" if peaks.bf16 else ("fp16" if peaks.fp16 else "fp32")

    def flops_per_s(self, precision: str) -> float:
        """Peak FLOP/s at `precision`.

        Raises: ConfigError if the device cannot compute in it, naming what it can.
        """
        peaks = {field.name: getattr(self.peak_flops_per_s, field.name) for field in fields(PeakFlops)}
        legal = [name for name, peak in peaks.items() if peak > 0]
        if precision not in legal:
            raise ConfigError(
                f"precision={precision!r} is not one {self.name} computes in: {', '.join(legal)}"
                f"{_stands_for(precision, legal)}"
            )
        return peaks[precision]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Equal nodes of equal devices. A node is the scale-up domain: 8 devices of a DGX, 72 of an NVL72, a torus pod."""

    name: str
    device: Device
    devices_per_node: int  # of the scale-up domain, which may be many hosts
    intra: Link  # a device to the others of its node
    inter: Link  # a device's share of the node's network cards
    oversubscription: float = 1.0  # how many times less bandwidth there is above the leaf than below it
    nodes_per_leaf: int = 0  # nodes that reach each other below the oversubscribed tier; 0: all
    rails: bool = True  # device i of every node hangs on leaf i, so only equal places meet below the spine
    torus: tuple[int, ...] = ()  # devices along each dimension of the scale-up domain; empty for switches
    usd_per_device_hour: float = 0.0  # rent; 0 where unknown
    device_watt: float = 0.0  # of the device alone; 0 where unknown
    host_watt: float = 0.0  # of the rest of the node, per device; 0 where unknown
    alltoall_share: float = 1.0  # of intra.bytes_per_s that an all-to-all reaches on switches; gathers reach all
    network_usd_per_device: float = 0.0  # network cost per endpoint; 0 where unknown
    sources: tuple[str, ...] = ()  # where the numbers are from

    def __post_init__(self) -> None:
        _require(self.devices_per_node >= 1, "cluster.devices_per_node", self.devices_per_node, "at least 1")
        _require(self.oversubscription >= 1, "cluster.oversubscription", self.oversubscription, "at least 1")
        _require(self.nodes_per_leaf >= 0, "cluster.nodes_per_leaf", self.nodes_per_leaf, "at least 0")
        _require(0 < self.alltoall_share <= 1, "cluster.alltoall_share", self.alltoall_share, "above 0 and up to 1")
        for name in ("usd_per_device_hour", "device_watt", "host_watt", "network_usd_per_device"):
            _require(getattr(self, name) >= 0, f"cluster.{name}", getattr(self, name), "at least 0")
        size = prod(self.torus)
        if self.torus and size != self.devices_per_node:
            raise ConfigError(
                f"cluster.torus={list(self.torus)} holds {size} devices; "
                f"cluster.devices_per_node={self.devices_per_node} must be {size}"
            )

    def inter_over(self, nodes: int, crossing: float = 0.0) -> Link:
        """The link between nodes for a group that spans `nodes` of them: slower above the leaf.

        `crossing` is the share of bytes for another place of another node: on rails these go over the spine however
        close the nodes are. Source: Wang et al. 2023, Rail-only, arXiv:2307.12169, section 2.
        """
        if self.nodes_per_leaf == 0:
            return self.inter
        above = 1.0 if nodes > self.nodes_per_leaf else crossing * self.rails
        slower = max(1.0, above * self.oversubscription)
        return replace(self.inter, bytes_per_s=self.inter.bytes_per_s / slower)

    def alltoall_intra(self, ranks: int = 0) -> Link:
        """The link inside a node for an all-to-all of `ranks` neighbours, 0 for the whole node.

        On switches pieces travel once, at the cluster's share of the link; on a torus a quarter of the ring in every
        dimension. Each byte takes L/4 hops in the longest dimension L, over the two links a device has in it, so a
        device sends at most 8 w / L, w one way of one link. A part of a torus is taken as a cube that wraps.
        """
        if not self.torus:
            return replace(self.intra, bytes_per_s=self.alltoall_share * self.intra.bytes_per_s)
        dimensions = len(self.torus)
        longest = min(max(self.torus), ceil((ranks or self.devices_per_node) ** (1 / dimensions) - 1e-9))
        if ranks in (0, self.devices_per_node):
            longest = max(self.torus)
        reached = 8 * self.intra.bytes_per_s / (2 * dimensions) / longest
        return replace(self.intra, bytes_per_s=min(self.intra.bytes_per_s, reached))


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Ranks of a job or a group on nodes: rank = node * local + place within the node."""

    nodes: int  # nodes the ranks are on
    local: int = 1  # ranks on each of them

    def __post_init__(self) -> None:
        _require(self.nodes >= 1, "mesh.nodes", self.nodes, "at least 1")
        _require(self.local >= 1, "mesh.local", self.local, "at least 1")

    @property
    def size(self) -> int:
        return self.nodes * self.local

    def place(self, rank: int) -> tuple[int, int]:
        """(node, local) of a rank. Raises: ConfigError if the mesh has no such rank."""
        if not 0 <= rank < self.size:
            raise ConfigError(f"rank={rank} must be in 0..{self.size - 1}")
        return divmod(rank, self.local)

    def rank(self, node: int, local: int) -> int:
        """The rank at (node, local). Raises: ConfigError if the mesh has no such place."""
        if not (0 <= node < self.nodes and 0 <= local < self.local):
            raise ConfigError(f"(node={node}, local={local}) must be below ({self.nodes}, {self.local})")
        return node * self.local + local


def mesh_of(world: int, devices_per_node: int) -> Mesh:
    """`world` ranks on full nodes, or on a part of one.

    Raises: ConfigError if the last node would be uneven, naming the nearest world that fits.
    """
    _require(world >= 1, "world", world, "at least 1")
    if world <= devices_per_node:
        return Mesh(nodes=1, local=world)
    nodes, rest = divmod(world, devices_per_node)
    if rest:
        nearest_world = devices_per_node * (nodes + (2 * rest > devices_per_node))
        raise ConfigError(
            f"world={world} leaves {rest} ranks on the last node of {devices_per_node}; nearest legal: {nearest_world}"
        )
    return Mesh(nodes=nodes, local=devices_per_node)


# by the bits of an element, and of two alike in these by their range
_WIDENING = ("fp4", "fp8", "bf16", "fp16", "fp32")


def _stands_for(precision: str, legal: list[str]) -> str:
    """The legal precision that is nearest in width, the wider of two; of a word that is none the likest in spelling."""
    if precision not in _WIDENING:
        return nearest(precision, legal)
    place = _WIDENING.index(precision)
    near = min(legal, key=lambda name: (abs(_WIDENING.index(name) - place), -_WIDENING.index(name)))
    return f"; nearest legal: {near}"


def _require(holds: bool, field: str, value: float, words: str) -> None:
    if not holds:
        raise ConfigError(f"{field}={value} must be {words}")
