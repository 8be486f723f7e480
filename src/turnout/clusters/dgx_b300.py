"""DGX B300: the DGX B200 with more memory, more fp4 and cards of 800 Gb/s."""

from dataclasses import replace

from turnout.clusters.dgx_b200 import DEVICE, DGX_B200
from turnout.clusters.table import CLUSTERS, CX7_BYTES_PER_S, GB, TFLOPS, infiniband

DEVICE_B300 = replace(
    DEVICE,
    name="B300-288GB",
    # fp4 14 P dense, of low certainty: pages of NVIDIA and its partners have 13 to 14; the others are those of B200
    peak_flops_per_s=replace(DEVICE.peak_flops_per_s, fp4=14_000 * TFLOPS),
    memory_bytes=288 * GB,  # HGX B300 data sheet: 2.3 TB a node
)

DGX_B300 = CLUSTERS.register("dgx-b300")(
    replace(
        DGX_B200,
        name="dgx-b300",
        device=DEVICE_B300,
        inter=infiniband(2 * CX7_BYTES_PER_S),  # 8 ConnectX-8 at 800 Gb/s, DGX B300 data sheet; usable as CX-7's share
        device_watt=1100.0,  # HGX B300 data sheet
        host_watt=650.0,  # 14 kW a DGX B300 (its data sheet) less 8 devices, by 8
        sources=("NVIDIA DGX B300 and HGX B300 data sheets", *DGX_B200.sources),
    )
)
