"""Device and precision a run computes in."""

from typing import Literal

import torch

from turnout.errors import ConfigError
from turnout.models import ModelConfig
from turnout.train.recipe import Recipe

LEAST_BFLOAT16_WIDTH = 512  # of matrices on a processor


def pick_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Raises: ConfigError if cuda is asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("loop.device=cuda, but torch sees no CUDA device; use loop.device=cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def compute_dtype(device: torch.device, recipe: Recipe) -> torch.dtype:
    """The dtype matrices are multiplied in; weights and optimizer stay float32."""
    precision = recipe.loop.precision
    wanted = precision == "bfloat16" or (precision == "auto" and _gains_by_bfloat16(device, recipe.model))
    return torch.bfloat16 if wanted else torch.float32


def _gains_by_bfloat16(device: torch.device, model: ModelConfig) -> bool:
    """Whether a training step is faster in bfloat16: on a processor it takes matrix units (AMX) and wide matrices.

    oneDNN compiles a product for every number of rows it has not seen, and small experts see a new one each step:
    `tiny` (64 by 128) trains at 0.4 of its float32 speed, a layer of 512 by 2,048 at twice (docs/LOG.md, 2026-11-22).
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    hidden = model.hidden if model.moe is None else model.moe.hidden
    return torch.cpu._is_amx_tile_supported() and min(model.dim, hidden) >= LEAST_BFLOAT16_WIDTH


def autocast_for(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The autocast context for a compute dtype; for float32 it does nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
