"""Case dispatch: tokens to experts' rows and back by dense masks (GShard), by sorting, and as a layer here does it.

Tutel's comparison of its sparse kernels with Fairseq's dense masks, in memory and time, with more and more tokens. The
modes: `forward`, rows alone, experts that leave them as they are; `train`, the same with its backward pass; `layer`, a
whole layer after its router, with experts of two matrices, forward and backward. All have the same choices and must
agree, outputs and gradients, before anything is timed. Masks that need more than a bound are not made.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from turnout.bench.dispatch_ways import DENSE, OURS, WAYS, Routed, batched, layer_of_ours, mask_bytes
from turnout.bench.memory import CallMemory, call_memory
from turnout.bench.race import Timing, race, ratio
from turnout.bench.run import check_gate, ratio_keys, red_gate, result, row
from turnout.dispatch import FixedCapacity
from turnout.errors import ConfigError
from turnout.experts import FFNExperts

MODES = ("forward", "train", "layer")
# Hwang et al. 2022, arXiv:2206.03382, tables 5 and 9: tokens a step over a width of 4,096 -> GiB of a layer with
# Fairseq and with Tutel; hidden width as the width, two choices, two experts a GPU
PAPER = {1: (3.7, 2.9), 2: (6.2, 3.2), 4: (16.3, 4.0), 8: (57.9, 5.7)}
PAPER_DIM = 4096
TOLERANCE = 1e-5  # of the largest value, in float32


@dataclass(frozen=True, kw_only=True)
class DispatchCase:
    """Sizes; by default a quarter of the paper's width, so that a quarter of its tokens take a sixteenth of memory."""

    tokens: tuple[int, ...] = (1024, 2048, 4096, 8192, 16_384, 32_768)  # of a call, one after another
    dim: int = 1024
    hidden: int = 1024  # of an expert
    experts: int = 16
    k: int = 2  # choices of a token
    factor: float = 1.0  # capacity over the balanced load
    bound_gib: float = 4.0  # masks that need more are not made

    def __post_init__(self) -> None:
        for name in ("dim", "hidden", "experts", "k"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} {getattr(self, name)} must be at least 1")
        if not self.tokens or min(self.tokens) < 1:
            raise ConfigError(f"--tokens {','.join(map(str, self.tokens))!r} must be whole numbers of at least 1")
        if self.k > self.experts:
            raise ConfigError(f"--k {self.k} must be at most --experts {self.experts}")
        if not self.bound_gib > 0:
            raise ConfigError(f"--bound-gib {self.bound_gib} must be above 0")
        FixedCapacity(factor=self.factor)

    def needed_bytes(self, way: str, tokens: int, mode: str) -> int | None:
        """What the masks take at least; None for who has none."""
        if way != DENSE:
            return None
        capacity = FixedCapacity(factor=self.factor).rows(tokens * self.k, self.experts)
        return mask_bytes(tokens, experts=self.experts, capacity=capacity, backward=mode != "forward")

    def fits(self, way: str, tokens: int, mode: str) -> bool:
        """Whether the bound has room for it."""
        return (self.needed_bytes(way, tokens, mode) or 0) <= self.bound_gib * 2**30


def run(
    case: DispatchCase,
    *,
    modes: Sequence[str] = MODES,
    rounds: int,
    warmup: int,
    memory: bool = True,
) -> dict[str, Any]:
    """A row for each mode, number of tokens and way; times are null where masks do not fit the bound.

    Raises: ConfigError if a mode is unknown; TurnoutError, before a size is timed, if the ways do not agree, or a
    backend does not compute what the oracle computes.
    """
    for mode in modes or [""]:
        if mode not in MODES:
            raise ConfigError(f"unknown mode {mode!r}; available: {', '.join(MODES)}")
    check_gate()
    rows: list[dict[str, Any]] = []
    for mode in modes:
        for tokens in case.tokens:
            rows += _rows(case, mode, tokens, rounds=rounds, warmup=warmup, memory=memory)
    return result(rows, dispatch=asdict(case))


