"""The runs of the Ultra-Scale Playbook as rows, with what their file says of the state of software and network.

Source: https://huggingface.co/spaces/nanotron/ultrascale-playbook, `after_pp_fix` and the bandwidths each run measured.
"""

from typing import Any

from turnout.plan.data import nanotron_rows, nanotron_runs
from turnout.plan.job import Job
from turnout.plan.nanotron_tensors import Host
from turnout.plan.parameters import Parameters
from turnout.plan.row_fields import Row
from turnout.plan.row_machine import cluster_of

# seconds of a ring's step: 0.04 ms in one state of that network, 0.3 ms in the other; the middle of the two as ratios
SLOW_HOP_S = 1.1e-4
_GATHERS = 10  # collectives of a block under tensor parallelism, inputs gathered again in the backward pass


def nanotron_cases(*, nodes: int = 0, failed: bool = False) -> list[dict[str, Any]]:
    """Runs as rows of the schema of published_cases.json; `nodes` 0 takes all, `failed` those out of memory too.

    Pipelines that ran before nanotron's own repair of its pipeline engine are an older release (`primary` is false):
    they wait 1.2 s for each micro-batch, whatever the model, the layout and the network. Bandwidths inside a node are
    the run's own: on some nodes NVLink was not in use.
    """
    # the file's own order: of all runs, failed ones included, the place is the number in a row's name
    every = zip(nanotron_rows(failed=True), nanotron_runs(), strict=True)
    return [
        row | {"primary": _is_newest(row, run), "all_reduce_intra_gb_per_s": float(run["ar_intra"] or 0)}
        for row, run in every
        if nodes in (0, row["nodes"]) and (failed or row["status"] == "Success")
    ]


def _is_newest(row: dict[str, Any], run: dict[str, str]) -> bool:
    return row["layout"]["pp"] == 1 or run["after_pp_fix"] == "True"


def host_of(row: Row, job: Job, parameters: Parameters) -> Host:
    """Whether launching ran ahead of the device in a run.

    The older release waits in each micro-batch. Where ring steps are slow, launching waits for them, unless a block's
    products take longer. Told by what runs reserved, in-sample, as is that such pipelines run ahead while they fill.
    """
    if not row.get("primary", True):
        return "behind"
    cluster, strategy = cluster_of(row), job.strategy
    hop_s = cluster.intra.latency_s
    products = 6 * job.rank_tokens * job.shape.matrix_weights(0) / strategy.tp
    device_s = products / (cluster.device.peak_flops_per_s.bf16 * parameters.gemm(cluster.device.generation))
    if hop_s < SLOW_HOP_S or device_s > _GATHERS * (strategy.tp - 1) * hop_s:
        return "ahead"
    return "filling"
