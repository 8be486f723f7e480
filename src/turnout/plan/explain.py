"""What experts do to the traffic between nodes: one model's step under switches that are flipped one by one.

The claim it examines: without experts traffic between nodes is far below that inside them, with 16 experts it is about
equal. Per token, layer and device, tensor parallelism sends 8 (t-1)/t h elements inside the node, and the experts'
all-to-all 4 k (E-1)/E h s between nodes, one expert a node, s = 1 if every tensor-parallel rank sends whole tokens and
1/t if they share them. Source: SemiAnalysis 2023 on GPT-4 (a leak, so every number of it is rumour).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import ceil, isfinite
from typing import Any

from turnout.alltoall import expected_distinct
from turnout.clusters import CLUSTERS
from turnout.errors import ConfigError
from turnout.plan.collectives import Collective
from turnout.plan.model import ModelShape
from turnout.plan.query import load_model
from turnout.plan.step import Step
from turnout.plan.volume import volume
from turnout.strategy import Strategy
from turnout.topology import Cluster

# what the claim is about; gathers inside the node and tables come with the complete rows only
CLAIMED = ("tp all-reduce", "pp send", "ep all-to-all")
GPT4_TOKENS = 60e6  # of a step, at the end of training; the leak
GPT4_SEQUENCE = 8192  # tokens; the leak
GPT4_DP = 208  # 25,000 devices by 8 x 15; the leak says about 25,000 A100


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """The step of the claim with some switches flipped."""

    title: str
    strategy: Mapping[str, Any] = field(default_factory=dict)  # changes of the layout
    shape: Mapping[str, Any] = field(default_factory=dict)  # changes of the model
    step: Mapping[str, Any] = field(default_factory=dict)  # changes of the query
    batch_tokens: float = GPT4_TOKENS  # of a step, all replicas
    dense: bool = False  # the same model with one expert, which every token meets
    names: tuple[str, ...] = ()  # collectives that count; empty: those of the claim, and data parallel
    complete: bool = False  # every collective counts


@dataclass(frozen=True, kw_only=True)
class ExplainRow:
    """One scenario: what one device sends in a step."""

    scenario: str
    intra_bytes: float
    inter_bytes: float
    intra_s: float  # messages and bytes over the link inside the node
    inter_s: float
    intra_bandwidth_s: float  # bytes alone, over the bandwidth
    inter_bandwidth_s: float
    parts: tuple[Collective, ...]

    @property
    def inter_over_intra(self) -> float:
        return self.inter_bytes / self.intra_bytes if self.intra_bytes else float("inf")

    def to_json(self) -> dict[str, Any]:
        """The row as `plan explain --json` prints it."""
        names = ("scenario", "intra_bytes", "inter_bytes", "inter_over_intra", "intra_s", "inter_s")
        more = ("intra_bandwidth_s", "inter_bandwidth_s")
        row = {name: getattr(self, name) for name in (*names, *more)}
        # JSON has no infinity: a node inside which nothing is sent has no ratio
        ratio = row["inter_over_intra"]
        return row | {"inter_over_intra": ratio if isfinite(ratio) else None, "parts": _by_axis(self.parts)}


_SHARED = {"shard_tokens": True}
SCENARIOS = (
    Scenario(title="no experts", dense=True),
    Scenario(title="no experts, scatter-gather", dense=True, strategy={"scatter_gather": True}),
    Scenario(title="no experts, fp32 gradients", dense=True, strategy={"grad_precision": "fp32"}),
    Scenario(title="no experts, batch of 4M tokens", dense=True, batch_tokens=4e6),
    Scenario(title="{E} experts, top-{k}"),
    Scenario(title="{E} experts, all-to-all alone", names=("tp all-reduce", "ep all-to-all")),
    Scenario(title="{E} experts, scatter-gather", strategy={"scatter_gather": True}),
    Scenario(title="{E} experts, full recompute", strategy={"recompute": "full"}),
    Scenario(title="{E} experts, capacity factor 1.25", step={"capacity_factor": 1.25}),
    Scenario(title="{E} experts, fp32 gradients", strategy={"grad_precision": "fp32"}),
    Scenario(title="{E} experts, batch of 4M tokens", batch_tokens=4e6),
    Scenario(title="{E} experts, top-1", shape={"top_k": 1}),
    Scenario(title="{E} experts, every other layer", shape={"moe_every": 2}),
    Scenario(title="tokens shared over tp", strategy=_SHARED),
    Scenario(title="tokens shared over tp, scatter-gather", strategy=_SHARED | {"scatter_gather": True}),
    Scenario(
        title="tokens shared over tp, all-to-all alone", strategy=_SHARED, names=("tp all-reduce", "ep all-to-all")
    ),
    Scenario(title="{E} experts, fp8 dispatch", strategy={"dispatch_precision": "fp8"}),
    Scenario(title="{E} experts, everything counted", complete=True),
    Scenario(title="tokens shared over tp, everything counted", strategy=_SHARED, complete=True),
    Scenario(title="coordinated all-to-all, everything counted", strategy={"alltoall": "coordinated"}, complete=True),
    Scenario(
        title="sequence parallel, experts whole on two nodes",
        strategy={"sequence_parallel": True, "etp": 1, "folded": True},
        complete=True,
    ),
    Scenario(title="sequence parallel, experts cut by tp", strategy={"sequence_parallel": True}, complete=True),
)


def explain(model: str = "gpt4-moe", cluster: Cluster | None = None) -> tuple[ExplainRow, ...]:
    """The rows of the explanation of `model` on `cluster` (A100 nodes unless given).

    Raises: ConfigError if the model is unknown or has no experts.
    """
    shape = load_model(model)
    if not shape.num_experts:
        raise ConfigError(f"model {model!r} has no experts to explain; try 'gpt4-moe'")
    cluster = cluster or CLUSTERS["dgx-a100"]
    base = base_step(shape, cluster)
    return tuple(row_of(scenario, base, cluster) for scenario in SCENARIOS)


def base_step(shape: ModelShape, cluster: Cluster) -> Step:
    """The claim's step: tensor parallel over 8, 15 stages, one expert a node of 8, bf16 on the wire, the leak's batch.

    Another model keeps the leak's batch and stages; its replicas are a multiple of its experts.
    """
    experts = max(map(shape.experts_of, shape.sparse_layers))
    dp = experts * max(1, GPT4_DP // experts)
    strategy = Strategy(tp=8, pp=min(15, shape.num_layers), dp=dp, ep=experts, etp=8, grad_precision="bf16")
    return Step(
        shape=shape,
        strategy=strategy,
        devices_per_node=cluster.devices_per_node,
        tokens=GPT4_TOKENS / dp,
        micro_batches=ceil(GPT4_TOKENS / dp / GPT4_SEQUENCE),
    )


def row_of(scenario: Scenario, base: Step, cluster: Cluster) -> ExplainRow:
    """One scenario of `base`."""
    # a model of experts only needs a width for the blocks that a scenario makes dense
    shape = replace(base.shape, ffn_hidden=base.shape.ffn_hidden or base.shape.expert_hidden, **scenario.shape)
    strategy = replace(base.strategy, **scenario.strategy)
    if scenario.dense:
        shape = replace(
            shape, num_experts=0, top_k=0, expert_hidden=0, experts_by_layer=(), ffn_hidden=base.shape.expert_hidden
        )
        strategy = replace(strategy, ep=1, etp=1)
    tokens = scenario.batch_tokens / strategy.dp
    parts = volume(replace(base, shape=shape, strategy=strategy, tokens=tokens, **scenario.step))
    title = scenario.title.format(E=base.strategy.ep, k=base.shape.top_k)
    return tally(title, [part for part in parts if _counts(scenario, part)], cluster)


def tally(title: str, parts: list[Collective], cluster: Cluster) -> ExplainRow:
    """Bytes and seconds of some collectives, by tier."""
    tiers = [part.tiers_s(cluster) for part in parts]
    intra_bytes = sum(part.intra_bytes for part in parts)
    return ExplainRow(
        scenario=title,
        intra_bytes=intra_bytes,
        inter_bytes=sum(part.inter_bytes for part in parts),
        intra_s=sum(intra_s for intra_s, _ in tiers),
        inter_s=sum(inter_s for _, inter_s in tiers),
        intra_bandwidth_s=intra_bytes / cluster.intra.bytes_per_s,
        inter_bandwidth_s=sum(part.inter_bytes / part.inter_link(cluster).bytes_per_s for part in parts),
        parts=tuple(parts),
    )


def alltoall_over_tensor(
    *, top_k: int, num_experts: int, tp: int, shared: bool, experts_per_node: int = 1, merged: bool = False
) -> float:
    """Bytes of the experts between nodes over bytes of tensor parallelism inside them: 4 c s over 8 (t-1)/t.

    c = k (E-m)/E copies of a token leave its node, m experts a node; D (E-m)/E where copies for one node are `merged`.
    Independent of width, layers and batch; k and s drive it, the number of experts hardly.
    """
    nodes = num_experts // experts_per_node
    copies = expected_distinct(num_experts, nodes, top_k) if merged else top_k
    remote = copies * (num_experts - experts_per_node) / num_experts
    return 4 * remote * (1 / tp if shared else 1.0) / (8 * (tp - 1) / tp)


def _counts(scenario: Scenario, part: Collective) -> bool:
    if scenario.complete:
        return True
    return part.name in scenario.names if scenario.names else part.name in CLAIMED or part.axis in ("dp", "edp")


def _by_axis(parts: tuple[Collective, ...]) -> dict[str, float]:
    totals: dict[str, float] = {}
    for part in parts:
        totals[part.axis] = totals.get(part.axis, 0.0) + part.total_bytes
    return totals