def contestant(way: str, *, case: DispatchCase, mode: str, tokens: int) -> Callable[[], list[Tensor]]:
    """A call on a fixed batch: its output, and where there is a backward pass all gradients, of which it keeps none."""
    routed, y_grad_TD = _batch(case, tokens)
    torch.manual_seed(0)
    # smooth: of millions of hidden values some are so near to 0 that rounding decides about a relu's gradient
    experts = FFNExperts(case.dim, case.hidden, case.experts, kind="gelu") if mode == "layer" else None
    learned = [routed.x_TD, routed.weight_TK, *([] if experts is None else experts.parameters())]

    @torch.no_grad()
    def infer() -> list[Tensor]:
        return [_forward(way, routed, experts)]

    def step() -> list[Tensor]:
        y_TD = _forward(way, routed, experts)
        return [y_TD.detach(), *torch.autograd.grad(y_TD, learned, y_grad_TD)]

    for tensor in learned:
        tensor.requires_grad_(mode != "forward")
    return infer if mode == "forward" else step


def made_alone(way: str, case: DispatchCase, mode: str, tokens: int) -> Callable[[], object]:
    """What the memory measurement calls in a process of its own."""
    # threads and workspaces of torch's own products are no part of it
    torch.mm(torch.ones(512, 512), torch.ones(512, 512))
    call = contestant(way, case=case, mode=mode, tokens=tokens)

    def run_once() -> None:
        call()

    return run_once


def check_agreement(calls: dict[str, Callable[[], list[Tensor]]], what: str) -> None:
    """Raises: TurnoutError naming who computes something else than the others."""
    found = {way: call() for way, call in calls.items()}
    want = found[OURS]
    for way, tensors in found.items():
        for mine, other in zip(want, tensors, strict=True):
            apart, largest = float((mine - other).abs().max()), float(mine.abs().max())
            if not apart <= TOLERANCE * largest:
                raise red_gate(f"{what}: {way} and {OURS} are {apart:.2g} apart, of {largest:.2g}")


def _forward(way: str, routed: Routed, experts: FFNExperts | None) -> Tensor:
    if experts is None:
        return WAYS[way](routed, _unchanged)
    return layer_of_ours(routed, experts) if way == OURS else WAYS[way](routed, batched(experts))


def _unchanged(rows_ECD: Tensor) -> Tensor:
    return rows_ECD


def _batch(case: DispatchCase, tokens: int) -> tuple[Routed, Tensor]:
    """Tokens with their choices, and the gradient of what comes back."""
    generator = torch.Generator().manual_seed(0)
    x_TD, y_grad_TD = (torch.randn(tokens, case.dim, generator=generator) for _ in range(2))
    score_TE = torch.randn(tokens, case.experts, generator=generator).softmax(dim=1)
    weight_TK, choice_TK = score_TE.topk(case.k, dim=1)
    routed = Routed(x_TD=x_TD, choice_TK=choice_TK, weight_TK=weight_TK, num_experts=case.experts, factor=case.factor)
    return routed, y_grad_TD


def _rows(
    case: DispatchCase, mode: str, tokens: int, *, rounds: int, warmup: int, memory: bool
) -> list[dict[str, Any]]:
    fitting = [way for way in WAYS if case.fits(way, tokens, mode)]
    calls = {way: contestant(way, case=case, mode=mode, tokens=tokens) for way in fitting}
    check_agreement(calls, f"{tokens} tokens, {mode}")
    timings = race(calls, rounds=rounds, warmup=warmup)
    calls.clear()
    held = {way: call_memory(partial(made_alone, way, case, mode, tokens)) for way in fitting if memory}
    return [_row(case, way, mode, tokens, timings, held.get(way)) for way in WAYS]


def _row(
    case: DispatchCase, way: str, mode: str, tokens: int, timings: dict[str, Timing], held: CallMemory | None
) -> dict[str, Any]:
    timing, needed = timings.get(way), case.needed_bytes(way, tokens, mode)
    times = row("dispatch", way, timing or Timing(ms=(0.0,)))
    if timing is None:
        times |= {"ms_min": None, "ms_median": None, "ms_max": None}
    return {
        **times,
        "mode": mode,
        "tokens": tokens,
        "outcome": "measured" if timing else "out of memory bound",
        "masks_mib": needed and needed / 2**20,
        **ratio_keys("speedup_of_turnout", timing and ratio(timing, timings[OURS])),
        "peak_mib": held and held.peak,
        "extra_mib": held and held.extra,
        "extra_again_mib": held and held.extra_again,
    }
