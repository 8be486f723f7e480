"""One micro-batch through one pipeline stage: what it computes, what it waits for, what runs behind what."""

from dataclasses import dataclass

from turnout.plan.block_wire import (
    Boundary,
    boundary,
    context_s,
    exchange_wire,
    expert_tensor_s,
    expert_weights_s,
    table_s,
    tensor_s,
)
from turnout.plan.compute import BlockTime, block_time, head_time
from turnout.plan.data_volume import dense_stage_params
from turnout.plan.model import ModelShape
from turnout.plan.parameter_bytes import stage_params
from turnout.plan.pipeline import Stage, like_blocks
from turnout.plan.step_wire import SLOTS, Reduced, dense_reduced, routed_reduced
from turnout.plan.terms import Numbers, Terms, either, larger, reads, smaller
from turnout.plan.wire import Run
from turnout.topology import Cluster

# multiprocessors a communication kernel takes while it runs: DeepSeek-AI 2024, arXiv:2412.19437, section 3.2.2 (20 of
# 132); NCCL's channels on NVLink are as many
COMMUNICATION_UNITS = 20


# --- terms of computation ---


@dataclass(frozen=True, kw_only=True)
class Again:
    """What recomputation repeats of a block's forward pass."""

    forward: float  # share of all of it
    scores: float  # share of the scores on top
    light: float  # share of norms, up-projections and gated activations
    whole: bool  # whether blocks keep their inputs alone


@reads("recompute")
def repeated(run: Run) -> Again:
    """What backward computes again."""
    recompute, framework = run.job.strategy.recompute, run.job.framework
    if recompute == "full":
        return Again(forward=1.0, scores=0.0, light=0.0, whole=True)
    if recompute == "selective" and framework.selective == "products":
        return Again(forward=0.5, scores=-0.5, light=0.0, whole=False)
    scores = recompute == "selective" and not framework.flash_attention
    return Again(forward=0.0, scores=float(scores), light=float(recompute == "light"), whole=False)


@reads("tp", "sequence_parallel", "tokens", "ep", "etp", "adaptive_r")
def block_s(run: Run, block: int) -> BlockTime:
    """One block, one micro-batch."""
    return block_time(run.job, block, run.engine)


@reads("tp", "tokens")
def head_s(run: Run) -> BlockTime:
    """The output matrix and the loss of one micro-batch."""
    return head_time(run.job, run.engine)


# --- terms that are fields ---


@reads("tokens")
def rank_tokens(run: Run) -> float:
    """Tokens of one micro-batch on one rank."""
    return run.job.rank_tokens


@reads("micro_batches")
def micro_batches(run: Run) -> int:
    """Micro-batches of a step."""
    return run.job.micro_batches


@reads("ep")
def waiting(run: Run) -> float:
    """What the busiest expert rank takes for its rows over what the mean one does: all wait for it."""
    return run.job.busiest


@reads("overlap")
def chunks(run: Run) -> int:
    """Pieces the experts' exchange is cut into."""
    return run.job.strategy.overlap


