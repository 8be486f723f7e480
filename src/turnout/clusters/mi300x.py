"""MI300X: 8 devices, each linked to the other seven by Infinity Fabric."""

from turnout.clusters.table import CLUSTERS, CX7_BYTES_PER_S, GB, NVLINK_LATENCY_S, ROCE_LATENCY_S, TB, TFLOPS
from turnout.topology import Cluster, Device, Link, PeakFlops

MI300X = CLUSTERS.register("mi300x")(
    Cluster(
        name="mi300x",
        device=Device(
            name="MI300X-192GB",
            generation="cdna3",
            # AMD Instinct MI300X data sheet, dense
            peak_flops_per_s=PeakFlops(
                fp32=653.7 * TFLOPS, fp16=1307.4 * TFLOPS, bf16=1307.4 * TFLOPS, fp8=2614.9 * TFLOPS
            ),
            memory_bytes=192 * GB,  # MI300X data sheet
            memory_bytes_per_s=5.3 * TB,  # MI300X data sheet
            units=304,  # compute units; MI300X data sheet
        ),
        devices_per_node=8,  # MI300X platform data sheet
        # 7 links of 64 GB/s each way (MI300X platform data sheet: 896 GB/s both ways); 0.7 of it is assumed usable,
        # between the shares measured on NVLink 4 and 5; latency taken as NVLink's
        intra=Link(bytes_per_s=0.7 * 448 * GB, latency_s=NVLINK_LATENCY_S),
        # one 400 Gb/s RoCE card a device, as in AMD's cluster reference guide; usable as CX-7's
        inter=Link(bytes_per_s=CX7_BYTES_PER_S, latency_s=ROCE_LATENCY_S),
        device_watt=750.0,  # MI300X data sheet
        sources=(
            "AMD Instinct MI300X and MI300X platform data sheets",
            "assumed: 0.7 of Infinity Fabric usable, latency of NVLink",
            "SimAI constants, NSDI 2025 (400 Gb/s card)",
            "arXiv:2505.09343 (RoCE latency)",
        ),
    )
)
