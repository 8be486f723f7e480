"""GB300 NVL72: the GB200 NVL72 with more memory, more fp4 and cards of 800 Gb/s."""

from dataclasses import replace

from turnout.clusters.gb200_nvl72 import GB200_NVL72, PEAK
from turnout.clusters.table import CLUSTERS, CX7_BYTES_PER_S, GB, TFLOPS, infiniband

GB300_NVL72 = CLUSTERS.register("gb300-nvl72")(
    replace(
        GB200_NVL72,
        name="gb300-nvl72",
        device=replace(
            GB200_NVL72.device,
            name="GB300-288GB",
            peak_flops_per_s=replace(PEAK, fp4=15_000 * TFLOPS),  # GB300 NVL72 data sheet: 1,080 P fp4 dense a rack
            memory_bytes=288 * GB,  # GB300 NVL72 data sheet
        ),
        inter=infiniband(2 * CX7_BYTES_PER_S),  # one ConnectX-8 at 800 Gb/s a device; usable as CX-7's share
        device_watt=1400.0,  # GB300 NVL72 data sheet
        sources=("NVIDIA GB300 NVL72 data sheet", *GB200_NVL72.sources),
    )
)
