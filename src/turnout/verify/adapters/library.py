"""Another library's module, or one clear sentence about what to install."""

import importlib
from collections.abc import Sequence
from importlib.metadata import version
from types import ModuleType

import torch

from turnout.errors import ConfigError


def library_module(name: str, *, install: str) -> ModuleType:
    """The module `name` of another library; `install` is what pip is to be told where it is absent.

    Raises: ConfigError if it, or something it needs, is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"{name.partition('.')[0]} cannot be imported ({error}): pip install {install}") from error


def known_layer(library: str, name: str, names: Sequence[str]) -> None:
    """Raises: ConfigError if the adapter of `library` has no layer `name`."""
    if name not in names:
        raise ConfigError(f"unknown {library} layer {name!r}; available: {', '.join(names)}")


def versions(distribution: str) -> dict[str, str]:
    return {distribution: version(distribution), "torch": torch.__version__}
