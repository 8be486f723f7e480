"""A800: the A100 with NVLink cut to 400 GB/s both ways."""

from dataclasses import replace

from turnout.clusters.dgx_a100 import DEVICE, DGX_A100
from turnout.clusters.table import CLUSTERS, GB, NVLINK_LATENCY_S
from turnout.topology import Link

A800 = CLUSTERS.register("a800")(
    replace(
        DGX_A100,
        name="a800",
        device=replace(DEVICE, name="A800-SXM-80GB"),
        intra=Link(bytes_per_s=160 * GB, latency_s=NVLINK_LATENCY_S),  # 200 each way, 160 usable: SimAI
        sources=("NVIDIA A800 data sheet: the A100 but for NVLink", "SimAI constants, NSDI 2025 (usable bandwidth)"),
    )
)
