"""Where turnout keeps what it can make again, and paths as a user writes them."""

import os
from pathlib import Path

from turnout.errors import ConfigError


def default_cache() -> Path:
    """$TURNOUT_CACHE, or ~/.cache/turnout."""
    return path_of(os.environ.get("TURNOUT_CACHE") or "~/.cache/turnout")


def kernel_cache() -> Path:
    """$TURNOUT_KERNELS, or `kernels` in the cache: compiled code, which another machine or torch does not read."""
    return path_of(os.environ.get("TURNOUT_KERNELS") or str(default_cache() / "kernels"))


def path_of(text: str) -> Path:
    """The path a user wrote, `~` and `~name` read as home folders.

    Raises: ConfigError if there is no such home folder.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"path {text!r}: this machine knows no home folder {text.split('/')[0]!r}; write the folder out, or "
            f"./{text} for a name that begins so"
        ) from error
