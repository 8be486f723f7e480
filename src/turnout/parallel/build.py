"""A decoder made where it is laid out: no rank holds more than its part and one module whole, or before, one block.

torch's meta device gives a model that has shapes alone; it is cut and sharded, and `to_empty` gives what is left of it
room. Values are drawn module by module, each whole, in the order in which one process would: so the same seed gives the
same model on any layout, which initial values drawn shard by shard would not.
"""

from itertools import chain
from typing import Literal

import torch
from torch import Tensor, nn

from turnout.comm import World
from turnout.comm.world import current_world
from turnout.models import Decoder, ModelConfig
from turnout.models.decoder import build_block
from turnout.parallel.apply import TIMEOUT_S, apply, lay_out
from turnout.parallel.boxes import Layout
from turnout.parallel.fully_sharded import here
from turnout.parallel.layout import Parallel
from turnout.parallel.shards import Shards
from turnout.strategy import Strategy


def build(
    config: ModelConfig,
    strategy: Strategy | Literal["auto"],
    *,
    world: World | None = None,
    timeout_s: float = TIMEOUT_S,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Decoder, Parallel]:
    """`Decoder(config)` with a strategy applied to it, as `apply` does; weights and generator are then those of one
    process, whose seed all ranks have.

    Raises: as `apply`.
    """
    world = current_world() if world is None else world
    if world.size == 1:
        model = Decoder(config).to(device, dtype)
        return model, apply(model, strategy, world=world, timeout_s=timeout_s, cuda=device == "cuda")
    # a decoder's blocks draw weights when they are made, before all are drawn in turn
    for layer in range(config.num_layers):
        build_block(config, layer=layer)
    with torch.device("meta"):
        model, whole = Decoder(config).to(dtype), Decoder(config)
    parallel = lay_out(model, strategy, world=world, timeout_s=timeout_s, device=device)
    model.to_empty(device=device)
    fill(model, whole, parallel.shards)
    return model, parallel


@torch.no_grad()
def fill(model: nn.Module, whole: Decoder, shards: Shards) -> None:
    """Initial weights into what this rank has of a model; `whole`: the same before it was cut, on the meta device."""
    tensors = dict(chain(model.named_parameters(), model.named_buffers()))
    for name, module in whole.in_turn():
        module.to_empty(device="cpu", recurse=False)
        whole.draw(module)
        for own, tensor in chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
            full = f"{name}.{own}" if name else own
            if full in tensors:
                _take(here(tensors[full]), tensor, shards.layout(full, tuple(tensor.shape)))
        module.to_empty(device="meta", recurse=False)


def _take(own: Tensor, whole: Tensor, layout: Layout) -> None:
    """The boxes of the whole that lie here."""
    for block in layout.blocks:
        there, at = own, whole
        for dim, (to, start, size) in enumerate(zip(block.part_at, block.whole_at, block.sizes, strict=True)):
            there, at = there.narrow(dim, to, size), at.narrow(dim, start, size)
        there.copy_(at)
