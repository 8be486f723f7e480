"""Anybody's layer, seen from outside: `package.module:factory` names a function that builds an nn.Module."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from turnout.errors import ConfigError
from turnout.layers import MoE
from turnout.tensors import MoEOutput
from turnout.verify.adapters.own import OwnLayer
from turnout.verify.subject import Layer, NotApplicable, Sizes, Subject


def from_factory(target: str) -> Subject:
    """`package.module:factory`, a function of dim, hidden, num_experts and k (any of them, by name).

    It returns a Layer of its own adapter, or any nn.Module from (B, S, D) to (B, S, D), or to a tuple whose first
    element that is; a module whose forward takes `mask` is given one (bool, False = padding).
    Raises: ConfigError if the module does not exist or raises, or the name does not exist or is not callable.
    """
    module_name, _, name = target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a module runs when it is imported, and can raise anything
        what = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        raise ConfigError(f"cannot import {module_name!r} of {target!r}: {what}") from error
    factory = getattr(module, name, None)
    if not callable(factory):
        raise ConfigError(f"{module_name!r} has no function {name!r}; write package.module:factory")
    return Subject(name=target, build=lambda sizes: _built(factory, sizes), versions={"torch": torch.__version__})


class AnyLayer(Layer):
    """A module of which only input and output are known."""

    def __init__(self, module: nn.Module, sizes: Sizes) -> None:
        super().__init__(module, dim=sizes.dim, num_experts=sizes.num_experts)
        self.takes_mask = "mask" in inspect.signature(module.forward).parameters

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None and not self.takes_mask:
            raise NotApplicable("its forward takes no mask")
        out: Any = self.module(x) if mask is None else self.module(x, mask=mask)
        if isinstance(out, MoEOutput):
            return out.y
        return out[0] if isinstance(out, tuple) else out


def _built(factory: Callable[..., Any], sizes: Sizes) -> Layer:
    known = inspect.signature(factory).parameters
    built = factory(**{name: value for name, value in vars(sizes).items() if name in known})
    if isinstance(built, Layer):
        return built
    if isinstance(built, MoE):
        return OwnLayer(built)
    if not isinstance(built, nn.Module):
        raise ConfigError(f"the factory gave a {type(built).__name__}; needs an nn.Module or a turnout.verify.Layer")
    return AnyLayer(built, sizes)
