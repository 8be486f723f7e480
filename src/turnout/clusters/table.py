"""The table of machines, and what their files share: network cards of one kind behave alike wherever they are."""

from turnout.registry import Table
from turnout.topology import Cluster, Link

CLUSTERS: Table[Cluster] = Table("cluster")

GB = 1e9
TB = 1e12
TFLOPS = 1e12

# Seconds a message takes on NVLink, and on InfiniBand under one leaf or across the spine: 3.3, 2.8 and 3.7 us;
# RoCE 3.6 and 5.6 us. Source: DeepSeek-AI 2025, arXiv:2505.09343 (64-byte messages, CPU side).
NVLINK_LATENCY_S = 3.3e-6
INFINIBAND_LATENCY_S = 3.7e-6
ROCE_LATENCY_S = 5.6e-6

# Hop latency of the TPU's inter-chip network is not published, nor a message's between pods: assumed.
ICI_LATENCY_S = 1e-6
DCN_LATENCY_S = 25e-6

# Bytes a second of a card as large messages see it. Source: SimAI, NSDI 2025, constants of its analytical mode
# (https://github.com/aliyun/SimAI): CX-6 at 200 Gb/s 23.5 GB/s, CX-7 and BlueField-3 at 400 Gb/s 48.5 GB/s.
CX6_BYTES_PER_S = 23.5 * GB
CX7_BYTES_PER_S = 48.5 * GB

# Cost of the network a device, in dollars: two-layer fat-tree 4,390, three-layer 7,500.
# Source: DeepSeek-AI 2025, arXiv:2505.09343.
TWO_LAYER_USD = 4390.0
THREE_LAYER_USD = 7500.0


def infiniband(bytes_per_s: float) -> Link:
    """One card a device, across the spine."""
    return Link(bytes_per_s=bytes_per_s, latency_s=INFINIBAND_LATENCY_S)
