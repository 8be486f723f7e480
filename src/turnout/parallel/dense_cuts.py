"""How dense weights lie on tensor-parallel ranks: heads of attention, hidden width of feed-forward networks.

Source: Shoeybi et al. 2019, Megatron-LM, arXiv:1909.08053, section 3. torch's ColwiseParallel and RowwiseParallel cut
nn.Linear and nn.Embedding alone; here queries, keys and values are one matrix, as gate and up are, and each part of it
is cut, which no placement of DTensor says.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from turnout.errors import ConfigError
from turnout.experts.cut import Block
from turnout.layers.attention import Attention
from turnout.layers.mla import MLA
from turnout.layers.mlp import MLP
from turnout.strategy import nearest_divisor


@dataclass(frozen=True, kw_only=True)
class DenseCut:
    """One tensor on some ranks; each part that lies in it side by side is cut evenly."""

    shape: tuple[int, ...]  # of the whole
    ranks: int
    axis: int
    lengths: tuple[int, ...]  # of the parts that lie side by side along the axis

    def expert_at(self, rank: int, row: int) -> int:
        """Dense weights have none; asked where an error names one."""
        del rank
        return row

    def part(self, whole: Tensor, rank: int) -> Tensor:
        """What a rank has of it."""
        sides = whole.split(list(self.lengths), dim=self.axis)
        return torch.cat([side.chunk(self.ranks, dim=self.axis)[rank] for side in sides], dim=self.axis)

    def blocks(self, rank: int) -> tuple[Block, ...]:
        """The boxes of the whole of which `part` consists, one for each of what lies side by side."""
        whole_start, part_start, found = 0, 0, []
        for length in self.lengths:
            own = length // self.ranks
            whole_at, part_at, sizes = [0] * len(self.shape), [0] * len(self.shape), list(self.shape)
            whole_at[self.axis], part_at[self.axis], sizes[self.axis] = whole_start + rank * own, part_start, own
            found.append(Block(whole_at=tuple(whole_at), part_at=tuple(part_at), sizes=tuple(sizes)))
            whole_start, part_start = whole_start + length, part_start + own
        return tuple(found)

    def part_shape(self, rank: int) -> tuple[int, ...]:
        """The shape of `part`."""
        del rank
        own = self.shape[self.axis] // self.ranks
        return (*self.shape[: self.axis], own, *self.shape[self.axis + 1 :])

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole from the parts of all ranks, in their order."""
        own = [length // self.ranks for length in self.lengths]
        by_side = zip(*(part.split(own, dim=self.axis) for part in parts), strict=True)
        return torch.cat([piece for side in by_side for piece in side], dim=self.axis)


def cut_layers(model: nn.Module, *, shared_experts: bool) -> Iterator[tuple[str, nn.Module]]:
    """The layers that tensor-parallel ranks share; a dense network beside experts only with `shared_experts`."""
    for name, module in model.named_modules():
        if isinstance(module, Attention | MLA) or (
            isinstance(module, MLP) and (shared_experts or not name.endswith(".shared"))
        ):
            yield name, module


def cuts_of(name: str, layer: nn.Module, ranks: int) -> dict[str, DenseCut]:
    """How the weights of a layer lie on ranks, by their own names; the others every rank has.

    Raises: ConfigError naming what the ranks do not divide, and the nearest number that does.
    """
    for kind, sides_of in _SIDES.items():
        if isinstance(layer, kind):
            sides = sides_of(layer)
            break
    else:
        raise AssertionError(type(layer))
    _check(name, layer, ranks)
    return {
        own: DenseCut(shape=tuple(weight.shape), ranks=ranks, axis=sides[own][0], lengths=sides[own][1])
        for own, weight in layer.named_parameters(recurse=False)
        if own in sides
    }


def keep(layer: nn.Module, cuts: Mapping[str, DenseCut], rank: int, ranks: int) -> None:
    """Keep a rank's parts of the weights alone, and as many heads."""
    for name, cut in cuts.items():
        weight = layer.get_parameter(name)
        part = cut.part(weight.detach(), rank).clone(memory_format=torch.contiguous_format)
        setattr(layer, name, nn.Parameter(part, requires_grad=weight.requires_grad))
    if isinstance(layer, Attention):
        own = {field: getattr(layer.config, field) // ranks for field in ("num_heads", "num_kv_heads")}
        layer.config = replace(layer.config, **own)
    elif isinstance(layer, MLA):
        layer.config = replace(layer.config, num_heads=layer.config.num_heads // ranks)


# along which axis a weight is cut, and the lengths of what lies side by side there
Sides = dict[str, tuple[int, tuple[int, ...]]]


def _of_attention(layer: nn.Module) -> Sides:
    assert isinstance(layer, Attention)
    heads, kv_heads, width = layer.config.num_heads, layer.config.num_kv_heads, layer.config.head_dim
    qkv = (heads * width, kv_heads * width, kv_heads * width)
    return {
        "qkv": (0, qkv),
        "qkv_bias": (0, qkv),
        "out": (1, (heads * width,)),
        "smear_H": (0, (kv_heads,)),
        "sink_H": (0, (heads,)),
    }


def _of_mla(layer: nn.Module) -> Sides:
    assert isinstance(layer, MLA)
    return {"q_up": (0, (len(layer.q_up),)), "kv_up": (0, (len(layer.kv_up),)), "out": (1, (layer.out.shape[1],))}


def _of_mlp(layer: nn.Module) -> Sides:
    assert isinstance(layer, MLP)
    hidden = layer.down_DF.shape[1]
    up = (hidden,) * (len(layer.up_GD) // hidden)
    return {"up_GD": (0, up), "up_bias_G": (0, up), "down_DF": (1, (hidden,))}


_SIDES: dict[type[nn.Module], Callable[[nn.Module], Sides]] = {
    Attention: _of_attention,
    MLA: _of_mla,
    MLP: _of_mlp,
}


def _check(name: str, layer: nn.Module, ranks: int) -> None:
    if isinstance(layer, Attention):
        config = layer.config
        if config.qk_norm == "full":
            raise ConfigError(
                f"strategy.tp={ranks}: attention.qk_norm='full' of {name} norms all heads together, and a rank has "
                "some of them; nearest legal: tp=1, or qk_norm='head'"
            )
        _divides(name, ranks, "attention.num_kv_heads", config.num_kv_heads)
        _divides(name, ranks, "attention.num_heads", config.num_heads)
    elif isinstance(layer, MLA):
        _divides(name, ranks, "attention.num_heads", layer.config.num_heads)
    elif isinstance(layer, MLP):
        of = "moe.shared_hidden" if name.endswith(".shared") else "model.hidden"
        _divides(name, ranks, of, layer.down_DF.shape[1])


def _divides(name: str, ranks: int, of: str, total: int) -> None:
    if total % ranks:
        near = nearest_divisor(ranks, total)
        raise ConfigError(f"strategy.tp={ranks} must divide {of}={total} of {name}; nearest legal: {near}")
