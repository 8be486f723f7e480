"""Ethernet: nodes of 8 A100 that share one 100 Gb/s port over TCP; what a cheap cloud rents out."""

from dataclasses import replace

from turnout.clusters.dgx_a100 import DGX_A100
from turnout.clusters.table import CLUSTERS, GB
from turnout.topology import Link

ETHERNET_100G = CLUSTERS.register("ethernet-100g")(
    replace(
        DGX_A100,
        name="ethernet-100g",
        # 12.5 GB/s a node by 8 devices, 0.9 of it after headers and congestion; TCP through the kernel: 25 us, assumed
        inter=Link(bytes_per_s=0.9 * 12.5 * GB / 8, latency_s=25e-6),
        oversubscription=3.0,  # 48 ports down, 16 up: a usual leaf switch; assumed
        nodes_per_leaf=48,
        rails=False,
        network_usd_per_device=0.0,
        sources=(
            "an assumed machine: NVIDIA A100 data sheet; one 100 Gb/s Ethernet port a node, leaf switches 3:1",
            "assumed: 0.9 of the port usable, 25 us a message through the kernel",
        ),
    )
)
