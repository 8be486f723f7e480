"""Which backend computes the experts, and why."""

import torch
from torch import nn

from turnout.contracts import ExpertBackend
from turnout.errors import ConfigError
from turnout.experts import fused_cpu, grouped_mm, loop, padded_bmm, threaded_mm

# tried in this order by "auto"
PREFERENCE = ("fused_cpu", "threaded_mm", "grouped_mm", "padded_bmm", "loop")
_IMPORTED = (fused_cpu, grouped_mm, loop, padded_bmm, threaded_mm)  # importing a backend's file adds its row


def available_backends(experts: nn.Module, *, dtype: torch.dtype, device: torch.device) -> dict[str, str]:
    """Backend -> why it refuses these experts, or "" when it takes them."""
    answers = {
        name: backend.refusal(experts, dtype=dtype, device=device) for name, backend in ExpertBackend.TABLE.items()
    }
    return {name: "" if refusal is None else refusal.reason for name, refusal in answers.items()}


def choose_backend(experts: nn.Module, name: str, *, dtype: torch.dtype, device: torch.device) -> ExpertBackend:
    """The backend called `name`, or for "auto" the first of PREFERENCE that takes these experts.

    Raises: ConfigError if the named backend refuses: a choice is honoured or refused, never replaced.
    """
    if name == "auto":
        accepted = (
            n for n in PREFERENCE if ExpertBackend.TABLE[n].refusal(experts, dtype=dtype, device=device) is None
        )
        return ExpertBackend.TABLE[next(accepted)]
    backend = ExpertBackend.TABLE[name]
    refusal = backend.refusal(experts, dtype=dtype, device=device)
    if refusal is not None:
        raise ConfigError(f"backend={name!r} cannot run here: {refusal.reason}")
    return backend
