"""Proof, on this machine, that each expert backend computes what the dense oracle computes."""

import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor

from turnout.contracts import ExpertBackend
from turnout.errors import TurnoutError
from turnout.layers import MoE
from turnout.tensors import total_loss

OPTIONAL = {
    "transformers": "hf, bench",
    "tensorboard": "track",
    "matplotlib": "plot",
    "fastapi": "serve",
    "wandb": "none: pip install wandb",
    "trackio": "none: pip install trackio",
}
TOLERANCE = 1e-5


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One part of the installation; `proven` means it was run and gave the right answer."""

    name: str
    available: bool
    proven: bool
    reason: str


def examine() -> dict[str, list[Finding]]:
    """Backends (tried forward and backward against the loop in float64), transports, optional dependencies."""
    return {
        "backends": [_try_backend(name) for name in ExpertBackend.TABLE.names()],
        "transports": [_gloo()],
        "optional": [_optional(name, extra) for name, extra in OPTIONAL.items()],
    }


def _try_backend(name: str) -> Finding:
    try:
        pairs = zip(_run(name, torch.float32), _run("loop", torch.float64), strict=True)
        # torch's max keeps NaN, Python's would drop it
        worst = float(
            torch.stack([(got - want).abs().max() / want.abs().max().clamp(min=1) for got, want in pairs]).max()
        )
    except TurnoutError as error:
        return Finding(name=name, available=False, proven=False, reason=str(error))
    except RuntimeError as error:
        return Finding(name=name, available=True, proven=False, reason=f"failed: {error}")
    proven = worst < TOLERANCE
    return Finding(
        name=name, available=True, proven=proven, reason=f"forward and backward in float32, worst error {worst:.1e}"
    )


def _run(backend: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    layer = MoE(dim=20, hidden=12, num_experts=5, backend=backend)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    x = torch.randn(33, 20, generator=generator).to(dtype).requires_grad_()
    out = layer.to(dtype)(x)
    (out.y.square().sum() + total_loss(out.losses)).backward()
    return [t.double() for t in (out.y.detach(), x.grad, *(p.grad for p in layer.parameters())) if t is not None]


def _gloo() -> Finding:
    available = torch.distributed.is_available() and torch.distributed.is_gloo_available()
    return Finding(
        name="gloo", available=available, proven=False, reason="not used: this version trains in one process"
    )


def _optional(name: str, extra: str) -> Finding:
    available = importlib.util.find_spec(name) is not None
    return Finding(name=name, available=available, proven=False, reason="found" if available else f"extra: {extra}")
