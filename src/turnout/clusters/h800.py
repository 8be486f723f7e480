"""H800: the H100 with NVLink cut to 400 GB/s both ways; DeepSeek-V3's machine."""

from dataclasses import replace

from turnout.clusters.dgx_h100 import DEVICE, DGX_H100
from turnout.clusters.table import CLUSTERS, GB, NVLINK_LATENCY_S
from turnout.topology import Link

H800 = CLUSTERS.register("h800")(
    replace(
        DGX_H100,
        name="h800",
        device=replace(DEVICE, name="H800-SXM-80GB"),
        # 200 GB/s each way, 160 usable: DeepSeek-AI 2024, arXiv:2412.19437, section 3.2.2 (SimAI has 165)
        intra=Link(bytes_per_s=160 * GB, latency_s=NVLINK_LATENCY_S),
        usd_per_device_hour=2.0,  # arXiv:2412.19437, table 1
        sources=(
            "arXiv:2412.19437, sections 3.1 and 3.2.2, table 1 (links, rent)",
            "NVIDIA H100 data sheet (H800 differs in NVLink and fp64)",
            "SimAI constants, NSDI 2025 (400 Gb/s card)",
            "arXiv:2505.09343 (network cost, latency)",
        ),
    )
)
