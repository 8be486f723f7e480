"""AWS p5.48xlarge: 8 H100-SXM on NVLink 4, 32 network cards with EFA."""

from dataclasses import replace

from turnout.clusters.dgx_h100 import DGX_H100
from turnout.clusters.table import CLUSTERS, GB
from turnout.topology import Link

AWS_P5 = CLUSTERS.register("aws-p5")(
    replace(
        DGX_H100,
        name="aws-p5",
        # 400 GB/s of EFA a node (AWS); all-gathers of 1 GiB over 2 to 64 nodes took 38 us in each step of the ring and
        # went at 235 GB/s a node: in the runs of nanotron's Ultra-Scale Playbook. For an all-to-all, which pays it for
        # each of its messages, it is an upper bound
        inter=Link(bytes_per_s=235 / 8 * GB, latency_s=38e-6),
        network_usd_per_device=0.0,  # rented with the machine
        sources=(
            *DGX_H100.sources,
            "AWS EC2, p5.48xlarge (network)",
            "https://huggingface.co/spaces/nanotron/ultrascale-playbook (what gathers reach of it)",
        ),
    )
)
