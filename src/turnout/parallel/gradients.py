"""The gradients of a step from those of its ranks: sums over all tokens, with one divisor for dense and for experts."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from turnout.comm import Groups, Lines
from turnout.comm.world import naming
from turnout.parallel.copies import sum_copies
from turnout.parallel.dense_cuts import DenseCut
from turnout.parallel.fully_sharded import here
from turnout.parallel.layout import Parallel
from turnout.parallel.reach import layer_of

BUCKET_BYTES = 32 << 20


def reduce_gradients(model: nn.Module, parallel: Parallel) -> None:
    """Average over ranks, in place: the losses of all ranks, each weighed by the number of ranks, add up to the step's.

    Of pipeline stages the ranks are those of one: its gradients have the losses of all that come after it already. What
    the first stage shares with the last has one sum over both.
    A dense gradient is the mean over all ranks. An expert's, or that of its slice, has the tokens of its whole expert
    group already, for they were brought there: what is missing is the sum over its replicas, and the same divisor.
    Where several ranks of the group hold a copy, each has a part of the tokens, and the parts are added up last.
    So it is with a part that tensor-parallel ranks have of a dense weight: the losses of their group are all in it.
    In shards either is averaged already, over the ranks that have them: the divisor is not yet the same where those
    are not all, and tensor-parallel ranks have shards of the same whole weight, each with the losses of its own.
    A parameter with a gradient on any rank has one on all after; the collectives do not depend on which.
    """
    world = parallel.world
    if world.size == 1:
        return
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    with parallel.ledger.inside("reduction of gradients"):
        _reduce(named, parallel)


def _reduce(named: Sequence[tuple[str, nn.Parameter]], parallel: Parallel) -> None:
    has_grad = _anywhere([parameter.grad is not None for _, parameter in named], parallel.groups)
    dense, parts, experts, tied, shards = [], [], [], [], []
    for (name, parameter), wanted in zip(named, has_grad, strict=True):
        if not wanted:
            continue
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        cut = parallel.shards.cuts.get(name)
        if name not in parallel.shards.shardings:
            kind = dense if cut is None else parts if isinstance(cut, DenseCut) else experts
            kind = tied if name in parallel.shards.tied else kind
            kind.append(parameter.grad)
            continue
        own, averaged = here(parameter.grad), parallel.shards.shardings[name].mesh.size()
        if cut is None and averaged < parallel.alike:
            shards.append(own)
        else:
            own.div_(parallel.alike // averaged)
    groups, divisor = parallel.groups, parallel.alike
    if groups.tensor is not None:
        _average(shards, groups.tensor.wire, groups.tensor.size, groups.lines)
    _average(dense, groups.like, divisor, groups.lines)
    _average(experts, groups.replicas, divisor, groups.lines)
    _average(parts, None if groups.tensor is None else groups.tensor.replicas, divisor, groups.lines)
    _average(tied, None if groups.stages is None else groups.stages.ends, divisor, groups.lines)
    # after the replicas' sum, whose order of summands may differ from one rank of a group to the next
    _sum_copies({name: parameter.grad for (name, parameter), has in zip(named, has_grad, strict=True) if has}, parallel)


def _sum_copies(grads: Mapping[str, Tensor | None], parallel: Parallel) -> None:
    layers: dict[str, list[str]] = {}
    for name, cut in parallel.shards.of_experts().items():
        if cut.placement.has_copies and name in grads:
            layers.setdefault(layer_of(name), []).append(name)
    for layer, names in layers.items():
        assert parallel.groups.experts is not None
        own = [grad for name in names if (grad := grads[name]) is not None]
        placement = parallel.shards.of_experts()[names[0]].placement
        sum_copies(layer or "the layer", own, placement, parallel.groups.experts, parallel.ledger)


def _anywhere(found: Sequence[bool], groups: Groups) -> list[bool]:
    """Which of these is so on any of the ranks that have the same blocks."""
    marks = torch.tensor(found, dtype=torch.int32)
    if groups.like is not None:
        with naming("an agreement"):
            groups.lines.all_reduce(marks, groups.like)
    return marks.bool().tolist()


def _average(grads: Sequence[Tensor], group: ProcessGroup | None, divisor: int, lines: Lines) -> None:
    if group is None:
        for grad in grads:
            grad.div_(divisor)
        return
    for bucket in _buckets(grads):
        flat = torch.cat([grad.reshape(-1) for grad in bucket])
        with naming("the reduction of gradients"):
            lines.all_reduce(flat, group)
        for grad, part in zip(bucket, flat.div_(divisor).split([g.numel() for g in bucket]), strict=True):
            grad.copy_(part.view_as(grad))


def _buckets(grads: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, so many that a message is worth its latency."""
    bucket: list[Tensor] = []
    size = 0
    for grad in grads:
        if bucket and (grad.dtype != bucket[0].dtype or size >= BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(grad)
        size += grad.numel() * grad.element_size()
    if bucket:
        yield bucket
