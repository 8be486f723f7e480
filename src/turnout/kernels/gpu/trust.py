"""What a proof has against Triton's kernels on a device; and where it is kept that one had nothing."""

import hashlib
from collections.abc import Callable
from functools import partial

import torch
import triton

from turnout.cache import kernel_cache
from turnout.kernels.gpu import source_hash
from turnout.kernels.proof import once


def doubt(kernels: str, worst: Callable[[], float], bound: float, off: str) -> str:
    """Why not to trust kernels whose worst difference is not below a bound, or that do not run; or nothing.

    `off`: how a difference is told of, with a place for it.
    """
    try:
        found = worst()
    except Exception as error:  # whatever Triton, its compiler or the driver raise
        first_line = next(iter(str(error).strip().splitlines()), "")
        return f"{kernels} do not run here: {type(error).__name__}: {first_line}"
    # not <: NaN is no proof
    return "" if found < bound else f"{kernels} are {off.format(found)}"


def once_on(device: torch.device, prove: Callable[..., str], name: str, *which: object) -> str:
    """What `prove` says of `which` kernels there. The interpreter proves anew in each process.

    On a device a proof that succeeded is kept, until anything changes in the code or in what it was proven with.
    """
    ask = partial(prove, *which, device)
    if device.type != "cuda":
        return ask()
    facts = [*map(str, which), torch.__version__, triton.__version__]
    facts += [torch.cuda.get_device_name(device), str(torch.version.cuda), source_hash()]
    key = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:20]
    return once(ask, kernel_cache() / f"triton-{name}-{key}.proven")
