"""When ranks of a pipeline that is fed from both ends wait for each other: DualPipe's program, pass by pass.

The published formula, (p/2-1)(F&B + B - 3W), is of stages that are alike, and of passes that arrive when they are sent.
Those of a model are not: the first has the embedding, the last the output matrix. Source: DeepSeek-AI 2024,
arXiv:2412.19437, section 3.2.1; order of passes: https://github.com/deepseek-ai/DualPipe.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce

from turnout.plan.passes import Pass
from turnout.plan.terms import Numbers, larger

# micro-batches in the pipeline for each of its ranks: with fewer it does not run, each further one only takes its time
FEWEST = 2


@dataclass(frozen=True, kw_only=True)
class Op:
    """What a rank does at once; a chunk is (stage, micro-batch of one direction)."""

    place: int  # of the rank: how far it is from the nearer end
    forward: tuple[int, int] | None = None  # the chunk that passes forward
    backward: tuple[int, int] | None = None
    weights: int | None = (
        None  # the stage whose gradients of weights are computed after the rest of their backward pass
    )
    deferred: bool = False  # those of `backward` are left for later


def program(place: int, p: int, micro_batches: int) -> list[str]:
    """What a rank does in order: F and B alone, Z a backward pass without gradients of weights, W those, FB both ways.

    The digit is 0 for the stage nearer to the first one of the two that the rank holds.
    """
    beyond = p // 2 - place - 1  # ranks between this one and the middle
    both = micro_batches // 2 - p + place + 1
    begin = [*["F0"] * (2 * beyond), *["F0", "F1"] * (place + 1), *["Z1", "W", "F1"] * beyond]
    # the two ranks in the middle have nothing to pair their first passes with
    steady = ["F0B1", "F1B0"] * both if beyond else ["F0", "B1", "F1B0", *["F0B1", "F1B0"] * (both - 1)]
    last = ["B1", "B0"] * (place + 1)
    deferred = [each.replace("B", "Z") for each in last[place + 1 :]]
    drain = [*["B1", "F1B0"] * beyond, *last[: place + 1], *deferred, *["W", "Z0"] * beyond, *["W"] * (place + 1)]
    return [*begin, *steady, *drain]


@lru_cache(maxsize=32)
def ops(p: int) -> tuple[Op, ...]:
    """All passes of the ranks of one half, none before those that it waits for; the other half is its mirror image."""
    waiting = [_ops_of(place, p)[::-1] for place in range(p // 2)]
    done: set[tuple[str, int, int]] = set()
    order: list[Op] = []
    while any(waiting):
        for rank in waiting:
            while rank and all(need in done for need in _needs(rank[-1], p)):
                op = rank.pop()
                order.append(op)
                done.update(_results(op))
    return tuple(order)


def _ops_of(place: int, p: int) -> list[Op]:
    stages = (place, p - 1 - place)
    passed: Counter[tuple[str, int]] = Counter()
    owed: list[int] = []

    def chunk(way: str, digit: str) -> tuple[int, int]:
        passed[way, stages[int(digit)]] += 1
        return stages[int(digit)], passed[way, stages[int(digit)]]

    found = []
    for word in program(place, p, FEWEST * p):
        ways = dict(zip(word[::2], word[1::2], strict=False))
        backward = next((chunk("B", ways[way]) for way in "BZ" if way in ways), None)
        forward = chunk("F", ways["F"]) if "F" in ways else None
        if "Z" in ways and backward:
            owed.append(backward[0])
        weights = owed.pop(0) if word == "W" else None
        found.append(Op(place=place, forward=forward, backward=backward, weights=weights, deferred="Z" in ways))
    return found


def _needs(op: Op, p: int) -> list[tuple[str, int, int]]:
    """What neighbours must have sent."""
    needs = []
    if op.forward and op.forward[0] > 0:
        needs.append(("F", op.forward[0] - 1, op.forward[1]))
    if op.backward and op.backward[0] < p - 1:
        needs.append(("B", op.backward[0] + 1, op.backward[1]))
    return needs


def _results(op: Op) -> list[tuple[str, int, int]]:
    return [(way, *chunk) for way, chunk in (("F", op.forward), ("B", op.backward)) if chunk]


@dataclass(frozen=True, kw_only=True)
class Waits:
    """What makes a step longer than its passes in pairs; each is a float, or an array of layouts."""

    fewest_s: Numbers  # from the first pass to the last, with FEWEST micro-batches a rank
    pairs_s: tuple[Numbers, ...]  # a micro-batch on a rank, the mean of its two stages, by place
    alone_s: tuple[Numbers, ...]  # what passes of a rank take longer in a step since they run alone, by place

    def passes_s(self, micro_batches: Numbers) -> Numbers:
        """Seconds from the first pass to the last: further micro-batches take what they take the slowest rank."""
        further = micro_batches - 2 * FEWEST * len(self.pairs_s)
        return self.fewest_s + further * reduce(larger, self.pairs_s)

    def idle_s(self, micro_batches: Numbers) -> Numbers:
        """Of that, what the busiest rank is idle."""
        each = (micro_batches * pair + alone for pair, alone in zip(self.pairs_s, self.alone_s, strict=True))
        return self.passes_s(micro_batches) - reduce(larger, each)


def waits(stages: Sequence[Pass], hop_s: Numbers) -> Waits:
    """A step of a pipeline with those stages; `hop_s` is a send from stage to stage, seen by who waits for it."""
    p = len(stages)
    clocks: list[Numbers] = [0.0] * (p // 2)
    alone = list(clocks)
    done: dict[tuple[str, int, int], Numbers] = {}
    for op in ops(p):
        start, (took, longer) = clocks[op.place], _took(op, stages)
        for need in _needs(op, p):
            start = larger(start, done[need] + hop_s)
        clocks[op.place] = start + took
        alone[op.place] = alone[op.place] + longer
        done.update(dict.fromkeys(_results(op), clocks[op.place]))
    pairs = [(one.total_s + other.total_s) / 2 for one, other in zip(stages, stages[::-1], strict=True)]
    return Waits(fewest_s=reduce(larger, clocks), pairs_s=tuple(pairs[: p // 2]), alone_s=tuple(alone))


def _took(op: Op, stages: Sequence[Pass]) -> tuple[Numbers, Numbers]:
    """(seconds of it, how many of them since it runs alone)."""
    if op.weights is not None:
        return stages[op.weights].weights_s, 0.0
    took: Numbers = 0.0
    longer: Numbers = 0.0
    for way, chunk in (("F", op.forward), ("B", op.backward)):
        if chunk:
            stage = stages[chunk[0]]
            took = took + (stage.total_s - stage.paired_s if way == "F" else stage.paired_s)
            longer = stage.alone_s
    if op.forward and op.backward:
        return took, 0.0
    if op.deferred and op.backward:
        took = took - stages[op.backward[0]].weights_s
    return took + longer, longer
