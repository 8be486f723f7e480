"""In which precisions experts infer, and how a model's experts come into one."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar, cast

from torch import nn

from turnout.errors import ConfigError
from turnout.experts.float8 import Float8FFNExperts
from turnout.experts.quantized import INT8_BITS, QuantizedFFNExperts
from turnout.experts.rounded import RoundedExperts
from turnout.experts.weights import FFNExperts
from turnout.registry import nearest

# what `quantize_experts` and the command line take: whole numbers for a CPU, floating point for a GPU
PRECISIONS = (*INT8_BITS, "fp8")

Model = TypeVar("Model", bound=nn.Module)


def quantize_experts(model: Model, *, precision: str = "int8", activation_bits: int | None = None) -> Model:
    """The model with the weights of all its feed-forward experts in 8 bits, changed in place; for inference.

    `precision`: int8, int8-a8 (activations of 8 bits too) or fp8 (e4m3, rows too); any runs on any machine, fast by
    `fused_int8` on a CPU and `fused_fp8` on a GPU. `activation_bits`: 16 or 8, another way to say int8 or int8-a8.
    Raises: ConfigError if it has no such experts, the precision is unknown, or the two contradict each other;
    NonFiniteError if a weight is NaN or infinite.
    """
    round_experts = _rounding(precision, activation_bits)
    found = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if isinstance(child, FFNExperts)
    ]
    if not found:
        raise ConfigError(f"{type(model).__name__} has no feed-forward experts to quantise; give it a MoE layer")
    made = [round_experts(cast(FFNExperts, child)) for _, _, child in found]
    for (module, name, _), experts in zip(found, made, strict=True):
        setattr(module, name, experts)
    return model


def _rounding(precision: str, activation_bits: int | None) -> Callable[[FFNExperts], RoundedExperts]:
    if precision not in PRECISIONS:
        raise ConfigError(
            f"unknown precision {precision!r}; available: {', '.join(PRECISIONS)}{nearest(precision, list(PRECISIONS))}"
        )
    if precision != "int8" and activation_bits is not None:
        raise ConfigError(
            f"precision={precision!r} rounds activations to 8 bits; activation_bits={activation_bits} is for 'int8'"
        )
    if precision == "fp8":
        return Float8FFNExperts.of
    bits = INT8_BITS[precision] if activation_bits is None else activation_bits
    return partial(QuantizedFFNExperts.of, activation_bits=bits)
