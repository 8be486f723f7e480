"""Where turnout keeps what it can make again."""

import os
from pathlib import Path


def default_cache() -> Path:
    """$TURNOUT_CACHE, or ~/.cache/turnout."""
    return Path(os.environ.get("TURNOUT_CACHE") or "~/.cache/turnout").expanduser()


def kernel_cache() -> Path:
    """$TURNOUT_KERNELS, or `kernels` in the cache: compiled code, which another machine or torch does not read."""
    return Path(os.environ.get("TURNOUT_KERNELS") or default_cache() / "kernels").expanduser()
