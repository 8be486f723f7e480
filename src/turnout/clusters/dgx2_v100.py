"""DGX-2: 16 V100-SXM3 on one NVSwitch fabric, 8 EDR cards."""

from turnout.clusters.table import CLUSTERS, GB, INFINIBAND_LATENCY_S, NVLINK_LATENCY_S, TB, TFLOPS
from turnout.topology import Cluster, Device, Link, PeakFlops

DGX2_V100 = CLUSTERS.register("dgx2-v100")(
    Cluster(
        name="dgx2-v100",
        device=Device(
            name="V100-SXM3-32GB",
            generation="volta",
            peak_flops_per_s=PeakFlops(fp32=15.7 * TFLOPS, fp16=125 * TFLOPS),  # NVIDIA V100 data sheet
            memory_bytes=32 * GB,  # DGX-2 data sheet: 512 GB a node
            memory_bytes_per_s=0.9 * TB,  # V100 data sheet
            units=80,  # streaming multiprocessors; NVIDIA V100 architecture white paper
        ),
        devices_per_node=16,  # DGX-2 data sheet
        # 150 GB/s each way (V100 data sheet: 300 both ways); 0.8 of it taken as usable, as SimAI finds on A100
        intra=Link(bytes_per_s=0.8 * 150 * GB, latency_s=NVLINK_LATENCY_S),
        # 8 cards of 100 Gb/s for 16 devices (DGX-2 data sheet), 0.94 usable as CX-6's
        inter=Link(bytes_per_s=0.94 * 6.25 * GB, latency_s=INFINIBAND_LATENCY_S),
        device_watt=350.0,  # V100-SXM3 in the DGX-2
        host_watt=275.0,  # 10 kW a DGX-2 (its data sheet) less 16 devices, by 16
        sources=(
            "NVIDIA V100 and DGX-2 data sheets",
            "SimAI constants, NSDI 2025 (share of NVLink and card that is usable)",
            "arXiv:2505.09343 (latency)",
        ),
    )
)
