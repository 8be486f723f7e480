"""Which boxes of a whole tensor a rank has, and where they lie in what it has of it."""

import math
from dataclasses import dataclass

from torch import Tensor

from turnout.experts.cut import Block, Cut
from turnout.parallel.dense_cuts import DenseCut
from turnout.parallel.fully_sharded import Sharding


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What of one logical tensor lies on this rank."""

    whole: tuple[int, ...]  # its shape
    here: tuple[int, ...]  # the shape of what lies here
    blocks: tuple[Block, ...]  # boxes of the whole, placed in `here`; none where nothing of it lies here
    part: tuple[int, ...]  # the shape of what would lie here without shards
    sharding: Sharding | None = None  # where the shards of the part lie

    def placed(self, local: Tensor) -> Tensor:
        """What lies here, as the model and the optimizer hold it: a DTensor where it is a shard."""
        return local if self.sharding is None else self.sharding.placed(local, self.part)


def layout_of(whole: tuple[int, ...], cut: Cut | DenseCut | None, place: int, sharding: Sharding | None) -> Layout:
    """A tensor that is cut over ranks, this one at `place`, and whose part then lies in shards of its rows.

    A tensor with another shape than what is cut or sharded, such as a count of steps, lies whole on every rank.
    """
    part, blocks = whole, (Block(whole_at=(0,) * len(whole), part_at=(0,) * len(whole), sizes=whole),)
    if cut is not None and whole == tuple(cut.shape):
        part, blocks = cut.part_shape(place), cut.blocks(place)
    sharding = sharding if sharding is not None and part and part[0] == sharding.rows else None
    here = part
    if sharding is not None:
        first, number = sharding.first_row, sharding.num_rows
        here = (number, *part[1:])
        blocks = tuple(_rows(block, first, number) for block in blocks)
    # of a tensor without values every rank has the one box there is
    filled = tuple(block for block in blocks if math.prod(block.sizes) or not math.prod(whole))
    return Layout(whole=whole, here=here, blocks=filled, part=part, sharding=sharding)


def _rows(block: Block, first: int, number: int) -> Block:
    """What of a block of the part lies in a shard of `number` rows from `first` on; of no rows where nothing does."""
    begin, own = block.part_at[0], block.sizes[0]
    start, stop = max(begin, first), min(begin + own, first + number)
    return Block(
        whole_at=(block.whole_at[0] + start - begin, *block.whole_at[1:]),
        part_at=(max(0, start - first), *block.part_at[1:]),
        sizes=(max(0, stop - start), *block.sizes[1:]),
    )
