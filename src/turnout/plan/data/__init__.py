"""Published measurements the planner is fitted on and judged by; every row names its source.

published_cases.json: 421 rows with set-ups and sources. nanotron_runs.csv: 1,385 H100 runs of the Ultra-Scale Playbook
(https://huggingface.co/spaces/nanotron/ultrascale-playbook), successes and out-of-memory alike,
without the columns nothing reads.
vtrain_one_node_runs.csv: what vTrain's simulator says of 1,440 layouts on one node of A100, published as measured
(https://github.com/VIA-Research/vTrain, data/ground_truth_single.csv). All gzipped.
"""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

SIMULATED = (
    "simulated"  # split of rows that another simulator computed: no measurement, so that no headline counts them
)


def _text(name: str) -> str:
    return gzip.decompress(Path(__file__).with_name(f"{name}.gz").read_bytes()).decode()


def published_cases() -> dict[str, Any]:
    """The document with `models` and `rows`."""
    return json.loads(_text("published_cases.json"))


def nanotron_runs() -> list[dict[str, str]]:
    """The runs as their file has them."""
    return list(csv.DictReader(io.StringIO(_text("nanotron_runs.csv"))))


def nanotron_rows(*, nodes: int = 0, failed: bool = False) -> list[dict[str, Any]]:
    """Runs as rows of the schema of published_cases.json; `nodes` 0 takes all, `failed` those out of memory too."""
    wanted = [run for run in nanotron_runs() if nodes in (0, int(run["nodes"]))]
    return [_as_row(i, run) for i, run in enumerate(wanted) if failed or run["status"] == "Success"]


def _as_row(index: int, run: dict[str, str]) -> dict[str, Any]:
    layers, hidden = int(run["layers"]), int(run["hidden"])
    layout = {"cp": 1} | {name: int(run[name]) for name in ("tp", "pp", "dp", "zero")}
    batch = layout["dp"] * int(run["mbs"]) * int(run["accum"])
    return {
        "id": f"nanotron-{index}", "suite": "nanotron", "model": f"nanotron-{layers}x{hidden}",
        "dims": {
            "layers": layers, "hidden": hidden, "ffn": 8192, "heads": 32, "vocab": 131_072, "gated": True, "tied": True,
        },
        "gpus": int(run["gpus"]), "gpu": "H100-EFA", "precision": "bf16", "layout": layout, "mbs": int(run["mbs"]),
        "gbs": batch, "seq": int(run["seq"]), "quantity": "tokens_per_s_per_gpu", "unit": "tok/s/GPU",
        "value": float(run["tok_s_gpu"] or 0), "split": "calibration", "primary": True, "recompute": "none",
        "source": "huggingface nanotron ultrascale-playbook", "status": run["status"], "oom": run["oom"] == "True",
        "alloc_gib": float(run["mem_alloc_gb"] or 0), "peak_mem_gib": float(run["mem_reserved_gb"] or 0),
        "all_gather_gb_per_s": float(run["ag_gbs"] or 0),
        "all_reduce_gb_per_s": float(run["ar_gbs"] or 0), "nodes": int(run["nodes"]),
    }  # fmt: skip


def vtrain_one_node_rows() -> list[dict[str, Any]]:
    """vTrain's one-node layouts as rows of the schema of published_cases.json, their split SIMULATED.

    Its README calls them measured. They are sums: linear in blocks and micro-batches to a few millionths, and of ranks
    that share parameters by its table of all-reduces to the microsecond, its fault beyond 1 GiB included
    (src/predictor.py, compute_comm_time); tests/plan/test_simulated_rows.py shows it.
    """
    runs = csv.DictReader(io.StringIO(_text("vtrain_one_node_runs.csv")))
    return [_as_vtrain_row(i, run) for i, run in enumerate(runs)]


def _as_vtrain_row(index: int, run: dict[str, str]) -> dict[str, Any]:
    hidden = int(run["hidden"])
    return {
        "id": f"vtrain-one-{index}", "suite": "vtrain_one_node", "model": "gpt",
        "dims": {
            "layers": int(run["layers"]), "hidden": hidden, "ffn": 4 * hidden, "heads": int(run["heads"]),
            "vocab": 51_200,
        },
        "gpus": int(run["gpus"]), "gpu": "A100-SXM80", "precision": "fp16",
        "layout": {"cp": 1} | {name: int(run[name]) for name in ("tp", "pp", "dp")}, "mbs": int(run["mbs"]),
        "gbs": int(run["gbs"]), "seq": int(run["seq"]), "quantity": "step_time", "unit": "s",
        "value": float(run["step_s"]), "split": SIMULATED, "primary": True,
        "source": "VIA-Research/vTrain@f8dda8473a:data/ground_truth_single.csv",
    }  # fmt: skip
