"""The runs of the Ultra-Scale Playbook as rows, with what their file says of the state of software and network.

Source: https://huggingface.co/spaces/nanotron/ultrascale-playbook, `after_pp_fix` and the bandwidths each run measured.
"""

from typing import Any

from turnout.plan.data import nanotron_rows, nanotron_runs


def nanotron_cases(*, nodes: int = 0, failed: bool = False) -> list[dict[str, Any]]:
    """Runs as rows of the schema of published_cases.json; `nodes` 0 takes all, `failed` those out of memory too.

    Pipelines that ran before nanotron's own repair of its pipeline engine are an older release (`primary` is false):
    they wait 1.2 s for each micro-batch, whatever the model, the layout and the network. Bandwidths inside a node are
    the run's own: on some nodes NVLink was not in use.
    `keeps_gathered`: what was run first, without pipelines, kept the gathered inputs of products; what came after did
    not. The file does not say so; their memory does, by a fifth of it.
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
