"""Triton's kernels for the experts of a layer on a GPU: loaded when asked for, proven there, only then trusted."""

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch

LEAST_CAPABILITY = (8, 0)  # of which every dtype here has matrix units
MOST_EXPERTS = 1024  # one program adds up their counts


def device_failure(device: torch.device) -> str:
    """Why no kernel of Triton runs there, or nothing."""
    if device.type != "cuda":
        is_interpreted = device.type == "cpu" and is_interpreting()
        return _triton_failure() if is_interpreted else f"fused_triton computes on CUDA, not on {device.type}"
    if not torch.cuda.is_available():
        return "fused_triton computes on CUDA, and torch finds no such device here"
    if torch.version.hip:
        return "fused_triton is written for NVIDIA's GPUs and was never tried on others"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f"fused_triton needs compute capability 8.0 or later; this device has {'.'.join(map(str, capability))}"
    return _triton_failure()


@functools.cache
def proof_failure(kind: str, dtype: torch.dtype, device: torch.device) -> str:
    """Why the kernels of such experts are not trusted there, or nothing; the first call on a machine takes a while."""
    return importlib.import_module("turnout.kernels.gpu.proof").prove_once(kind, dtype, device)


@functools.cache
def launcher() -> ModuleType:
    """The module that calls the kernels; it imports Triton, which not every installation has."""
    return importlib.import_module("turnout.kernels.gpu.launch")


def is_interpreting() -> bool:
    """Whether Triton computes on the CPU, line by line: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_failure() -> str:
    if importlib.util.find_spec("triton") is None:
        return "fused_triton needs Triton, which torch brings along where it is built for CUDA: pip install triton"
    return ""
