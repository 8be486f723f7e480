"""Which backend computes the experts, and why."""

import torch
from torch import nn

from turnout.contracts import ExpertBackend
from turnout.errors import ConfigError
from turnout.experts import fused_cpu, fused_fp8, fused_int8, fused_triton, grouped_mm, loop, padded_bmm, threaded_mm

# tried in this order by "auto"
PREFERENCE = ("fused_int8", "fused_fp8", "fused_cpu", "fused_triton", "threaded_mm", "grouped_mm", "padded_bmm", "loop")
# importing a backend's file adds its row
_IMPORTED = (fused_cpu, fused_fp8, fused_int8, fused_triton, grouped_mm, loop, padded_bmm, threaded_mm)


def available_backends(experts: nn.Module, *, dtype: torch.dtype, device: torch.device) -> dict[str, str]:
    """Backend -> why it refuses these experts, or "" when it takes them."""
    answers = {
        name: backend.refusal(experts, dtype=dtype, device=device) for name, backend in ExpertBackend.TABLE.items()
    }
    return {name: "" if refusal is None else refusal.reason for name, refusal in answers.items()}


def passed_by(experts: nn.Module, *, dtype: torch.dtype, device: torch.device) -> dict[str, str]:
    """Backend -> why "auto" would not take it, or "" where it would: it is held back, or refuses."""
    return {name: _passes_by(backend, experts, dtype, device) for name, backend in ExpertBackend.TABLE.items()}


def choose_backend(experts: nn.Module, name: str, *, dtype: torch.dtype, device: torch.device) -> ExpertBackend:
    """The backend called `name`, or for "auto" the first of PREFERENCE that takes these experts and is not held back.

    Raises: ConfigError if the named backend refuses: a choice is honoured or refused, never replaced.
    """
    if name == "auto":
        accepted = (n for n in PREFERENCE if not _passes_by(ExpertBackend.TABLE[n], experts, dtype, device))
        return ExpertBackend.TABLE[next(accepted)]
    backend = ExpertBackend.TABLE[name]
    refusal = backend.refusal(experts, dtype=dtype, device=device)
    if refusal is not None:
        raise ConfigError(f"backend={name!r} cannot run here: {refusal.reason}")
    return backend


def _passes_by(backend: ExpertBackend, experts: nn.Module, dtype: torch.dtype, device: torch.device) -> str:
    # asked in this order: a refusal may have to compile and prove a kernel first
    for question in (backend.held_back, backend.refusal):
        answer = question(experts, dtype=dtype, device=device)
        if answer is not None:
            return answer.reason
    return ""
