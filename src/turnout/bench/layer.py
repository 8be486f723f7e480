"""Case layer: one MoE layer, forward alone or forward and backward, everybody in turns in one process.

Ratios are to a dense network of the same active FLOPs, and to the products alone; `speedup_of` has each one's time over
that of each of ours. Rows of `turnout-BACKEND` and
of other systems' layers include each one's router, without auxiliary losses; with a `skew` the experts of every
token are given instead, one expert at that many times the mean load. `turnout-int8` has weights of 8 bits and
activations of 16, `turnout-int8-a8` both of 8; neither has a backward pass. `read-limit`, with few tokens, reads as
many weights as the batch's experts have, in its dtype, and computes nothing with them.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from turnout.bench.layer_fit import differences, other_refusals
from turnout.bench.layer_gate import Gate
from turnout.bench.layer_peers import (
    DENSE,
    LIMIT,
    OURS,
    READ,
    batch,
    experts_met,
    forward_of,
    products,
    reading,
)
from turnout.bench.memory import call_memory
from turnout.bench.race import race, ratio
from turnout.bench.routers import SHAPES as ROUTED_SHAPES
from turnout.bench.routers import Shape
from turnout.bench.run import check_gate, ratio_keys, result, row
from turnout.errors import ConfigError
from turnout.experts import INT8_BITS, FFNExperts, QuantizedFFNExperts, available_backends
from turnout.kernels.arguments import FEW_ROWS

Mode = Literal["forward", "train"]
MODES: tuple[Mode, ...] = ("forward", "train")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# a few large experts, many with many choices, very many small ones without gates; and a few tokens at a time
SHAPES = ROUTED_SHAPES | {
    "c": replace(ROUTED_SHAPES["c"], expert="gelu"),
    **{f"d{n}": Shape(tokens=n, dim=1024, hidden=2048, experts=32, k=4, seq_len=1) for n in (1, 2, 4, 8, 16)},
}
PACKAGES = ("transformers", "deepspeed", "st-moe-pytorch", "tutel")


def run(
    shapes: Sequence[str],
    *,
    modes: Sequence[str] = MODES,
    peers: Sequence[str] = (),
    dtype: str = "float32",
    skew: float = 0.0,
    rounds: int,
    warmup: int,
    memory: bool = False,
) -> dict[str, Any]:
    """A row for each shape, mode and peer; few tokens (d1 to d16) have no backward pass.

    Raises: ConfigError if a shape, mode, peer or dtype is unknown; TurnoutError, before anything is timed, if a backend
    does not compute what the oracle computes.
    """
    names, left_out = _cases(shapes, modes, dtype, peers, skew)
    check_gate()
    rows: list[dict[str, Any]] = []
    for shape, mode in names:
        settings = {"shape": shape, "mode": mode, "dtype": dtype, "skew": skew}
        rows += _rows(names[shape, mode], settings, rounds=rounds, warmup=warmup, memory=memory)
    return result(rows, *PACKAGES, left_out=left_out)


def own_cases(shapes: Sequence[str], *, modes: Sequence[str], peers: Sequence[str], dtype: str) -> list[dict[str, str]]:
    """Options of the command line that together measure ours of what `run` measures: one of a mode and of peers.

    Raises: ConfigError as `run`, and if none of `peers` is ours.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for (shape, mode), names in _cases(shapes, modes, dtype, peers, 0.0)[0].items():
        own = ",".join(name for name in names if name.startswith(OURS))
        if not own:
            raise ConfigError(f"--base compares ours alone; --peers {','.join(names)} has none that begins {OURS!r}")
        found.setdefault((mode, own), []).append(shape)
    return [
        {"--shapes": ",".join(together), "--modes": mode, "--peers": own} for (mode, own), together in found.items()
    ]


def contestant(
    name: str, *, shape: str, mode: str, dtype: str, skew: float, gate: Gate | None = None
) -> Callable[[], object]:
    """One call of a peer on a fixed batch, which leaves no gradient behind.

    Raises: TurnoutError if `gate` finds the peer's answers wrong.
    """
    sizes, train = SHAPES[shape], mode == "train"
    if name == LIMIT:
        return products(sizes, train=train, dtype=DTYPES[dtype])
    if name == READ:
        return reading(sizes, experts_met(sizes, skewed(sizes, skew) if skew else None), DTYPES[dtype])
    x_TD, y_grad_TD = batch(sizes, DTYPES[dtype])
    forward, parameters = forward_of(name, sizes, skewed(sizes, skew) if skew else None, DTYPES[dtype])
    if gate is not None:
        gate.check(name, forward)

    @torch.no_grad()
    def infer() -> Tensor:
        return forward(x_TD)

    def step() -> None:
        forward(x_TD).backward(y_grad_TD)
        for tensor in (x_TD, *parameters):
            tensor.grad = None

    if train:
        x_TD.requires_grad_()
    return step if train else infer


def made_alone(name: str, settings: dict[str, Any]) -> Callable[[], object]:
    """What the memory measurement calls in a process of its own."""
    # threads and workspaces of torch's own products are no part of a layer
    torch.mm(torch.ones(512, 512), torch.ones(512, 512))
    return contestant(name, **settings)


