"""Seconds of a training step: what each pipeline stage computes, what it waits for, what the schedule leaves idle."""

import math
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache

from turnout.plan.collectives import Collective
from turnout.plan.compute import BlockTime, Engine, block_time, head_time, optimizer_s
from turnout.plan.framework import FRAMEWORKS
from turnout.plan.job import Job
from turnout.plan.memory import rank_params
from turnout.plan.parameters import Parameters, fitted
from turnout.plan.pipeline import Stage, idle_passes, stages
from turnout.plan.step import step_of
from turnout.plan.volume import volume
from turnout.topology import Cluster

# multiprocessors a communication kernel takes while it runs: DeepSeek-AI 2024, arXiv:2412.19437, section 3.2.2 (20 of
# 132); NCCL's channels on NVLink are as many
COMMUNICATION_UNITS = 20
# host and device seconds before a collective's first byte: SimuMax 1.2, measured on 8 B200 (22 to 26 us)
# https://github.com/MooreThreads/SimuMax
COLLECTIVE_LAUNCH_S = 22e-6
# axes whose collectives are rings or trees, for which twice the logarithm of the group's size in hops is enough
TREES = ("tp", "etp", "dp", "edp")


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
    parameters = parameters or fitted()
    clock = _Clock(job=job, cluster=cluster, parameters=parameters)
    cut = stages(job.shape, job.strategy.pp, job.strategy.virtual_stages, job.framework.stage_balance)
    passes = [clock.passes(stage) for stage in cut]
    slowest = max(range(len(cut)), key=lambda i: passes[i].total_s)
    return clock.step(cut[slowest], passes[slowest], sum(each.total_s for each in passes))


def collective_s(collective: Collective, cluster: Cluster) -> float:
    """Seconds of all calls of a collective: what leaves the node and what stays travel at once."""
    intra_messages, inter_messages = collective.intra_messages, collective.inter_messages
    if collective.axis in TREES:
        # a tree needs fewer hops than a ring, for the same bytes: Sanders et al. 2009 (two trees), NCCL 2.4
        most = 2 * math.ceil(math.log2(max(2, collective.mesh.size))) * collective.calls
        share = min(1.0, most / max(collective.messages, 1e-9))
        intra_messages, inter_messages = intra_messages * share, inter_messages * share
    link = cluster.alltoall_intra(collective.mesh.local) if collective.axis == "ep" else cluster.intra
    intra = link.time_s(collective.intra_bytes, intra_messages)
    inter = cluster.inter_over(collective.mesh.nodes).time_s(collective.inter_bytes, inter_messages)
    return collective.calls * COLLECTIVE_LAUNCH_S + max(intra, inter)


@lru_cache(maxsize=65536)
def wire_s(job: Job, cluster: Cluster, stage: Stage) -> dict[str, float]:
    """Seconds of each axis's communication for one micro-batch of a stage; of "dp" for the step.

    "fsdp" is what ZeRO-3 sends for every micro-batch. Nothing is hidden yet.
    """
    strategy = job.strategy
    step = step_of(job, cluster.devices_per_node, node_limit=node_limit(job, cluster), stage=stage)
    seconds: dict[str, float] = dict.fromkeys(("tp", "cp", "ep", "pp", "dp", "fsdp"), 0.0)
    every_pass = strategy.zero == 3 and (job.framework.reshards or strategy.pp == 1)
    for each in volume(step):
        axis = {"etp": "ep", "edp": "dp"}.get(each.axis, each.axis)
        axis = "fsdp" if axis == "dp" and every_pass else axis
        seconds[axis] += (job.skew if axis == "ep" else 1.0) * collective_s(each, cluster)
    return {axis: each if axis == "dp" else each / job.micro_batches for axis, each in seconds.items()}


def node_limit(job: Job, cluster: Cluster) -> int:
    """Nodes a token may reach, where the model's router is limited to groups of experts; 0: all."""
    shape, strategy = job.shape, job.strategy
    nodes = math.ceil(strategy.ep * strategy.etp / cluster.devices_per_node)
    if not shape.expert_groups or nodes == 1:
        return 0
    return math.ceil(shape.top_groups * nodes / shape.expert_groups)


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """One micro-batch through one stage, forward and backward, by cause."""

    compute_s: float = 0.0
    tp_s: float = 0.0
    cp_s: float = 0.0
    ep_s: float = 0.0
    pp_s: float = 0.0
    dp_s: float = 0.0
    tax_s: float = 0.0
    launch_s: float = 0.0

    @property
    def total_s(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, kw_only=True)
