"""TPU v4: a pod of 4,096 chips on a 3-D torus, pods joined by the data-centre network."""

from turnout.clusters.table import CLUSTERS, DCN_LATENCY_S, GB, ICI_LATENCY_S, TB, TFLOPS
from turnout.topology import Cluster, Device, Link, PeakFlops

TPU_V4 = CLUSTERS.register("tpu-v4")(
    Cluster(
        name="tpu-v4",
        device=Device(
            name="TPU-v4",
            generation="tpu",
            peak_flops_per_s=PeakFlops(bf16=275 * TFLOPS),  # arXiv:2304.01433, table of v4 and v3
            memory_bytes=32 * GB,  # arXiv:2304.01433, table of v4 and v3
            memory_bytes_per_s=1.2 * TB,  # arXiv:2304.01433, table of v4 and v3
        ),
        devices_per_node=4096,  # arXiv:2304.01433, abstract
        torus=(16, 16, 16),  # the whole pod as one slice
        intra=Link(bytes_per_s=6 * 50 * GB, latency_s=ICI_LATENCY_S),  # 6 links of 50 GB/s each way, the same table
        # about 100 Gb/s a host of 4 chips: 81 Tb/s between pods of 768 hosts, arXiv:2204.02311, section 4
        inter=Link(bytes_per_s=3.3 * GB, latency_s=DCN_LATENCY_S),
        device_watt=192.0,  # arXiv:2304.01433, largest measured
        sources=(
            "Jouppi et al. 2023, arXiv:2304.01433, abstract and table of v4 and v3",
            "Chowdhery et al. 2022, arXiv:2204.02311, section 4 (network between pods)",
            "assumed: 1 us a message in the torus, 25 us between pods",
        ),
    )
)
