"""How a product is launched: how many programs, its tile, and what the tensor memory accelerator fetches."""

import functools

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from turnout.kernels.fp8_codes import CODES
from turnout.kernels.gpu.configs import CodesConfig, Config, Tile


def settings(x: Tensor, num_experts: int, config: Config, tile: Tile, *, boxed: bool) -> dict:
    """What every product over rows is compiled with."""
    own = {"PRECISION": "ieee", "BLOCK_K": tile.depth}
    return own | tile_settings(x, num_experts, config, tile, boxed=boxed)


def tile_settings(
    x: Tensor, num_experts: int, config: Config | CodesConfig, tile: Tile, *, boxed: bool
) -> dict[str, object]:
    """Those of them that products of codes are compiled with too."""
    return {
        "E": num_experts,
        "WIDEN": widens(x),
        "BLOCK_E": triton.next_power_of_2(num_experts),
        "BLOCK_M": config.rows,
        "BLOCK_N": tile.columns,
        "GROUP": config.group,
        "BOXED": boxed,
        "PERSISTENT": config.persistent,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def widens(x: Tensor) -> bool:
    """Whether numbers are widened before they are multiplied: the CPU is reached by the interpreter alone, which knows
    no products of these.
    """
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, CODES)


def programs(x: Tensor, num: int, num_experts: int, columns: int, config: Config | CodesConfig, tile: Tile) -> int:
    """Enough for any routing: every expert with rows may have one tile that is not full."""
    most = (min(num_experts, num) + num // config.rows) * triton.cdiv(columns, tile.columns)
    return min(most, _multiprocessors(x.device)) if config.persistent else most


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    # the interpreter has none: a few programs that have several tiles each
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def is_boxed(config: Config | CodesConfig, *tensors: Tensor) -> bool:
    """Whether the tensor memory accelerator can fetch of all of them: it wants rows that start at 16 bytes."""
    if not config.boxed:
        return False
    device = tensors[0].device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return False
    return all(tensor.data_ptr() % 16 == 0 and tensor.shape[-1] * tensor.element_size() % 16 == 0 for tensor in tensors)


def given(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A pointer is wanted even where nothing is read."""
    return other if tensor is None else tensor


def boxes(tensor: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """Blocks of rows and columns; of one expert's, where there are experts."""
    return TensorDescriptor.from_tensor(tensor, [*[1] * (tensor.dim() - 2), *block])
