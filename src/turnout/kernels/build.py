"""Compiles the kernel with the machine's own compiler, once for each source, torch and processor."""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from turnout.cache import kernel_cache

SOURCE = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-std=c++17", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
# hidden: of two kernels in a process, for other vectors or of another version, neither may take the other's tables
LINK = ("-shared", "-fPIC", "-pthread", "-fvisibility=hidden")
TIMEOUT_S = 300


@dataclass(frozen=True, kw_only=True)
class Library:
    """A compiled kernel on disk."""

    path: Path

    def load(self) -> ctypes.CDLL:
        return ctypes.CDLL(str(self.path))


def compiled() -> Library | str:
    """The kernel for this machine, compiled now if it is not in the cache; or why there is none."""
    if os.environ.get("TURNOUT_COMPILE") == "0":
        return "compiling is switched off by TURNOUT_COMPILE=0"
    if not {"avx2", "fma"} <= set(cpu_flags().split()):
        return "the compiled kernel needs Linux on a processor with AVX2 and FMA"
    compiler = _compiler()
    if compiler is None:
        return "the compiled kernel needs a C++ compiler: install g++, or name one in $CXX"
    path = kernel_cache() / f"fused-{_key(compiler)}.so"
    if not path.exists():
        # shown where logging is left as it is: a first call that takes many seconds should say why
        logging.getLogger(__name__).warning("compiling the CPU kernel, once on this machine: 10 to 20 seconds")
        try:
            failure = _compile(compiler, path)
        except (OSError, subprocess.SubprocessError) as error:
            failure = str(error)
        if failure:
            return f"{compiler} cannot compile the kernel: {failure}"
    return Library(path=path)


@functools.cache
def cpu_flags() -> str:
    """Model and instruction sets of the processor, as Linux tells them; empty elsewhere."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = file.read().partition("\n\n")[0].splitlines()
    except OSError:
        return ""
    wanted = ("model name", "flags")
    return "\n".join(line.partition(":")[2].strip() for line in lines if line.startswith(wanted))


def has_vnni() -> bool:
    """Whether the processor multiplies and adds four bytes at once."""
    return not {"avx512_vnni", "avx_vnni"}.isdisjoint(cpu_flags().split())


def _compiler() -> str | None:
    names = (os.environ.get("CXX"), "g++", "c++", "clang++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _key(compiler: str) -> str:
    """Whatever changes the code or what it was proven with."""
    facts = [torch.__version__, cpu_flags(), *FLAGS, *LINK]
    real = Path(compiler).resolve()
    facts += [str(real), str(real.stat().st_size)]
    facts += [path.name + path.read_text(encoding="utf-8") for path in sorted(SOURCE.glob("*.[hc]*"))]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:20]


def _compile(compiler: str, path: Path) -> str:
    """What went wrong, or nothing. The file appears whole: of two processes the last to finish wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
        fresh = Path(folder) / path.name
        command = [compiler, *FLAGS, *LINK, "-o", str(fresh), str(SOURCE / "fused.cpp")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            return lines[0] if lines else f"it ended with {done.returncode}"
        os.replace(fresh, path)
    return ""
