"""Turnout: Mixture-of-Experts for PyTorch. Public names load lazily, so that planning never imports torch."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # for type checkers and editors alone: at run time __getattr__ loads these names when they are used
    from turnout import (
        dispatch,
        errors,
        experts,
        hme,
        layers,
        losses,
        models,
        parallel,
        plan,
        presets,
        reference,
        routers,
    )
    from turnout.layers import MoE, MoEConfig
    from turnout.strategy import Strategy
    from turnout.tensors import LossTerm, MoEOutput, MoEStats, total_loss

__version__ = "0.1.0"

_HOME = {
    "LossTerm": "turnout.tensors",
    "MoE": "turnout.layers",
    "MoEConfig": "turnout.layers",
    "MoEOutput": "turnout.tensors",
    "MoEStats": "turnout.tensors",
    "Strategy": "turnout.strategy",
    "total_loss": "turnout.tensors",
}
_MODULES = (
    "dispatch",
    "errors",
    "experts",
    "hme",
    "layers",
    "losses",
    "models",
    "parallel",
    "plan",
    "presets",
    "reference",
    "routers",
)

__all__ = [
    "LossTerm",
    "MoE",
    "MoEConfig",
    "MoEOutput",
    "MoEStats",
    "Strategy",
    "__version__",
    "dispatch",
    "errors",
    "experts",
    "hme",
    "layers",
    "losses",
    "models",
    "parallel",
    "plan",
    "presets",
    "reference",
    "routers",
    "total_loss",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"turnout.{name}")
    raise AttributeError(f"module 'turnout' has no attribute {name!r}")
