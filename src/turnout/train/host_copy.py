"""Tensors copied to memory of the host, so that training can change them while the copies are written."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class HostCopy:
    """Owns a buffer for each tensor it was ever given; it is filled anew each time, so one copy is good until the next.

    It costs the host as much memory as the tensors have. Beside a CUDA device the buffers are pinned.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same names and values; what was the very same memory is so again."""
        copies: dict[str, Tensor] = {}
        known: dict[tuple[Any, ...], Tensor] = {}
        for name, tensor in tensors.items():
            place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if not tensor.numel() or place not in known:
                known[place] = self._filled(name, tensor)
            copies[name] = known[place]
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return copies

    def _filled(self, name: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[name] = buffer
        return buffer.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
