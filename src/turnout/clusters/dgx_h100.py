"""DGX H100: 8 H100-SXM on NVLink 4, a 400 Gb/s NDR card each; and the 96 GB HBM2e variant at 500 W."""

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
    name="H100-SXM-80GB",
    generation="hopper",
    # NVIDIA H100 data sheet, dense: half of the figures it prints with sparsity
    peak_flops_per_s=PeakFlops(fp32=494.5 * TFLOPS, fp16=989.5 * TFLOPS, bf16=989.5 * TFLOPS, fp8=1979 * TFLOPS),
    memory_bytes=80 * GB,  # H100 data sheet
    memory_bytes_per_s=3.35 * TB,  # H100 data sheet
    units=132,  # streaming multiprocessors; NVIDIA H100 architecture white paper
)
DEVICE_HBM2E = replace(
    DEVICE,
    name="H100-96GB-HBM2e",
    peak_flops_per_s=DEVICE.peak_flops_per_s.at_power(500 / 700),  # held to 500 W of the data sheet's 700
    memory_bytes=96 * GB,  # torchtitan's benchmarks: H100 with 96 GB HBM2e
    memory_bytes_per_s=2.4 * TB,  # the same
)

DGX_H100 = CLUSTERS.register("dgx-h100")(
    Cluster(
        name="dgx-h100",
        device=DEVICE,
        devices_per_node=8,  # DGX H100 data sheet
        # 450 GB/s each way (H100 data sheet: 900 both ways), 371 usable (SimAI)
        intra=Link(bytes_per_s=371 * GB, latency_s=NVLINK_LATENCY_S),
        inter=infiniband(CX7_BYTES_PER_S),  # 8 ConnectX-7 at 400 Gb/s, DGX H100 data sheet
        alltoall_share=0.9,  # 335 GB/s of bus bandwidth among 4 H100, 500 MB: an issue of github.com/NVIDIA/nccl
        device_watt=700.0,  # H100 data sheet
        host_watt=575.0,  # 10.2 kW a DGX H100 (its data sheet) less 8 devices, by 8
        network_usd_per_device=TWO_LAYER_USD,
        sources=(
            "NVIDIA H100 and DGX H100 data sheets",
            "SimAI constants, NSDI 2025 (usable bandwidth)",
            "https://github.com/NVIDIA/nccl, issues (all-to-all inside a node)",
            "arXiv:2505.09343 (network cost, latency)",
        ),
    )
)
H100_HBM2E = CLUSTERS.register("h100-hbm2e")(
    replace(
        DGX_H100,
        name="h100-hbm2e",
        device=DEVICE_HBM2E,
        device_watt=500.0,  # torchtitan's benchmarks: "the default 500W power limit"
        sources=(
            *DGX_H100.sources,
            "https://github.com/pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md (memory, power)",
        ),
    )
)
