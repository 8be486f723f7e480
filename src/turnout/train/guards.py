"""NaN and infinity: found in the step they appear in, and named by layer, tensor and expert."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from turnout.parallel.fully_sharded import here

NonFinitePolicy = Literal["stop", "skip"]
ExpertAt = Callable[[str, int], int]  # (name of a tensor, its row) -> which expert's that is

_EXPERT_AXIS_FIRST = re.compile(r"_E[A-Z]*$")  # up_EDG: a name's suffix is its shape


@dataclass(frozen=True, kw_only=True)
class GradReport:
    """The gradients of one step, before clipping."""

    norm: float  # L2, over all gradients
    finite: bool  # the norm is a finite number, so no gradient holds NaN or infinity


def nonfinite_report(
    named: Iterable[tuple[str, Tensor | None]], expert_at: ExpertAt = lambda name, row: row
) -> str | None:
    """Where NaN or infinity stands, such as "layers.2.moe.experts.up_EDG, expert 5: 3 of 65536 values are NaN".

    One norm over all tensors answers the usual case; tensors are looked at singly only when it is not finite.
    `expert_at` gives the number of the expert at a row of a tensor: of a part, not the row.
    None entries (no gradient) and integer tensors are passed over. Returns None when all is finite.
    """
    tensors = {name: _checkable(here(t)) for name, t in named if t is not None and _can_be_nonfinite(t)}
    if math.isfinite(_norm(list(tensors.values()))):
        return None
    # The norm of large finite values can overflow, so it only raises the question.
    bad = [(name, tensor) for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if not bad:
        return None
    others = ", ".join(name for name, _ in bad[1:4])
    more = f"; also in {len(bad) - 1} more: {others}{', ...' if len(bad) > 4 else ''}" if others else ""
    name, tensor = bad[0]
    return _describe(name, tensor, expert_at) + more


def clip_and_check(
    params: Iterable[Tensor],
    max_norm: float,
    *,
    copies: Mapping[Tensor, int | tuple[int, ...]] = MappingProxyType({}),
    over_ranks: Callable[[float], float] = float,
) -> GradReport:
    """Scale all gradients so that their norm is at most `max_norm`; the norm itself tells whether they are finite.

    Gradients that are not finite stay as they are, so that `nonfinite_report` can name the tensor. On a device
    this waits for the norm, once.

    `copies` names the parameters of which there is only a part here, and on how many ranks there is the same part, or
    each row of it; `over_ranks` adds a number up over all ranks. So every parameter counts once, and every rank gets
    the same norm.
    """
    params = list(params)
    by_copies: dict[int, list[Tensor]] = {}
    for p in params:
        for number, grad in _by_number(p, copies.get(p, 0)):
            by_copies.setdefault(number, []).extend(grad)
    norm = _safe_norm(by_copies.pop(0, []))
    if by_copies:
        squares = [_safe_norm(grads) ** 2 / number for number, grads in by_copies.items()]
        norm = math.hypot(norm, math.sqrt(over_ranks(math.fsum(squares))))
    finite = math.isfinite(norm)
    if finite and norm > max_norm:
        own = [_stand_in(p.grad) for p in params if p.grad is not None]
        clip_grads_with_norm_(own, max_norm, torch.tensor(norm, dtype=torch.float64))
    return GradReport(norm=norm, finite=finite)


def _by_number(parameter: Tensor, copies: int | tuple[int, ...]) -> Iterator[tuple[int, list[Tensor]]]:
    """The gradient, in rows of the same number where they differ; no tensor where there is none."""
    grads = [] if parameter.grad is None else [here(parameter.grad)]
    if isinstance(copies, int):
        yield copies, grads
        return
    for number in sorted(set(copies)):
        rows = [row for row, each in enumerate(copies) if each == number]
        yield number, [grad[rows] for grad in grads]


def _stand_in(grad: Tensor) -> Tensor:
    """What torch takes for a parameter with this gradient; of shards, for one with this rank's."""
    own = here(grad)
    leaf = own.detach()
    leaf.grad = own
    return leaf


def _can_be_nonfinite(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _checkable(tensor: Tensor) -> Tensor:
    # 8-bit floats have neither norm nor isfinite.
    return tensor.detach() if tensor.element_size() > 1 else tensor.detach().float()


def _safe_norm(grads: list[Tensor]) -> float:
    """The norm, in float64 where finite gradients overflow their own type."""
    norm = _norm(grads)
    if not math.isfinite(norm) and all(bool(grad.isfinite().all()) for grad in grads):
        norm = _norm([grad.to(torch.promote_types(grad.dtype, torch.float64)) for grad in grads])
    return norm


def _norm(tensors: list[Tensor]) -> float:
    """L2 norm over all; about as cheap as one reading of them, and NaN or infinite if any value is."""
    return float(get_total_norm(tensors))


def _describe(name: str, tensor: Tensor, expert_at: ExpertAt) -> str:
    bad = ~tensor.isfinite()
    kinds = [word for word, found in (("NaN", tensor.isnan()), ("infinite", tensor.isinf())) if found.any()]
    place = name
    if _EXPERT_AXIS_FIRST.search(name) and tensor.dim() > 0:
        experts = [expert_at(name, row) for row in bad.flatten(1).any(dim=1).nonzero().flatten().tolist()]
        shown = ", ".join(map(str, experts[:8])) + (", ..." if len(experts) > 8 else "")
        place = f"{name}, expert{'s' if len(experts) > 1 else ''} {shown}"
    return f"{place}: {int(bad.sum())} of {tensor.numel()} values are {' or '.join(kinds)}"
