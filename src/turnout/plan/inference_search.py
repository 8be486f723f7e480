"""The best layout and batch of a deployment: every legal one, bounded from below before its exchange is counted."""

import time
from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

from turnout.alltoall import PROGRAMS
from turnout.errors import ConfigError
from turnout.plan.inference import Inference, infer
from turnout.plan.inference_load import decode_load
from turnout.plan.inference_memory import serving_memory
from turnout.plan.inference_pass import forward
from turnout.plan.layout import layout_text
from turnout.plan.serving import Serving
from turnout.registry import nearest
from turnout.strategy import Strategy

Goal = Literal["latency", "throughput"]
GOALS: tuple[Goal, ...] = ("latency", "throughput")
GIB = 2**30
CHUNKS = (1, 2)  # the exchange of one half runs behind the other, or not
MOST_SEQUENCES = 1024  # of a data-parallel rank, where the batch is searched


@dataclass(frozen=True, kw_only=True)
class InferenceSearch:
    """What was found, best first."""

    best: tuple[Inference, ...]
    considered: int  # layouts and batches that are legal
    fitting: int  # of these, which a device's memory holds
    least_memory_bytes: float  # of all that were considered
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """What `plan inference --goal ... --json` prints."""
        return {
            "best": [row_of(each) for each in self.best],
            "considered": self.considered,
            "fitting": self.fitting,
            "least_memory_gib": self.least_memory_bytes / GIB,
            "seconds": self.seconds,
        }


def row_of(found: Inference) -> dict[str, Any]:
    """One deployment in a line."""
    return {
        "layout": layout_text(found.serving.layout),
        "batch": found.serving.batch,
        "tpot_s": found.tpot_s,
        "ttft_s": found.ttft_s,
        "decode_tokens_per_s_per_device": found.decode_tokens_per_s / found.serving.world,
        "memory_gib": found.memory.total_bytes / GIB,
    }


def search_inference(
    serving: Serving,
    *,
    goal: Goal = "latency",
    limit_s: float = 0.0,
    said: dict[str, Any] | None = None,
    batches: tuple[int, ...] = (),
    top: int = 10,
) -> InferenceSearch:
    """The layouts that reach the goal best: the least time of a token, or the most tokens a second and device.

    `limit_s` is the longest time of a token allowed, 0: any; `said` are fields of the layout that are decided;
    `batches` are the numbers of sequences tried, empty: the serving's own. Nothing legal is left out: a layout is
    passed over only where its time without any exchange is already too long.
    Raises: ConfigError if the goal is unknown, the limit negative, or no layout is legal.
    """
    if goal not in GOALS:
        raise ConfigError(f"goal={goal!r} must be one of: {', '.join(GOALS)}{nearest(goal, list(GOALS))}")
    if not 0 <= limit_s < float("inf"):
        raise ConfigError(f"limit_s={limit_s} must be at least 0; nearest legal: 0")
    start, serving = time.perf_counter(), serving.looked_up()
    asked = [replace(serving, strategy=each) for each in layouts(serving, said or {})]
    if not asked:
        raise _refusal(serving, said or {})
    batches = tuple(sorted(batches or (serving.batch,)))
    fitting, least = _fitting(asked, batches)
    best = _best(fitting, goal, limit_s or float("inf"), top)
    return InferenceSearch(
        best=tuple(infer(each) for each in best), considered=len(asked) * len(batches),
        fitting=len(fitting), least_memory_bytes=least, seconds=time.perf_counter() - start,
    )  # fmt: skip


def _refusal(serving: Serving, said: dict[str, Any]) -> ConfigError:
    """Why no layout has what is decided: what is wrong with it alone, where that is enough to be wrong."""
    try:
        _ = replace(serving, strategy=replace(serving.strategy, **said)).layout
    except ConfigError as error:
        return error
    return ConfigError(f"no layout is legal with {said} on {serving.world} devices; leave fields out of it")


def _fitting(asked: list[Serving], batches: tuple[int, ...]) -> tuple[list[Serving], float]:
    """(what a device's memory holds, bytes of what needs least); memory grows with the batch."""
    fitting: list[Serving] = []
    least = float("inf")
    for each in asked:
        for batch in batches:
            tried = replace(each, batch=batch)
            size = serving_memory(tried).total_bytes
            least = min(least, size)
            if size > each.machine.device.memory_bytes:
                break
            fitting.append(tried)
    return fitting, least


