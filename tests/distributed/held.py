"""Bytes in tensors that live at a time, of those made meanwhile."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Held(TorchDispatchMode):
    """While the context lasts every new storage on the CPU counts, until it is gone."""

    def __init__(self) -> None:
        super().__init__()
        self._now: dict[int, int] = {}
        self.most_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu" and type(tensor) is Tensor:
                self._note(tensor.untyped_storage())
        return found

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._now:
            weakref.finalize(storage, self._now.pop, key, None)
        self._now[key] = storage.nbytes()
        self.most_bytes = max(self.most_bytes, sum(self._now.values()))