# --- one micro-batch ---


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One micro-batch through one stage, forward and backward, by cause."""

    compute_s: Numbers
    tp_s: Numbers
    cp_s: Numbers
    ep_s: Numbers
    pp_s: Numbers
    dp_s: Numbers
    tax_s: Numbers
    launch_s: Numbers
    total_s: Numbers  # all of these
    backward_s: Numbers  # of these, the backward pass as it runs alone
    weights_s: Numbers  # of that, gradients of weights
    reduced_s: Numbers  # what is sent once a step, on the wire: gradients, parameters
    paired_s: Numbers = 0.0  # of total_s, the backward pass
    alone_s: Numbers = 0.0  # what either pass takes longer where none of the other direction runs beside it


@dataclass(frozen=True, kw_only=True)
class _Work:
    """One micro-batch through one stage with nothing hidden."""

    compute_s: Numbers
    scores_s: Numbers  # of the forward pass, between the projections of attention
    backward_s: Numbers
    weights_s: Numbers  # of the backward pass, gradients of weights
    wire_s: dict[str, Numbers]
    reduced_s: Numbers  # on the wire once a step


def stage_pass(of: Terms[Run], stage: Stage) -> Pass:
    """One micro-batch through `stage`: what can run behind computation does, and slows it."""
    run, again = of.subject, of(repeated)
    work = _work(of, stage)
    hidden = _hidden(of, work)
    exposed = {axis: work.wire_s[axis] - hidden[axis] for axis in hidden}
    tax = tax_of(run.cluster) * sum(hidden.values())
    busy = work.compute_s + tax + sum(exposed.values())
    # alone, a backward pass has nothing of the other direction to hide its half of the exchange behind
    backward = work.backward_s + sum(work.wire_s[axis] for axis in ("tp", "cp", "ep")) / 2
    calls = run.parameters.layer_call_s * len(stage.layers)
    launch = larger(0.0, either(again.whole, 4 / 3 * calls, calls) - busy)
    both_ways = run.job.strategy.schedule == "dualpipe"
    alone = (1 - tax_of(run.cluster)) * hidden["ep"] / 2 if both_ways else 0.0
    return Pass(
        compute_s=work.compute_s, tp_s=exposed["tp"], cp_s=exposed["cp"], ep_s=exposed["ep"], pp_s=exposed["pp"],
        dp_s=exposed["dp"], tax_s=tax, launch_s=launch, total_s=busy + launch,
        backward_s=backward, weights_s=work.weights_s, reduced_s=work.reduced_s,
        paired_s=work.backward_s + (busy + launch - work.compute_s) / 2, alone_s=alone,
    )  # fmt: skip


def _work(of: Terms[Run], stage: Stage) -> _Work:
    shape, again = of.subject.job.shape, of(repeated)
    ends: Boundary = of(boundary)
    compute, backward, weights = _head_s(of, stage)
    tables = stage.embedding + stage.head * (1 + shape.mtp_layers)
    wire: dict[str, Numbers] = {"tp": tables * of(table_s) + ends.tp_s, "cp": 0.0, "ep": 0.0, "pp": ends.pp_s}
    scores: Numbers = 0.0
    for block, number in _timed_blocks(shape, stage):
        time: BlockTime = of(block_s, block)
        repeated_s = again.forward * time.forward_s + again.scores * time.scores_s + again.light * time.light_s
        compute = compute + number * (time.forward_s + time.backward_s + repeated_s)
        scores = scores + number * time.scores_s
        backward = backward + number * (time.backward_s + repeated_s)
        weights = weights + number * time.weights_s
        wire["tp"] = wire["tp"] + number * of(tensor_s, block)
        wire["cp"] = wire["cp"] + number * of(context_s, block)
        if shape.experts_of(block):
            wire["ep"] = wire["ep"] + number * _experts_wire_s(of, block)
    wire["dp"], once = _gradients_s(of, stage)
    return _Work(
        compute_s=compute, scores_s=scores, backward_s=backward, weights_s=weights, wire_s=wire, reduced_s=once
    )


def _head_s(of: Terms[Run], stage: Stage) -> tuple[Numbers, Numbers, Numbers]:
    """Seconds of the output matrix and the loss: (all, the backward pass, of it gradients of weights)."""
    if not stage.head:
        return 0.0, 0.0, 0.0
    head: BlockTime = of(head_s)
    return head.forward_s + head.backward_s, head.backward_s, head.weights_s


def _timed_blocks(shape: ModelShape, stage: Stage) -> tuple[tuple[int, int], ...]:
    """Blocks a micro-batch passes, those that predict further tokens included."""
    if not stage.head or not shape.mtp_layers:
        return stage.blocks
    last = like_blocks(shape)[-1]
    numbers = dict(stage.blocks)
    return tuple((numbers | {last: numbers.get(last, 0) + shape.mtp_layers}).items())


def _experts_wire_s(of: Terms[Run], block: int) -> Numbers:
    """The all-to-all of the busiest rank, and the gathers of ranks that share an expert."""
    tokens, pieces = of(rank_tokens), of(chunks)
    seconds = of(exchange_wire, block, False).seconds(tokens, pieces)
    again = of(exchange_wire, block, True).seconds(tokens, pieces)
    seconds = seconds + either(of(repeated).whole, again, 0.0) + of(expert_tensor_s, block)
    return of(waiting) * seconds + of(expert_weights_s, block)


def _hidden(of: Terms[Run], work: _Work) -> dict[str, Numbers]:
    """Seconds of each axis's communication that run behind computation, of one micro-batch."""
    run, wire = of.subject, work.wire_s
    framework, strategy, parameters = run.job.framework, run.job.strategy, run.parameters
    # the ring turns while the scores of the block before are computed: forward, backward, recomputed
    behind_scores = either(of(repeated).whole, 4.5, 3.5) * work.scores_s
    # chunks of both directions run beside each other, and each hides what the other sends
    both_ways = strategy.schedule == "dualpipe"
    exchange = smaller(wire["ep"], work.compute_s)
    return {
        "tp": smaller(_hidden_tp(run) * wire["tp"], work.compute_s),
        "cp": smaller(wire["cp"], behind_scores),
        "ep": exchange if both_ways else either(of(chunks) > 1, parameters.hidden_ep * wire["ep"], 0.0),
        "pp": wire["pp"] if both_ways or (strategy.virtual_stages > 1 and framework.overlap_pp) else 0.0,
        "dp": smaller(wire["dp"], work.compute_s),
    }


def _hidden_tp(run: Run) -> float:
    """Share of tensor-parallel communication behind products, where framework or layout cuts it: not the last chunk."""
    chunks = run.job.strategy.tp_overlap
    if run.job.framework.overlap_tp:
        return run.parameters.hidden_tp
    return min(run.parameters.hidden_tp, 1 - 1 / chunks)


def mean_pass(one: Pass, other: Pass) -> Pass:
    """A micro-batch on a rank that holds two stages and takes every second micro-batch through each.

    What is sent once a step is sent for both.
    """
    mean = {name: (value + getattr(other, name)) / 2 for name, value in vars(one).items()}
    return Pass(**mean | {"reduced_s": one.reduced_s + other.reduced_s})


def tax_of(cluster: Cluster) -> float:
    """Share of the device a communication kernel takes."""
    units = cluster.device.units
    return min(0.5, COMMUNICATION_UNITS / units) if units else 0.0


def _gradients_s(of: Terms[Run], stage: Stage) -> tuple[Numbers, Numbers]:
    """Seconds over ranks that share parameters: (of every micro-batch, once a step)."""
    job = of.subject.job
    dense, routed = dense_stage_params(job.shape, stage), stage_params(job.shape, stage)[1]
    slots = SLOTS if job.strategy.zero_size else SLOTS[:2]  # without copies of a shard nothing is summed over them
    pieces = job.framework.block_collectives * max(1, len(stage.layers))
    each_pass: Numbers = 0.0
    once: Numbers = 0.0
    for term, number in ((dense_reduced, dense), (routed_reduced, routed)):
        for slot in slots if number else ():
            reduced: Reduced = of(term, slot)
            calls = larger(1.0, either(job.framework.block_collectives > 0, pieces, number * reduced.buckets))
            seconds = reduced.wire.seconds(number, calls)
            each_pass = each_pass + seconds * (reduced.each_pass + reduced.spread / of(micro_batches))
            once = once + seconds * reduced.once
    return each_pass, once
