"""TPU v5p: a slice of 6,144 chips on a 3-D torus, slices joined by the data-centre network."""

from turnout.clusters.table import CLUSTERS, DCN_LATENCY_S, GB, ICI_LATENCY_S, TB, TFLOPS
from turnout.topology import Cluster, Device, Link, PeakFlops

TPU_V5P = CLUSTERS.register("tpu-v5p")(
    Cluster(
        name="tpu-v5p",
        device=Device(
            name="TPU-v5p",
            generation="tpu",
            peak_flops_per_s=PeakFlops(bf16=459 * TFLOPS, fp8=459 * TFLOPS),  # Cloud TPU v5p page
            memory_bytes=95 * 2**30,  # Cloud TPU v5p page: 95 GiB
            memory_bytes_per_s=2.765 * TB,  # Cloud TPU v5p page
        ),
        devices_per_node=6144,  # the largest job: Cloud TPU v5p page (a pod has 8,960)
        torus=(16, 16, 24),  # Cloud TPU v5p page
        intra=Link(bytes_per_s=600 * GB, latency_s=ICI_LATENCY_S),  # 1,200 GB/s both ways: Cloud TPU v5p page
        inter=Link(bytes_per_s=50 / 8 * GB, latency_s=DCN_LATENCY_S),  # 50 Gb/s a chip: Cloud TPU v5p page
        sources=(
            "https://docs.cloud.google.com/tpu/docs/v5p",
            "assumed: 1 us a message in the torus, 25 us between pods",
        ),
    )
)
