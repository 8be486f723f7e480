"""What ranks of a pipeline have between them, put together on the first: so a checkpoint is that of the whole model."""

from collections.abc import Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from turnout.comm import StageGroup
from turnout.comm.world import naming

T = TypeVar("T")


def of_stages(value: T, group: StageGroup | None) -> list[T]:
    """What each rank of the pipeline gave, in their order. All of them call it; the values must pickle."""
    if group is None:
        return [value]
    values: list[T | None] = [None] * group.size
    with naming("an agreement of stages"):
        dist.all_gather_object(values, value, group=group.wire)
    return values  # pyright: ignore[reportReturnType]


def joined_stages(own: Mapping[str, Tensor], group: StageGroup) -> dict[str, Tensor]:
    """The tensors of all ranks of the pipeline, on the CPU of the first; on the others their own.

    All of them call it. What several have, as tied ends do, is that of the first of them.
    """
    forms = of_stages({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in own.items()}, group)
    joined, ranks = dict(own), dist.get_process_group_ranks(group.wire)
    for place, form in enumerate(forms[1:], start=1):
        for name in [name for name in form if not any(name in before for before in forms[:place])]:
            shape, dtype = form[name]
            with naming("the gathering of stages"):
                if group.place == place:
                    dist.send(_bytes(own[name].detach().cpu()), ranks[0], group=group.wire)
                elif group.place == 0:
                    joined[name] = torch.empty(shape, dtype=dtype)
                    dist.recv(_bytes(joined[name]), ranks[place], group=group.wire)
    return joined


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