def _best(fitting: list[Serving], goal: Goal, limit_s: float, top: int) -> list[Serving]:
    """The `top` best, each with its best exchange, by branch and bound."""
    bounded = [(forward(each, decode_load(each), exchanged=False).total_s, each) for each in fitting]
    bounded = [(least_s, each) for least_s, each in bounded if least_s <= limit_s]
    bounded.sort(key=lambda pair: score(pair[0], pair[1], goal))
    found: list[tuple[tuple[float, ...], int, Serving]] = []
    for place, (least_s, each) in enumerate(bounded):
        if len(found) >= top and score(least_s, each, goal) >= found[top - 1][0]:
            break
        seconds, chosen = min(((_seconds(other), other) for other in exchanges(each)), key=lambda pair: pair[0])
        if seconds <= limit_s:
            insort(found, (score(seconds, chosen, goal), place, chosen), key=lambda row: row[:2])
    return [each for _, _, each in found[:top]]


def score(seconds: float, serving: Serving, goal: Goal) -> tuple[float, ...]:
    """What is smaller is better; ties go to the other goal."""
    rate = -serving.batch / seconds
    return (seconds, rate) if goal == "latency" else (rate, seconds)


def _seconds(serving: Serving) -> float:
    return forward(serving, decode_load(serving)).total_s


def layouts(serving: Serving, said: dict[str, Any]) -> Iterator[Strategy]:
    """Every legal layout but for its exchange; a matrix is cut over devices of one node."""
    per_node, world, shape = serving.machine.devices_per_node, serving.world, serving.shape
    cuts = [size for size in range(1, min(per_node, world) + 1) if world % size == 0]
    spreads = [size for size in range(1, world + 1) if world % size == 0 and shape.num_experts % size == 0]
    sparse = bool(shape.num_experts)
    options = {"tp": cuts, "etp": cuts if sparse else [1], "ep": spreads if sparse else [1]}
    options |= {name: [said[name]] for name in options if name in said}
    for sizes in product(*options.values()):
        yield from _switched(serving, said | dict(zip(options, sizes, strict=True)))


def _switched(serving: Serving, chosen: dict[str, Any]) -> Iterator[Strategy]:
    """The layout with its switches: expert ranks that are neighbours, tokens shared over tensor ranks."""
    cut, several_nodes = chosen["tp"] > 1, serving.world > serving.machine.devices_per_node
    # slices that are not the tensor ranks' are neighbours; on one node, and with whole experts, it is all the same
    sliced = chosen["etp"] not in (1, chosen["tp"])
    folds = (True,) if sliced else (False, True) if cut and chosen["ep"] > 1 and several_nodes else (False,)
    options = {"folded": folds, "shard_tokens": (False, True) if cut else (False,)}
    options |= {name: (chosen[name],) for name in options if name in chosen}
    for folded, shared in product(options["folded"], options["shard_tokens"]):
        strategy = replace(serving.strategy, **(chosen | {"folded": folded, "shard_tokens": shared}))
        try:
            yield replace(serving, strategy=strategy).layout
        except ConfigError:
            continue


def exchanges(serving: Serving) -> Iterator[Serving]:
    """The deployment under every program and overlap that its layout allows and nothing has decided."""
    strategy, usual = serving.strategy, Strategy()
    if strategy.ep == 1:
        yield serving
        return
    nodes = strategy.ep * strategy.etp > serving.machine.devices_per_node
    names = PROGRAMS.names() if strategy.alltoall == usual.alltoall else [strategy.alltoall]
    for name in names:
        if (name == "coordinated" and not _coordinates(strategy)) or (name == "hierarchical" and not nodes):
            continue
        for chunks in CHUNKS if strategy.overlap == usual.overlap else (strategy.overlap,):
            yield replace(serving, strategy=replace(strategy, alltoall=name, overlap=chunks))


def _coordinates(strategy: Strategy) -> bool:
    """Whether tensor-parallel ranks share replicated tokens of an expert they all hold a piece of."""
    return strategy.tp > 1 and strategy.etp == strategy.tp and not strategy.tokens_sharded
