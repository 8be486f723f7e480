"""The files for SLURM, Kubernetes and Ray Train say what torchrun and `turnout train` understand."""

import importlib.util
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

from tests.distributed.ranks import spawn
from tests.distributed.runs import write_text
from turnout.comm import World
from turnout.train import checkpoint
from turnout.train.recipe import check_ranks
from turnout.train.recipes import load_recipe

FILES = Path(__file__).parents[2] / "examples" / "cluster"
SLURM = {
    "SLURM_JOB_NAME": "turnout",
    "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_NNODES": "2",
    "SLURM_GPUS_ON_NODE": "8",
}
SMALL = (
    *("model.vocab_size=300", "data.vocab_size=300", "data.val_fraction=0.2", "loop.seq_len=16"),
    *("loop.eval_tokens=64", "loop.steps=2", "loop.save_every=1", "strategy.ep=2", "loop.timeout_s=60"),
)


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """`ran(script, **variables)`: the words that torchrun was started with."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, does in {
        "scontrol": "echo node1; echo node2",
        "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
        "torchrun": 'printf "%s\\n" "$@" > "$WORDS"',
    }.items():
        (commands / name).write_text(f"#!/bin/bash\n{does}\n", encoding="utf-8")
        (commands / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)

    def run(script: str, **variables: str) -> list[str]:
        words = tmp_path / "words"
        path = f"{commands}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "WORDS": str(words)} | variables
        subprocess.run(["bash", "-eu"], input=script, text=True, env=environment, check=True)
        return words.read_text(encoding="utf-8").splitlines()

    return run


def settings_of(words: list[str]) -> tuple[Any, list[str], list[str]]:
    """What torchrun understands, and of `turnout train` the words before --set and the settings."""
    asked = get_args_parser().parse_args(words)
    assert asked.module
    assert (asked.training_script, asked.training_script_args[0]) == ("turnout", "train")
    rest = asked.training_script_args[1:]
    first = rest.index("--set")
    assert rest[first::2] == ["--set"] * (len(rest[first:]) // 2)
    return asked, rest[:first], rest[first + 1 :: 2]


def test_the_batch_file_starts_a_run_and_goes_on_with_one_that_it_began(
    ran: Callable[..., list[str]], tmp_path: Path
) -> None:
    script = (FILES / "slurm.sbatch").read_text(encoding="utf-8")
    asked, train, settings = settings_of(ran(script, **SLURM))
    assert (asked.nnodes, asked.nproc_per_node, int(asked.max_restarts)) == ("2", "8", 5)
    assert (asked.rdzv_backend, asked.rdzv_endpoint, asked.rdzv_id) == ("c10d", "node1:23456", "123456")
    assert train == ["tiny", "--out", "runs/turnout"]
    check_ranks(load_recipe("tiny", settings), 16)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "recipe.toml").touch()
    _, train, _ = settings_of(ran(script, **SLURM, RUN="mine", RECIPE="smoke"))
    assert train == ["--resume", "mine"]


def test_the_kubernetes_file_starts_a_run_and_goes_on_with_one_that_it_began(
    ran: Callable[..., list[str]], tmp_path: Path
) -> None:
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load((FILES / "kubernetes.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    spec, workers = job["spec"]["elasticPolicy"], job["spec"]["pytorchReplicaSpecs"]["Worker"]
    pod = workers["template"]["spec"]
    (container,) = pod["containers"]
    assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in pod["volumes"]}
    assert workers["replicas"] == spec["minReplicas"] == spec["maxReplicas"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == spec["nProcPerNode"]
    assert container["command"] == ["bash", "-euc"]
    variables = {each["name"]: each["value"] for each in container["env"]} | {"RUN": str(tmp_path / "run")}
    (script,) = container["args"]
    _, train, settings = settings_of(ran(script, **variables))
    assert train == ["tiny", "--out", str(tmp_path / "run")]
    check_ranks(load_recipe("tiny", settings), workers["replicas"] * spec["nProcPerNode"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.toml").touch()
    assert settings_of(ran(script, **variables))[1] == ["--resume", str(tmp_path / "run")]


def ray_example() -> ModuleType:
    found = importlib.util.spec_from_file_location("ray_train", FILES / "ray_train.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def as_ray_does(world: World, folder: Path) -> None:
    """The process group is there already, and the variables; then the run is begun, and gone on with."""
    os.environ |= {"LOCAL_RANK": str(world.rank), "LOCAL_WORLD_SIZE": str(world.size)}
    os.environ["TURNOUT_CACHE"] = str(folder / "cache")
    text, run = f"data.corpus='{folder / 'text'}'", str(folder / "run")
    for settings in ([*SMALL, text], ["loop.steps=3"]):
        ray_example().train_loop({"recipe": "smoke", "run": run, "settings": settings})


def test_the_ray_workers_train_and_go_on(tmp_path: Path) -> None:
    write_text(tmp_path / "text")
    spawn(as_ray_does, 2, tmp_path)
    assert checkpoint.load(tmp_path / "run").meta["counters"]["step"] == 3
    assert (tmp_path / "run" / "summary.json").is_file()
