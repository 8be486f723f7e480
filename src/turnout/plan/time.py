"""Seconds of a training step: its slowest stage, what the schedule leaves idle, gradients, optimizer."""

from dataclasses import dataclass

from turnout.plan.block_wire import boundary
from turnout.plan.collectives import pipeline_sends
from turnout.plan.compute import optimizer_s
from turnout.plan.dualpipe import Waits, waits
from turnout.plan.job import Job
from turnout.plan.parameter_bytes import stage_params
from turnout.plan.parameters import Parameters, fitted
from turnout.plan.passes import Pass, mean_pass, micro_batches, stage_pass, tax_of
from turnout.plan.pipeline import Stage, idle_passes, rank_kinds, stages
from turnout.plan.step_wire import tied_s
from turnout.plan.terms import Numbers, One, Terms, either, larger, reads
from turnout.plan.wire import Run, collective_s, node_limit
from turnout.strategy import Strategy
from turnout.topology import Cluster

__all__ = ["StepTime", "collective_s", "node_limit", "slowest_step", "step_time"]

# of a micro-batch: gradients of inputs and of weights take twice the forward pass
BACKWARD = 2 / 3


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """One optimizer step; the parts are those of the slowest pipeline stage and sum to `step_s`."""

    compute_s: float  # products, attention, element-wise work, recomputation included
    tp_s: float  # exposed communication of tensor and sequence parallelism
    cp_s: float
    ep_s: float
    pp_s: float
    dp_s: float  # of gradients and sharded parameters
    tax_s: float  # computation slowed by communication beside it
    launch_s: float  # the device waiting for the host
    bubble_s: float  # the schedule's idle time, other stages' surplus included
    optimizer_s: float
    step_s: float

    def tokens_per_s(self, job: Job) -> float:
        """Tokens of all devices per second."""
        return job.global_batch * job.seq_len / self.step_s

    def model_flops_per_s(self, job: Job, *, causal: bool = False, recompute: bool = False) -> float:
        """Floating-point operations of a device per second, by the definition the flags choose.

        `causal` counts only keys a query may see; `recompute` adds a forward pass.
        """
        flops = job.shape.forward_flops_per_token(job.seq_len, causal=causal) * (4 if recompute else 3)
        return flops * self.tokens_per_s(job) / job.world


def step_time(job: Job, cluster: Cluster, parameters: Parameters | None = None) -> StepTime:
    """Seconds of one optimizer step of `job` on `cluster`."""
    return slowest_step(One(Run(job=job, cluster=cluster, parameters=parameters or fitted())))


def slowest_step(of: Terms[Run]) -> StepTime:
    """The step of the stage that takes longest; of many layouts, of one pipeline at a time."""
    job = of.subject.job
    strategy = job.strategy
    ranks = rank_kinds(
        job.shape, strategy.pp, strategy.virtual_stages, job.framework.stage_balance,
        both_ways=strategy.schedule == "dualpipe",
    )  # fmt: skip
    passes = [_rank_pass(of, stage, mirror) for stage, mirror, _ in ranks]
    waiting = _waits(of) if strategy.schedule == "dualpipe" else None
    all_stages_s = sum(number * each.total_s for (_, _, number), each in zip(ranks, passes, strict=True))
    steps = [
        _step(of, stage, mirror, each, all_stages_s, waiting)
        for (stage, mirror, _), each in zip(ranks, passes, strict=True)
    ]
    longest = steps[0]
    for step in steps[1:]:
        longest = either(step.step_s > longest.step_s, step, longest)
    return longest


# --- the optimizer ---


@reads("zero", "tp", "pp")
def dense_update_s(run: Run) -> float:
    """The optimizer, for one parameter of a stage that every token meets."""
    strategy = run.job.strategy
    return optimizer_s(1 / strategy.tp, run.job, run.engine, ranks=strategy.dp * strategy.cp)


@reads("zero", "pp", "ep", "etp")
def routed_update_s(run: Run) -> float:
    """The optimizer, for one parameter of a stage's routed experts."""
    strategy = run.job.strategy
    share = run.job.crowding / (strategy.ep * strategy.etp)
    return optimizer_s(share, run.job, run.engine, ranks=strategy.edp())


