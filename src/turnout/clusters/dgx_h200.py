"""DGX H200: the DGX H100 with 141 GB of HBM3e a device."""

from dataclasses import replace

from turnout.clusters.dgx_h100 import DEVICE, DGX_H100
from turnout.clusters.table import CLUSTERS, GB, TB

DGX_H200 = CLUSTERS.register("dgx-h200")(
    replace(
        DGX_H100,
        name="dgx-h200",
        device=replace(
            DEVICE,
            name="H200-SXM-141GB",
            memory_bytes=141 * GB,  # NVIDIA H200 data sheet
            memory_bytes_per_s=4.8 * TB,  # NVIDIA H200 data sheet
        ),
        sources=("NVIDIA H200 data sheet", *DGX_H100.sources),
    )
)