def skewed(shape: Shape, skew: float) -> Tensor:
    """k different experts for each token, expert 0 at `skew` times the mean load and the others alike.

    Raises: ConfigError if no expert can have so much: each token goes to it once at most.
    """
    share = skew * shape.k / shape.experts
    if not 0 < share <= 1:
        raise ConfigError(f"--skew {skew} must be above 0 and at most experts / k = {shape.experts / shape.k:g}")
    generator = torch.Generator().manual_seed(0)
    draw_TE = torch.rand(shape.tokens, shape.experts, generator=generator)
    draw_TE[:, 0] = torch.where(torch.arange(shape.tokens) < round(share * shape.tokens), 2.0, -1.0)
    return draw_TE.topk(shape.k, dim=1).indices


def _rows(
    names: Sequence[str], settings: dict[str, Any], *, rounds: int, warmup: int, memory: bool
) -> list[dict[str, Any]]:
    gate = Gate(SHAPES[settings["shape"]], DTYPES[settings["dtype"]], train=settings["mode"] == "train")
    calls = {name: contestant(name, **settings, gate=gate) for name in names}
    del gate
    timings = race(calls, rounds=rounds, warmup=warmup)
    calls.clear()
    ours = [name for name in names if name.startswith(OURS)]
    found = []
    for name in names:
        asked = memory and name not in (LIMIT, READ)
        held = call_memory(partial(made_alone, name, settings)) if asked else None
        over = {
            other: ratio(timings[other], timings[name]) if other in timings else None for other in (DENSE, LIMIT, READ)
        }
        found.append(
            {
                **row("layer", name, timings[name]),
                "mode": settings["mode"],
                "dtype": settings["dtype"],
                "shape": asdict(SHAPES[settings["shape"]]) | {"name": settings["shape"]},
                "skew": settings["skew"] or None,
                "differences": differences(name, SHAPES[settings["shape"]]),
                "speedup_of": {our: astuple(ratio(timings[name], timings[our])) for our in ours},
                **ratio_keys("ratio_to_dense", over[DENSE]),
                **ratio_keys("ratio_to_limit", over[LIMIT]),
                **ratio_keys("ratio_to_reading", over[READ]),
                "peak_mib": held and held.peak,
                "extra_mib": held and held.extra,
                "extra_again_mib": held and held.extra_again,
            }
        )
    return found


def _cases(
    shapes: Sequence[str], modes: Sequence[str], dtype: str, peers: Sequence[str], skew: float
) -> tuple[dict[tuple[str, str], list[str]], list[dict[str, str]]]:
    """Shape and mode -> peers; and who was left out of which, and why."""
    _check(shapes, modes, dtype)
    few = [shape for shape in shapes if SHAPES[shape].tokens <= FEW_ROWS]
    if few and "forward" not in modes:
        raise ConfigError(
            f"few tokens have no backward pass here: --modes {','.join(modes)} leaves nothing of {', '.join(few)}; "
            "add forward"
        )
    names, left_out = {}, []
    for shape, mode in [(shape, mode) for shape in shapes for mode in modes if mode == "forward" or shape not in few]:
        refused = other_refusals(SHAPES[shape], DTYPES[dtype], skew=skew, asked=peers)
        names[shape, mode] = _peers(SHAPES[shape], mode, DTYPES[dtype], refused, peers)
        if not peers:
            left_out += [{"peer": p, "shape": shape, "mode": mode, "reason": r} for p, r in refused.items() if r]
    return names, left_out


def _check(shapes: Sequence[str], modes: Sequence[str], dtype: str) -> None:
    for kind, asked, legal in (("shape", shapes, SHAPES), ("mode", modes, MODES), ("dtype", (dtype,), DTYPES)):
        for name in asked or [""]:
            if name not in legal:
                raise ConfigError(f"unknown {kind} {name!r}; available: {', '.join(legal)}")


def _peers(shape: Shape, mode: str, dtype: torch.dtype, others: dict[str, str], asked: Sequence[str]) -> list[str]:
    """Those asked for, or all that fit; `others`: why each that is not ours cannot run, empty if it can.

    Raises: ConfigError if one of those asked for is unknown, or cannot run here or in this mode.
    """
    experts = FFNExperts(1, 1, 1, kind=shape.expert)
    experts.to(dtype)
    with torch.set_grad_enabled(mode == "train"):
        refused = available_backends(experts, dtype=dtype, device=torch.device("cpu"))
    refused |= dict.fromkeys(INT8_BITS, "it has no backward pass" if mode == "train" else _int8_refusal(dtype))
    ours = [f"{OURS}{name}" for name, reason in refused.items() if not reason]
    theirs = [name for name, reason in others.items() if not reason]
    legal = [*ours, *theirs, DENSE, LIMIT, *([READ] if shape.tokens <= FEW_ROWS else [])]
    for name in asked:
        if name not in legal:
            why = (others | refused).get(name.removeprefix(OURS), "")
            raise ConfigError(f"unknown peer {name!r}{': ' + why if why else ''}; available: {', '.join(legal)}")
    return list(asked) or legal


def _int8_refusal(dtype: torch.dtype) -> str:
    return available_backends(QuantizedFFNExperts(1, 1, 1), dtype=dtype, device=torch.device("cpu"))["fused_int8"]