# --- the step ---


@reads("zero")
def reduces_late(run: Run) -> bool:
    """Whether gradients are summed after the last backward pass alone."""
    framework = run.job.framework
    return not framework.overlap_dp or (framework.zero_sums and run.job.strategy.zero == 1)


@reads("zero")
def gathers_parameters(run: Run) -> bool:
    """Whether an optimizer that is sharded has parameters gathered for the next pass."""
    return run.job.strategy.zero > 0


def _rank_pass(of: Terms[Run], stage: Stage, mirror: Stage | None) -> Pass:
    one = stage_pass(of, stage)
    return one if mirror is None else mean_pass(one, stage_pass(of, mirror))


def _waits(of: Terms[Run]) -> Waits:
    """A pipeline fed from both ends, of the stages as they are; what it sends reaches who waits for it after a hop."""
    job, pp = of.subject.job, of.subject.job.strategy.pp
    alike: dict[tuple[object, ...], Pass] = {}
    passes = []
    for stage in stages(job.shape, pp, job.strategy.virtual_stages, job.framework.stage_balance):
        key = (stage.blocks, stage.embedding, stage.head)
        if key not in alike:
            alike[key] = stage_pass(of, stage)
        passes.append(alike[key])
    return waits(passes, of(boundary).pp_s / pipeline_sends(pp, job.strategy.virtual_stages))


def _bubble_s(strategy: Strategy, micro: Pass, all_stages_s: Numbers) -> Numbers:
    """Idle time of a rank whose neighbours' passes all go one way."""
    if strategy.pp == 1:
        return 0.0
    # more is deferred to the end than a pass can hold: nothing is left of the bubble
    idle = larger(0.0, idle_passes(strategy, micro.weights_s / micro.total_s))
    return (all_stages_s - micro.total_s) * idle / (strategy.pp - 1)


def _step(
    of: Terms[Run], stage: Stage, mirror: Stage | None, micro: Pass, all_stages_s: Numbers, waiting: Waits | None
) -> StepTime:
    """All micro-batches of a rank, the schedule's idle time, gradients, optimizer."""
    run, strategy = of.subject, of.subject.job.strategy
    m, scale = of(micro_batches), run.parameters.framework_scale(run.job.framework.name)
    alone = waiting.alone_s[stage.index] if waiting else 0.0
    bubble = waiting.idle_s(m) if waiting else _bubble_s(strategy, micro, all_stages_s)
    exposed, hidden = _ends_s(of, len(stage.layers), micro)
    held = [stage_params(run.job.shape, each) for each in (stage, mirror) if each is not None]
    # two stages on a rank have twice the copies to share their optimizer
    dense, routed = (sum(each) / (len(held) if of.subject.job.strategy.zero else 1) for each in zip(*held, strict=True))
    parts = {
        "compute_s": m * micro.compute_s, "tp_s": m * micro.tp_s, "cp_s": m * micro.cp_s,
        "ep_s": m * micro.ep_s + alone, "pp_s": m * micro.pp_s, "dp_s": m * micro.dp_s + exposed,
        "tax_s": m * micro.tax_s + tax_of(run.cluster) * hidden, "launch_s": m * micro.launch_s, "bubble_s": bubble,
        "optimizer_s": dense * of(dense_update_s) + routed * of(routed_update_s),
    }  # fmt: skip
    parts = {name: scale * seconds for name, seconds in parts.items()}
    return StepTime(**parts, step_s=sum(parts.values()))


def _ends_s(of: Terms[Run], blocks: int, micro: Pass) -> tuple[Numbers, Numbers]:
    """(exposed, hidden) seconds of what is sent once a step: gradients, ZeRO's parameters, tied embeddings."""
    job, tied, total = of.subject.job, of(tied_s), micro.reduced_s
    # sums behind the last backward pass, gathers behind the first forward one, but for one block's share at the end
    window = either(of(gathers_parameters), 1.0, BACKWARD) * micro.total_s / job.strategy.virtual_stages
    exposed = either(of(reduces_late), total, larger(total / max(1, blocks), total - window))
    return tied + exposed, total - exposed
