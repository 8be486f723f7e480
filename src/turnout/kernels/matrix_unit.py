"""The kernel on the processor's matrix unit (Intel AMX): where there is one, and once it is proven too."""

import functools
import os
from collections.abc import Callable
from pathlib import Path

from turnout.kernels import trusted_kernel
from turnout.kernels.build import Library, compiled
from turnout.kernels.kernel import Kernel
from turnout.kernels.proof import once

SETTING = "TURNOUT_AMX"


def by_matrix_unit(kernel: Kernel, prove: Callable[[Kernel], str], proof: Path) -> Kernel | str:
    """The kernel that computes by the matrix unit, once `prove` has nothing against it; or why there is none."""
    if os.environ.get(SETTING) == "0":
        return f"AMX is switched off by {SETTING}=0"
    unit = kernel.with_matrix_unit()
    if isinstance(unit, str):
        return unit
    return once(functools.partial(prove, unit), proof) or unit


def trusted_by_matrix_unit(prove: Callable[[Kernel], str], suffix: str) -> Kernel | str:
    """That of this machine's kernel; what was proven is kept beside the library, under a name with this ending."""
    kernel, library = trusted_kernel(), compiled()
    if isinstance(kernel, str):
        return kernel
    assert isinstance(library, Library)
    return by_matrix_unit(kernel, prove, library.path.with_suffix(suffix))