class _Clock:
    job: Job
    cluster: Cluster
    parameters: Parameters

    @cached_property
    def engine(self) -> Engine:
        return Engine(device=self.cluster.device, parameters=self.parameters)

    @cached_property
    def tax(self) -> float:
        """Share of the device a communication kernel takes."""
        units = self.cluster.device.units
        return min(0.5, COMMUNICATION_UNITS / units) if units else 0.0

    @cached_property
    def _seen(self) -> dict[tuple[object, ...], tuple[_Pass, dict[str, float]]]:
        return {}

    def passes(self, stage: Stage) -> _Pass:
        """One micro-batch through `stage`; stages of the same kind are computed once."""
        return self._timed(stage)[0]

    def _timed(self, stage: Stage) -> tuple[_Pass, dict[str, float]]:
        kinds = tuple(sorted(self._counts(stage).items()))
        key = (kinds, stage.embedding, stage.head)
        if key not in self._seen:
            wire = wire_s(self.job, self.cluster, stage)
            self._seen[key] = (self._stage_pass(stage, wire), wire)
        return self._seen[key]

    # --- one micro-batch ---

    def _stage_pass(self, stage: Stage, wire: dict[str, float]) -> _Pass:
        full = self.job.strategy.recompute == "full"
        blocks = {kind: block_time(self.job, self._layer(kind), self.engine) for kind in self._counts(stage)}
        compute = scores = 0.0
        for kind, count in self._counts(stage).items():
            block = blocks[kind]
            compute += count * (block.forward_s + block.backward_s + self._recomputed_s(block))
            scores += count * block.scores_s
        if stage.head:
            head = head_time(self.job, self.engine)
            compute += head.forward_s + head.backward_s
        hidden = self._hidden(wire, compute, scores, full)
        exposed = {axis: wire[axis] - hidden[axis] for axis in hidden}
        tax = self.tax * sum(hidden.values())
        calls = self.parameters.layer_call_s * (4 / 3 if full else 1) * len(stage.layers)
        launch = max(0.0, calls - compute - tax - sum(exposed.values()))
        return _Pass(
            compute_s=compute, tp_s=exposed["tp"], cp_s=exposed["cp"], ep_s=exposed["ep"], pp_s=exposed["pp"],
            dp_s=exposed["fsdp"], tax_s=tax, launch_s=launch,
        )  # fmt: skip

    def _hidden(self, wire: dict[str, float], compute_s: float, scores_s: float, full: bool) -> dict[str, float]:
        """Seconds of each axis's communication that run behind computation, of one micro-batch."""
        job, strategy = self.job, self.job.strategy
        stages_overlap = strategy.virtual_stages > 1 and job.framework.overlap_pp
        return {
            "tp": self.parameters.hidden_tp * wire["tp"] if job.framework.overlap_tp else 0.0,
            # the ring turns while the scores of the block before are computed: forward, backward, recomputed
            "cp": min(wire["cp"], (4.5 if full else 3.5) * scores_s),
            "ep": self.parameters.hidden_ep * wire["ep"] if strategy.overlap > 1 else 0.0,
            "pp": wire["pp"] if stages_overlap else 0.0,
            "fsdp": min(wire["fsdp"], compute_s),
        }

    def _counts(self, stage: Stage) -> dict[tuple[int, float], int]:
        """Blocks of a stage by kind: experts, and keys a query meets."""
        counts: dict[tuple[int, float], int] = {}
        for layer in stage.layers:
            counts[self._kinds[layer]] = counts.get(self._kinds[layer], 0) + 1
        if stage.head and self.job.shape.mtp_layers:
            last = self._kinds[-1]
            counts[last] = counts.get(last, 0) + self.job.shape.mtp_layers
        return counts

    @cached_property
    def _kinds(self) -> list[tuple[int, float]]:
        shape, length = self.job.shape, self.job.seq_len
        return [(shape.experts_of(i), shape.keys_per_query(i, length)) for i in range(shape.all_layers)]

    def _layer(self, kind: tuple[int, float]) -> int:
        return self._kinds.index(kind)

    def _recomputed_s(self, block: BlockTime) -> float:
        if self.job.strategy.recompute == "full":
            return block.forward_s
        if self.job.strategy.recompute == "selective" and self.job.framework.selective == "products":
            return (block.forward_s - block.scores_s) / 2
        if self.job.strategy.recompute == "selective" and not self.job.framework.flash_attention:
            return block.scores_s
        return 0.0

    # --- the step ---

    def step(self, stage: Stage, micro: _Pass, all_stages_s: float) -> StepTime:
        """All micro-batches of the slowest stage, the schedule's idle time, gradients, optimizer."""
        job, strategy = self.job, self.job.strategy
        m, scale = job.micro_batches, self.parameters.framework_scale(FRAMEWORKS.name_of(job.framework))
        others = all_stages_s - micro.total_s
        bubble = others * idle_passes(strategy) / (strategy.pp - 1) if strategy.pp > 1 else 0.0
        dp, hidden = self._gradients_s(stage, micro)
        dense, routed = rank_params(job, stage)
        update = optimizer_s(dense, job, self.engine, ranks=strategy.dp * strategy.cp)
        update += optimizer_s(routed, job, self.engine, ranks=strategy.edp())
        parts = {f.name: m * getattr(micro, f.name) for f in fields(_Pass)}
        parts["dp_s"] += dp
        parts["tax_s"] += self.tax * hidden
        parts |= {"bubble_s": bubble, "optimizer_s": update}
        parts = {name: scale * seconds for name, seconds in parts.items()}
        return StepTime(**parts, step_s=sum(parts.values()))

    def _gradients_s(self, stage: Stage, micro: _Pass) -> tuple[float, float]:
        """(exposed, hidden) seconds of what is sent once a step: gradients, ZeRO's parameters, tied embeddings."""
        job, strategy = self.job, self.job.strategy
        tied = 0.0
        if strategy.pp > 1 and job.shape.tied_embeddings:
            # first and last stage add up their gradients of the one matrix
            size = job.shape.vocab_size * job.shape.dim / strategy.tp * job.strategy.activation_bytes
            beyond = job.world > self.cluster.devices_per_node
            tied = (self.cluster.inter if beyond else self.cluster.intra).time_s(size, 2)
        total = self._timed(stage)[1]["dp"]
        if not job.framework.overlap_dp:
            return tied + total, 0.0
        # behind the last backward and the first forward pass, but for one block's share at the end
        window = micro.total_s / strategy.virtual_stages
        exposed = max(total / max(1, len(stage.layers)), total - window)
        return tied + exposed, total - exposed
