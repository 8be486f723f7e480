"""Who of others can run in the case `layer` on this machine, why not, and where they are not alike."""

from collections.abc import Sequence
from importlib.util import find_spec

import torch

from turnout.bench.layer_others import BENCH, OTHERS
from turnout.bench.layer_peers import THEIRS
from turnout.bench.routers import Shape
from turnout.experts.activations import Activation
from turnout.kernels.arguments import FEW_ROWS
from turnout.train.estimate import memory_here

IMPLEMENTATIONS = ("grouped_mm", "eager", "batched_mm")
GIB = 2**30


def other_refusals(shape: Shape, dtype: torch.dtype, *, skew: float, asked: Sequence[str] = ()) -> dict[str, str]:
    """For each peer that is not ours why it is not measured, empty if it is; `asked`: those that the user named."""
    refused = dict.fromkeys((f"{THEIRS}{name}" for name in IMPLEMENTATIONS), _absent("transformers", BENCH))
    batched = f"{THEIRS}batched_mm"
    refused[batched] = refused[batched] or _gathering(shape, dtype, asked=batched in asked)
    for name, peer in OTHERS.items():
        cannot = "its experts cannot be given, as --skew does" if skew and not peer.takes_choices else ""
        refused[name] = _absent(peer.library, peer.install) or cannot or peer.refuses(shape, dtype)
    # named because it is looked for
    why = "its experts compute in bfloat16 whatever the dtype; sort-grouped_mm goes its way in any"
    return refused | {"torchtitan": why}


def differences(name: str, shape: Shape) -> list[str]:
    """Where a peer's layer is not alike ours."""
    if name in OTHERS:
        return list(OTHERS[name].differs)
    one = name.startswith(THEIRS) and shape.k == 1
    return ["weighs a token's one choice by 1, not by its probability"] if one else []


def _absent(library: str, install: str) -> str:
    return f"not installed: pip install {install}" if library and find_spec(library) is None else ""


def _gathering(shape: Shape, dtype: torch.dtype, *, asked: bool) -> str:
    """Why a weight of its own for every choice of every token is too much."""
    if shape.tokens <= FEW_ROWS:
        return ""
    parts = 3 if Activation.TABLE[shape.expert].gated else 2
    needed = shape.tokens * shape.k * parts * shape.dim * shape.hidden * dtype.itemsize
    memory = memory_here(torch.device("cpu"))
    says = f"gathers {needed / GIB:.0f} GiB of weights"
    if 2 * needed > memory:
        return f"{says}, more than half of this machine's {memory / GIB:.0f}"
    return "" if asked else f"{says}: measured where it is named"
