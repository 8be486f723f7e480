"""DGX B200: 8 Blackwell devices on NVLink 5."""

from dataclasses import replace

from turnout.clusters.table import (
    CLUSTERS,
    CX7_BYTES_PER_S,
    GB,
    NVLINK_LATENCY_S,
    TB,
    TFLOPS,
    TWO_LAYER_USD,
    infiniband,
)
from turnout.topology import Cluster, Device, Link, PeakFlops

DEVICE = Device(
    name="B200-180GB",
    generation="blackwell",
    # NVIDIA DGX B200 data sheet by 8, dense: half of the figures it prints with sparsity
    peak_flops_per_s=PeakFlops(
        fp32=1100 * TFLOPS, fp16=2250 * TFLOPS, bf16=2250 * TFLOPS, fp8=4500 * TFLOPS, fp4=9000 * TFLOPS
    ),
    memory_bytes=180 * GB,  # DGX B200 data sheet: 1,440 GB a node
    memory_bytes_per_s=8.0 * TB,  # DGX B200 data sheet: 64 TB/s a node
    units=148,  # streaming multiprocessors, as CUDA reports them
)
# 900 GB/s each way (DGX B200 data sheet: 1,800 both ways); an all-gather reaches 0.6735 and a reduce-scatter 0.6731 of
# as many GiB/s (SimuMax 1.2, measured on 8 B200: https://github.com/MooreThreads/SimuMax, configs/system)
NVLINK5 = Link(bytes_per_s=0.673 * 900 * 2**30, latency_s=NVLINK_LATENCY_S)

DGX_B200 = CLUSTERS.register("dgx-b200")(
    Cluster(
        name="dgx-b200",
        device=DEVICE,
        devices_per_node=8,  # DGX B200 data sheet
        # 9.2 us a hop of an all-gather, 8.0 of a reduce-scatter, 7.3 of an all-to-all: SimuMax 1.2, the same file
        intra=replace(NVLINK5, latency_s=8.2e-6),
        inter=infiniband(CX7_BYTES_PER_S),  # 8 ConnectX-7 at 400 Gb/s, DGX B200 data sheet
        alltoall_share=0.5968 / 0.6735,  # an all-to-all and an all-gather: SimuMax 1.2, the same file
        device_watt=1000.0,  # HGX B200 data sheet
        host_watt=787.0,  # 14.3 kW a DGX B200 (its data sheet) less 8 devices, by 8
        network_usd_per_device=TWO_LAYER_USD,
        sources=(
            "NVIDIA DGX B200 and HGX B200 data sheets",
            "SimuMax 1.2 (share of NVLink 5 that collectives reach, latency of a hop)",
            "SimAI constants, NSDI 2025 (400 Gb/s card)",
            "arXiv:2505.09343 (network cost, latency)",
        ),
    )
)
