"""The CPU kernel: C++ compiled on first use, proven against the oracle on this machine, and only then trusted."""

import functools

import torch
from torch import Tensor

from turnout.kernels.arguments import KINDS, Chosen, Gradients, Int8Weights, Routing, Weights
from turnout.kernels.build import compiled
from turnout.kernels.kernel import Kernel
from turnout.kernels.proof import once, prove
from turnout.tensors import is_traced

__all__ = [
    "KINDS",
    "Chosen",
    "Gradients",
    "Int8Weights",
    "Kernel",
    "Routing",
    "Weights",
    "kernel_for",
    "trusted_kernel",
]


@functools.cache
def trusted_kernel() -> Kernel | str:
    """The kernel of this machine, or why there is none. The first call on a machine compiles it, for some seconds."""
    library = compiled()
    if isinstance(library, str):
        return library
    try:
        kernel = Kernel(library.load())
    except OSError as error:
        return f"the compiled kernel cannot be loaded: {error}"
    return once(functools.partial(prove, kernel), library.path.with_suffix(".proven")) or kernel


def kernel_for(rows: Tensor) -> Kernel | None:
    """The kernel, where it can read such rows: float32 in this machine's memory, which nothing traces."""
    if rows.dtype != torch.float32 or rows.device.type != "cpu" or is_traced(rows):
        return None
    kernel = trusted_kernel()
    return kernel if isinstance(kernel, Kernel) else None
