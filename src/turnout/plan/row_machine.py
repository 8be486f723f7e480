"""The machine that a row in the schema of published_cases.json ran on."""

from dataclasses import replace

from turnout.clusters import CLUSTERS
from turnout.plan.row_fields import Refused, Row, count, number
from turnout.topology import Cluster

# words of a row's `gpu`, the first that is found deciding
_MACHINES = (
    ("GB300", "gb300-nvl72"), ("GB200", "gb200-nvl72"), ("B300", "dgx-b300"), ("B200", "dgx-b200"),
    ("H100-96", "h100-hbm2e"), ("H100-EFA", "aws-p5"), ("H200", "dgx-h200"), ("H100", "dgx-h100"), ("H800", "h800"),
    ("A800", "a800"), ("A100-40", "dgx-a100-40"), ("A100", "dgx-a100"), ("V100", "dgx2-v100"), ("TPUv4", "tpu-v4"),
    ("TPUv5p", "tpu-v5p"), ("MI300", "mi300x"), ("910B", "ascend-910b"),
)  # fmt: skip
# an all-reduce inside a node below this share of what the link carries did not run on it
NVLINK_IN_USE = 0.5
# of the buffer that runs measured their bandwidths with; not published: 1 GiB taken
TESTED_BYTES = 2**30


def cluster_of(row: Row) -> Cluster:
    """The machine a row ran on. Raises: Refused if no description fits."""
    gpu = str(row.get("gpu"))
    for words, name in _MACHINES:
        if words in gpu and "core" not in gpu:
            return _measured_fabric(row, CLUSTERS[name])
    raise Refused(f"gpu={gpu!r} has no cluster description; known: {', '.join(CLUSTERS.names())}")


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
