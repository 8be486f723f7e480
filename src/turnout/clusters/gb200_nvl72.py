"""GB200 NVL72: one NVLink domain of 72 devices."""

from dataclasses import replace

from turnout.clusters.dgx_b200 import DEVICE, NVLINK5
from turnout.clusters.table import CLUSTERS, CX7_BYTES_PER_S, GB, TFLOPS, TWO_LAYER_USD, infiniband
from turnout.topology import Cluster, PeakFlops

# dense, of medium certainty: the NVIDIA GB200 NVL72 data sheet by 72 has 2,500 in bf16 and 5,000 in fp8
PEAK = PeakFlops(fp32=1225 * TFLOPS, fp16=2450 * TFLOPS, bf16=2450 * TFLOPS, fp8=4900 * TFLOPS, fp4=9800 * TFLOPS)

GB200_NVL72 = CLUSTERS.register("gb200-nvl72")(
    Cluster(
        name="gb200-nvl72",
        device=replace(
            DEVICE,
            name="GB200-186GB",
            peak_flops_per_s=PEAK,
            memory_bytes=186 * GB,  # GB200 NVL72 data sheet: 13.4 TB a rack
        ),
        devices_per_node=72,  # GB200 NVL72 data sheet
        intra=NVLINK5,  # GB200 NVL72 data sheet: 130 TB/s over 72 devices
        inter=infiniband(CX7_BYTES_PER_S),  # one ConnectX-7 at 400 Gb/s a device, DGX GB200 user guide
        device_watt=1200.0,  # GB200 NVL72 data sheet
        host_watt=467.0,  # about 120 kW a rack (DGX GB200 user guide) less 72 devices, by 72
        network_usd_per_device=TWO_LAYER_USD,
        sources=(
            "NVIDIA GB200 NVL72 data sheet, DGX GB200 user guide",
            "SimuMax 1.2 (share of NVLink 5 that collectives reach)",
            "SimAI constants, NSDI 2025 (400 Gb/s card)",
            "arXiv:2505.09343 (network cost, latency)",
        ),
    )
)
