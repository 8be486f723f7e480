"""Ascend 910B: 8 NPUs on HCCS, a 200 Gb/s RoCE port each (Atlas 800T A2)."""

from turnout.clusters.table import CLUSTERS, CX6_BYTES_PER_S, GB, NVLINK_LATENCY_S, ROCE_LATENCY_S, TB, TFLOPS
from turnout.topology import Cluster, Device, Link, PeakFlops

ASCEND_910B = CLUSTERS.register("ascend-910b")(
    Cluster(
        name="ascend-910b",
        device=Device(
            name="Ascend-910B3-64GB",
            generation="ascend",
            # fp16 313: arXiv:2406.00023; bf16 runs at the same rate
            peak_flops_per_s=PeakFlops(fp16=313 * TFLOPS, bf16=313 * TFLOPS),
            memory_bytes=64 * GB,  # arXiv:2406.00023
            memory_bytes_per_s=1.6 * TB,  # arXiv:2406.00023
            units=20,  # cores; arXiv:2406.00023
        ),
        devices_per_node=8,  # Atlas 800T A2: arXiv:2406.00023
        # 392 GB/s both ways, of low certainty; 0.8 of it is taken as usable, as SimAI finds on A100; NVLink's latency
        intra=Link(bytes_per_s=0.8 * 196 * GB, latency_s=NVLINK_LATENCY_S),
        # 200 Gb/s RoCE a device; usable as CX-6's
        inter=Link(bytes_per_s=CX6_BYTES_PER_S, latency_s=ROCE_LATENCY_S),
        sources=(
            "LocMoE+, arXiv:2406.00023 (peak, memory, cores, node)",
            "Huawei Atlas 800T A2 product page (HCCS 392 GB/s, 200 Gb/s RoCE), of low certainty",
            "assumed: 0.8 of HCCS usable, latency of NVLink",
            "arXiv:2505.09343 (RoCE latency)",
        ),
    )
)
