"""Device and precision a run computes in."""

from typing import Literal

import torch

from turnout.errors import ConfigError


def pick_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Raises: ConfigError if cuda is asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("loop.device=cuda, but torch sees no CUDA device; use loop.device=cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 natively; without units for it, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def compute_dtype(device: torch.device, precision: Literal["auto", "float32", "bfloat16"]) -> torch.dtype:
    """The dtype matrices are multiplied in; weights and optimizer stay float32."""
    wanted = precision == "bfloat16" or (precision == "auto" and has_fast_bfloat16(device))
    return torch.bfloat16 if wanted else torch.float32


def autocast_for(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The autocast context for a compute dtype; for float32 it does nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
