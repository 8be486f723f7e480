"""Builds what gpu_session.py will run: each config of each layer in a process of its own, for Triton keeps the code."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_fp8
from benchmarks.gpu_times import LAYERS, Layer
from turnout.bench.experts_race import drawn_assignment
from turnout.kernels import Weights
from turnout.kernels.gpu import codes_failure, gates_failure, launcher, proof_failure
from turnout.kernels.gpu.configs import FEW_ROWS, MANY_ROWS, Config

PROOFS = (
    "swiglu bfloat16",
    "swiglu float16",
    "swiglu float32",
    "relu bfloat16",
    "gelu bfloat16",
    "swiglu_clamped bfloat16",
)


def jobs() -> list[str]:
    """What `build` takes."""
    configs = {"many": MANY_ROWS, "few": FEW_ROWS, **gpu_fp8.CONFIGS}
    found = [f"{name}/{kind}/{i}" for kind, rows in configs.items() for name in LAYERS for i in range(len(rows))]
    found += [f"proof/{name}" for name in PROOFS] + [f"codes/{name}" for name in gpu_fp8.PROOFS]
    return found + [f"gates/{number}" for number in range(4)]


def build_all(script: Path, *, most_s: float) -> dict[str, Any]:
    """Every job, as many at once as there are cores; what is not ready in time is stopped, and built when used."""
    begun, waiting = time.monotonic(), jobs()
    running: dict[str, subprocess.Popen[bytes]] = {}
    failed: dict[str, str] = {}
    while (waiting or running) and time.monotonic() - begun < most_s:
        while waiting and len(running) < (os.cpu_count() or 1):
            job = waiting.pop(0)
            command = [sys.executable, str(script), "--build", job]
            running[job] = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for job, process in list(running.items()):
            if process.poll() is not None:
                told = process.communicate()[1].decode(errors="replace").strip().splitlines()
                del running[job]
                if process.returncode:
                    failed[job] = told[-1][:300] if told else f"ended with {process.returncode}"
        time.sleep(0.2)
    for process in running.values():
        process.kill()
        process.wait()
    return {"seconds": round(time.monotonic() - begun, 1), "failed": failed, "not_ready": [*running, *waiting]}


def build(job: str) -> None:
    """One job, in this process. Raises: what Triton raises."""
    name, _, rest = job.partition("/")
    if name in ("proof", "codes"):
        kind, dtype = rest.split()
        failure = (proof_failure if name == "proof" else codes_failure)(
            kind, getattr(torch, dtype), torch.device("cuda")
        )
        if failure:
            raise RuntimeError(failure)
        return
    if name == "gates":
        failure = gates_failure(torch.device("cuda"), int(rest) >= 2, int(rest) % 2 == 1)
        if failure:
            raise RuntimeError(failure)
        return
    rows, _, index = rest.partition("/")
    if rows in gpu_fp8.CONFIGS:
        num_tokens = 16 if rows == "codes-few" else 2048
        gpu_fp8.build(LAYERS[name], gpu_fp8.CONFIGS[rows][int(index)], num_tokens)
        return
    is_few = rows == "few"
    _launch(LAYERS[name], (FEW_ROWS if is_few else MANY_ROWS)[int(index)], 16 if is_few else 2048, train=not is_few)


def _launch(layer: Layer, config: Config, num_tokens: int, *, train: bool) -> None:
    """The kernels as the layer will call them, on few tokens: their code does not depend on how many there are."""
    experts = layer.experts()
    x_TD = torch.randn(num_tokens, layer.dim, device="cuda", dtype=torch.bfloat16)
    assignment = drawn_assignment(num_tokens, layer.num_experts, layer.top_k, device=x_TD.device)
    weights = Weights(
        up_EDG=experts.up_EDG.detach(),
        down_EFD=experts.down_EFD.detach(),
        up_bias_EG=None,
        down_bias_ED=None,
        kind="swiglu",
    )
    weight_N, token_N = assignment.weight_N.detach(), assignment.token_N
    routes = (token_N, assignment.expert_N, None)
    y_TD, up_MG, found = launcher().forward(x_TD, weight_N, *routes, weights, config, top_k=layer.top_k, keep=train)
    if train:
        rest = (weights, found, up_MG, config)
        wanted = (True, True, True, True, False, False)
        launcher().backward(y_TD, x_TD, weight_N, token_N, *rest, top_k=layer.top_k, wanted=wanted)
    torch.cuda.synchronize()
