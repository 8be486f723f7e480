"""DGX A100: 8 A100-SXM on NVLink 3, a 200 Gb/s HDR card each; 80 GB and 40 GB."""

from dataclasses import replace

from turnout.clusters.table import (
    CLUSTERS,
    CX6_BYTES_PER_S,
    GB,
    NVLINK_LATENCY_S,
    TB,
    TFLOPS,
    TWO_LAYER_USD,
    infiniband,
)
from turnout.topology import Cluster, Device, Link, PeakFlops

DEVICE = Device(
    name="A100-SXM-80GB",
    generation="ampere",
    # NVIDIA A100 data sheet, dense
    peak_flops_per_s=PeakFlops(fp32=156 * TFLOPS, fp16=312 * TFLOPS, bf16=312 * TFLOPS),
    memory_bytes=80 * GB,  # A100 data sheet
    memory_bytes_per_s=2.039 * TB,  # A100 data sheet, SXM 80 GB
    units=108,  # streaming multiprocessors; NVIDIA A100 architecture white paper
)
DEVICE_40 = replace(
    DEVICE,
    name="A100-SXM-40GB",
    memory_bytes=40 * GB,  # A100 data sheet
    memory_bytes_per_s=1.555 * TB,  # A100 data sheet, SXM 40 GB
)

DGX_A100 = CLUSTERS.register("dgx-a100")(
    Cluster(
        name="dgx-a100",
        device=DEVICE,
        devices_per_node=8,  # DGX A100 data sheet
        # 300 GB/s each way (A100 data sheet: 600 both ways), 240 usable (SimAI)
        intra=Link(bytes_per_s=240 * GB, latency_s=NVLINK_LATENCY_S),
        inter=infiniband(CX6_BYTES_PER_S),  # 8 ConnectX-6 at 200 Gb/s, DGX A100 data sheet
        device_watt=400.0,  # A100 data sheet
        host_watt=412.0,  # 6.5 kW a DGX A100 (its data sheet) less 8 devices, by 8
        network_usd_per_device=TWO_LAYER_USD,
        sources=(
            "NVIDIA A100 and DGX A100 data sheets",
            "SimAI constants, NSDI 2025 (usable bandwidth)",
            "arXiv:2505.09343 (network cost, latency)",
        ),
    )
)
DGX_A100_40 = CLUSTERS.register("dgx-a100-40")(
    replace(DGX_A100, name="dgx-a100-40", device=DEVICE_40)  # the first DGX A100, 320 GB a node: its data sheet
)
