"""The machine that a row in the schema of published_cases.json ran on."""

import re
from dataclasses import replace

from turnout.clusters import CLUSTERS
from turnout.plan.row_fields import Refused, Row, count, number
from turnout.topology import Cluster

# words of a row's `gpu`, the first that is found deciding; not H200 in GH200
_MACHINES = (
    ("GB300", "gb300-nvl72"), ("GB200", "gb200-nvl72"), ("B300", "dgx-b300"), ("B200", "dgx-b200"),
    ("H100-96", "h100-hbm2e"), ("H100-EFA", "aws-p5"), ("H200", "dgx-h200"), ("H100", "dgx-h100"), ("H800", "h800"),
    ("A800", "a800"), (r"A100.*\b40", "dgx-a100-40"), ("A100", "dgx-a100"), ("V100", "dgx2-v100"),
    ("TPU ?v4(?!i)", "tpu-v4"), ("TPU ?v5p", "tpu-v5p"), ("MI300X", "mi300x"), ("910B", "ascend-910b"),
)  # fmt: skip
# of the same name, but with other clocks and links; and half of a TPU's chip
_OTHERS = r"PCI-?e|\bNVL\b|\bcore\b"
# memory that a row gives may differ by so much from the description's: vendors round
_ROUNDING = 0.12
# an all-reduce inside a node below this share of what the link carries did not run on it
NVLINK_IN_USE = 0.5
# of the buffer that runs measured their bandwidths with; not published: 1 GiB taken
TESTED_BYTES = 2**30


def cluster_of(row: Row) -> Cluster:
    """The machine a row ran on. Raises: Refused if no description fits."""
    gpu = str(row.get("gpu"))
    for words, name in () if re.search(_OTHERS, gpu, re.IGNORECASE) else _MACHINES:
        if re.search(f"(?<!G){words}", gpu, re.IGNORECASE) and _has_memory(gpu, CLUSTERS[name]):
            return _measured_fabric(row, CLUSTERS[name])
    raise Refused(f"gpu={gpu!r} has no cluster description; known: {', '.join(CLUSTERS.names())}")


def _has_memory(gpu: str, cluster: Cluster) -> bool:
    """Whether the memory in a device's name, if there is any, is that of the description."""
    said = re.search(r"(\d+) ?GB", gpu, re.IGNORECASE)
    return said is None or abs(float(said[1]) * 1e9 / cluster.device.memory_bytes - 1) < _ROUNDING


def _measured_fabric(row: Row, cluster: Cluster) -> Cluster:
    """The cluster with what a row's own collectives measured, where it says so."""
    inside = number(row, "all_reduce_intra_gb_per_s", 0.0) * 1e9
    if 0 < inside < NVLINK_IN_USE * cluster.intra.bytes_per_s:
        cluster = replace(cluster, intra=replace(cluster.intra, bytes_per_s=inside))
    gathered, summed = (number(row, f"all_{name}_gb_per_s", 0.0) * 1e9 for name in ("gather", "reduce"))
    if not (gathered or summed) or count(row, "gpus") <= cluster.devices_per_node:
        return cluster
    if gathered:
        # most hops of a ring are inside nodes, and where its steps are slow they are slow on both
        hop = _hop_s(row, cluster, gathered)
        intra, inter = (replace(each, latency_s=max(each.latency_s, hop)) for each in (cluster.intra, cluster.inter))
        return replace(cluster, intra=intra, inter=inter)
    # bus bandwidth counts a node's cards together
    card = min(cluster.inter.bytes_per_s, summed / cluster.devices_per_node)
    return replace(cluster, inter=replace(cluster.inter, bytes_per_s=card))


def _hop_s(row: Row, cluster: Cluster, gathered: float) -> float:
    """Seconds of a step of a ring over nodes: what a run's own all-gather took beyond its bytes, step by step."""
    node_bytes_per_s = cluster.inter.bytes_per_s * cluster.devices_per_node
    return TESTED_BYTES / count(row, "gpus") * (1 / gathered - 1 / node_bytes_per_s)
