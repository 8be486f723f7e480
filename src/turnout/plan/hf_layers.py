"""Which blocks of a config.json have experts, and which see a window alone."""

from collections.abc import Mapping, Sequence
from typing import Any

from turnout.errors import ConfigError
from turnout.plan.hf_families import Family
from turnout.plan.hf_fields import find, positive

_ALL = ("full_attention", "attention", "global")
_WINDOWED = ("sliding_attention", "chunked_attention", "local")


# --- experts ---


def sparse_of(data: Mapping[str, Any], layers: int) -> tuple[int, int]:
    """(blocks in front that stay dense, every how many-th block after them has experts).

    Raises: ConfigError naming the field whose list is not of that kind.
    """
    frequency = data.get("moe_layer_freq")
    if isinstance(frequency, list):
        return _regular("moe_layer_freq", [i for i, sparse in enumerate(frequency) if sparse], layers)
    dense_first = positive(data, "first_k_dense_replace") or positive(data, "moe_layer_start_index") or 0
    every = positive(data, "moe_layer_freq") or find(data, "sparse_step") or 1
    steps = {positive(data, name) for name in ("encoder_sparse_step", "decoder_sparse_step")} - {None}
    if len(steps) > 1:
        raise ConfigError(
            f"config.json: encoder_sparse_step and decoder_sparse_step {sorted(map(str, steps))} must be equal"
        )
    last = positive(data, "moe_layer_end_index")
    if last is not None and last < layers - 1:
        raise ConfigError(
            f"config.json: moe_layer_end_index={last} leaves dense blocks at the end; must be {layers - 1}"
        )
    for name, sparse in (("mlp_only_layers", False), ("moe_layers", True)):
        listed = data.get(name)
        if listed:
            usual = [i for i in range(layers) if i >= dense_first and (i - dense_first) % every == every - 1]
            return _regular(name, listed if sparse else [i for i in usual if i not in listed], layers)
    return min(layers, dense_first), every


def _regular(name: str, sparse: Sequence[int], layers: int) -> tuple[int, int]:
    for dense_first in range(layers + 1):
        for every in range(1, layers + 1):
            if [i for i in range(dense_first, layers) if (i - dense_first) % every == every - 1] == list(sparse):
                return dense_first, every
    raise ConfigError(f"config.json: {name} puts experts in blocks {list(sparse)[:12]}, which are not every n-th one")


# --- windows ---


def window_of(data: Mapping[str, Any], layers: int) -> int:
    """Tokens that a windowed block sees; 0: no block is windowed."""
    window = positive(data, "sliding_window") or positive(data, "attention_chunk_size") or 0
    types = _types(data, layers)
    if types and not any(types):
        return 0
    if types and not window:
        raise ConfigError("config.json: layer_types has windowed blocks, and sliding_window does not say how wide")
    if not types and data.get("use_sliding_window") is False:
        return 0
    first = positive(data, "max_window_layers")
    if window and not types and data.get("use_sliding_window") and first and first < layers:
        raise ConfigError(f"config.json: max_window_layers={first} of {layers} blocks see all; give layer_types")
    return window


def full_every_of(data: Mapping[str, Any], layers: int, family: Family) -> int:
    """With a window, every n-th block that still sees all; 0: none does.

    Raises: ConfigError naming the field whose blocks are not of that kind.
    """
    types = _types(data, layers)
    if not types:
        pattern = data.get("sliding_window_pattern") or data.get("_sliding_window_pattern")
        # Exaone writes LLLG
        return len(pattern) if isinstance(pattern, str) else pattern or family.full_every
    if all(types) or not any(types):
        return 0
    every = types.index(False) + 1
    if types != [i % every != every - 1 for i in range(layers)]:
        raise ConfigError(f"config.json: layer_types={data['layer_types'][:8]}... is not every n-th block seeing all")
    return every


def _types(data: Mapping[str, Any], layers: int) -> list[bool]:
    """Whether each block is windowed; empty where the file does not say."""
    types = data.get("layer_types") or []
    # MiniMax: 0 is linear attention
    if not all(data.get("attn_type_list") or ()):
        raise ConfigError("config.json: attn_type_list has 0: blocks without plain attention are not planned")
    for each in types:
        if each not in (*_ALL, *_WINDOWED):
            raise ConfigError(f"config.json: layer_types has {each!r}: blocks without plain attention are not planned")
    if types and len(types) != layers:
        raise ConfigError(f"config.json: layer_types has {len(types)} entries for {layers} blocks")
    return [each in _WINDOWED for each in types]
