"""What a pass of the compiled kernel takes of memory: for a process of its own."""

import gc
from pathlib import Path

import torch

from turnout.kernels import Kernel
from turnout.kernels.arguments import Weights
from turnout.kernels.proof import assignment_of


def backward_MiB(
    kernel: Kernel, num_threads: int, num_tokens: int, dim: int, hidden: int, num_experts: int, k: int
) -> tuple[float, float]:
    """At most, with the gradients, and what stays without them; above what was resident before. In float32."""
    torch.set_num_threads(num_threads)
    x_TD, expert_TK = torch.randn(num_tokens, dim), torch.arange(num_tokens * k).view(num_tokens, k) % num_experts
    weights = Weights(
        up_EDG=torch.randn(num_experts, dim, hidden),
        down_EFD=torch.randn(num_experts, hidden, dim),
        up_bias_EG=None,
        down_bias_ED=None,
        kind="gelu",
    )
    assignment = assignment_of(torch.rand(num_tokens * k), expert_TK, num_experts)
    routing = kernel.sort(assignment, None)
    saved = torch.randn(kernel.saved_size(weights, routing.num_rows, x_TD.dtype))
    # from here on the most that is resident
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = _resident_MiB("VmRSS")
    wanted = (True,) * 4 + (False,) * 2
    found = kernel.backward(x_TD, x_TD, assignment.weight_N, weights, routing, saved, wanted=wanted)
    peak = _resident_MiB("VmHWM") - before
    del found
    gc.collect()
    return peak, _resident_MiB("VmRSS") - before


def _resident_MiB(name: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))
