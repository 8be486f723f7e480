"""Triton's kernels for router and experts of a layer on a GPU: loaded when asked for, proven there, then trusted."""

import functools
import hashlib
import importlib
import importlib.util
import os
from pathlib import Path
from types import ModuleType

import torch

LEAST_CAPABILITY = (8, 0)  # of which every dtype here has matrix units
CODES_CAPABILITY = (8, 9)  # and 8-bit floating point too
MOST_EXPERTS = 1024  # one program adds up their counts


# torch.compile asks once, here and below, instead of tracing what looks for a device, reads a file or compiles a kernel
@torch.compiler.assume_constant_result
def device_failure(device: torch.device, name: str = "fused_triton", least: tuple[int, int] = LEAST_CAPABILITY) -> str:
    """Why no kernel of Triton that wants such a capability runs there, or nothing; `name`: who wants to know."""
    if device.type != "cuda":
        is_interpreted = device.type == "cpu" and is_interpreting()
        return _triton_failure(name) if is_interpreted else f"{name} computes on CUDA, not on {device.type}"
    if not torch.cuda.is_available():
        return f"{name} computes on CUDA, and torch finds no such device here"
    if torch.version.hip:
        return f"{name} is written for NVIDIA's GPUs and was never tried on others"
    capability = torch.cuda.get_device_capability(device)
    if capability < least:
        wanted, there = (".".join(map(str, each)) for each in (least, capability))
        return f"{name} needs compute capability {wanted} or later; this device has {there}"
    return _triton_failure(name)


@torch.compiler.assume_constant_result
def proof_failure(kind: str, dtype: torch.dtype, device: torch.device) -> str:
    """Why the kernels of such experts are not trusted there, or nothing; the first call on a machine takes a while."""
    return _doubt("proof", device, kind, dtype)


@torch.compiler.assume_constant_result
def gates_failure(device: torch.device, sigmoid: bool, renormalize: bool) -> str:
    """Why the kernels of such a router are not trusted there, or nothing; the first call on a machine takes a while."""
    return _doubt("gates_proof", device, sigmoid, renormalize)


@functools.cache
def chooser() -> ModuleType:
    """The module that calls the kernels of a router; as `launcher`."""
    return importlib.import_module("turnout.kernels.gpu.choose")


@torch.compiler.assume_constant_result
def codes_failure(kind: str, dtype: torch.dtype, device: torch.device) -> str:
    """As `proof_failure`, of experts in 8-bit floating point; `dtype` is that of the tokens."""
    return _doubt("fp8_proof", device, kind, dtype)


@functools.cache
def codes_launcher() -> ModuleType:
    """The module that calls the kernels of experts in 8-bit floating point; as `launcher`."""
    return importlib.import_module("turnout.kernels.gpu.fp8_launch")


@functools.cache
def launcher() -> ModuleType:
    """The module that calls the kernels; it imports Triton, which not every installation has."""
    return importlib.import_module("turnout.kernels.gpu.launch")


@functools.cache
def source_hash() -> str:
    """Changes with the kernels: what was measured or proven of others says nothing of these."""
    texts = [path.name + path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


def is_interpreting() -> bool:
    """Whether Triton computes on the CPU, line by line: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _doubt(proof: str, device: torch.device, *which: object) -> str:
    prove = importlib.import_module(f"turnout.kernels.gpu.{proof}").prove
    return importlib.import_module("turnout.kernels.gpu.trust").once_on(device, prove, proof, *which)


def _triton_failure(name: str) -> str:
    if importlib.util.find_spec("triton") is None:
        return f"{name} needs Triton, which torch brings along where it is built for CUDA: pip install triton"
    return ""
