"""The page of `plan explain --html`: sliders over the closed forms, one self-contained file without network."""

import base64
import hashlib
import html
import json
import re
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from itertools import product
from math import ceil, log
from typing import Any

from turnout.clusters import CLUSTERS
from turnout.errors import ConfigError
from turnout.plan.collectives import group
from turnout.plan.explain import CLAIMED, GPT4_DP, GPT4_SEQUENCE, GPT4_TOKENS, ExplainRow, tally
from turnout.plan.model import ModelShape
from turnout.plan.query import load_model
from turnout.plan.step import Step
from turnout.plan.volume import volume
from turnout.strategy import Strategy
from turnout.topology import Cluster, Mesh

STAGES = 15  # pipeline stages of the claim's layout; fewer for a model of fewer layers
_SCRIPTS = ("forms.js", "view.js")


@dataclass(frozen=True, kw_only=True)
class Dial:
    """Where the sliders stand."""

    top_k: int  # experts of a token; at most num_experts
    num_experts: int  # of a sparse layer
    experts_per_node: int  # wanted; the closest that ranks allow is taken
    tp: int  # tensor parallel ranks
    shared: bool  # tensor-parallel ranks dispatch a share of the tokens each
    capacity_factor: float
    moe_every: int  # every n-th layer has experts
    batch_tokens: float  # of a step, all replicas
    nic_bytes_per_s: float  # between nodes, one device, one way
    gathers: bool = False  # also count what sharing tokens costs inside the node


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A model on a cluster, cut as the claim cuts it."""

    shape: ModelShape
    cluster: Cluster

    @property
    def stages(self) -> int:
        return min(STAGES, self.shape.num_layers)

    def start(self) -> Dial:
        """The claim's settings, with this model's experts and this cluster's network."""
        shape, per_node = self.shape, self.cluster.devices_per_node
        return Dial(
            top_k=shape.top_k, num_experts=shape.num_experts, experts_per_node=1, tp=min(8, per_node), shared=False,
            capacity_factor=1.0, moe_every=shape.moe_every, batch_tokens=GPT4_TOKENS,
            nic_bytes_per_s=self.cluster.inter.bytes_per_s,
        )  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """What the page's formulas need of model and cluster; bytes, bytes a second, parameters."""
        shape = self.shape
        ffns = [
            shape.shared_params + shape.router_params(layer) if shape.experts_of(layer) else shape.dense_ffn_params
            for layer in range(shape.all_layers)
        ]
        twin = replace(shape, ffn_hidden=shape.expert_hidden)
        return {
            "dim": shape.dim, "width": shape.latent_dim or shape.dim, "element_bytes": 2, "grad_bytes": 2,
            "stacks": [length for length in (shape.encoder_layers, shape.num_layers) if length],
            "dense_first": shape.dense_first, "stages": self.stages, "replicas": GPT4_DP,
            "per_node": self.cluster.devices_per_node, "always_params": shape.dense_params - sum(ffns),
            "ffn_params": shape.dense_ffn_params, "twin_ffn_params": twin.dense_ffn_params,
            "shared_params": shape.shared_params, "expert_params": shape.expert_params,
            "router_params": shape.dim * shape.learned_router + shape.router_bias,
            "intra_bytes_per_s": self.cluster.intra.bytes_per_s,
        }  # fmt: skip


def scene(model: str = "gpt4-moe", cluster: Cluster | None = None) -> Scene:
    """The scene of the page.

    Raises: ConfigError if the model is unknown or has no experts.
    """
    shape = load_model(model)
    if not shape.num_experts:
        raise ConfigError(f"model {model!r} has no experts to explain; try 'gpt4-moe'")
    # one number of experts for all layers, a dense FFN for the layers that lose theirs, no extra prediction heads
    shape = replace(
        shape, experts_by_layer=(), mtp_layers=0, ffn_hidden=shape.ffn_hidden or shape.expert_hidden,
        name=shape.name or model,
    )  # fmt: skip
    return Scene(shape=shape, cluster=cluster or CLUSTERS["dgx-a100"])


# --- the planner's own answer at a setting ---


def placement(dial: Dial, per_node: int) -> tuple[int, Mesh]:
    """(experts of a rank, their ranks on nodes) whose experts a node are closest in proportion to those wanted."""
    ways = [
        (held * mesh.local, held, mesh)
        for held in range(1, dial.num_experts + 1)
        if dial.num_experts % held == 0
        for mesh in (group(dial.num_experts // held, dial.tp, per_node),)
    ]
    ways.sort(key=lambda way: (round(abs(log(way[0] / dial.experts_per_node)), 9), way[0], way[1]))
    return ways[0][1], ways[0][2]


def counted(at: Scene, dial: Dial, *, dense: bool = False) -> ExplainRow:
    """The setting as the planner counts it; `dense`: the same model with one expert that every token meets.

    Raises: ConfigError if the planner cannot lay it out.
    """
    _, mesh = placement(dial, at.cluster.devices_per_node)
    dp = mesh.size * max(1, GPT4_DP // mesh.size)
    strategy = Strategy(
        tp=dial.tp, pp=at.stages, dp=dp, ep=mesh.size, etp=dial.tp, shard_tokens=dial.shared, grad_precision="bf16"
    )
    shape = replace(
        at.shape, num_experts=dial.num_experts, top_k=min(dial.top_k, dial.num_experts), moe_every=dial.moe_every
    )
    if dense:
        strategy = replace(strategy, ep=1, etp=1)
        shape = replace(
            shape,
            num_experts=0,
            top_k=0,
            expert_hidden=0,
            ffn_hidden=shape.expert_hidden,
            expert_groups=0,
            top_groups=0,
        )
    step = Step(
        shape=shape, strategy=strategy, devices_per_node=at.cluster.devices_per_node, tokens=dial.batch_tokens / dp,
        micro_batches=ceil(dial.batch_tokens / dp / GPT4_SEQUENCE), capacity_factor=dial.capacity_factor,
    )  # fmt: skip
    names = (*CLAIMED, "etp gather and scatter") if dial.gathers else CLAIMED
    parts = [part for part in volume(step) if part.name in names or part.axis in ("dp", "edp")]
    cluster = replace(at.cluster, inter=replace(at.cluster.inter, bytes_per_s=dial.nic_bytes_per_s))
    return tally("no experts" if dense else "experts", parts, cluster)


def checks(at: Scene) -> list[dict[str, Any]]:
    """Settings far apart, with the planner's bytes, that the page compares its formulas with when it opens."""
    start = at.start()
    sizes = [tp for tp in (1, 8) if at.cluster.devices_per_node % tp == 0]
    dials = [start, replace(start, shared=True, gathers=True), replace(start, capacity_factor=1.25, moe_every=2)]
    dials += [
        replace(start, tp=tp, num_experts=experts, top_k=k, experts_per_node=per_node, batch_tokens=4e6)
        for tp, experts, k, per_node in product(sizes, (16, 64), (2, 8), (1, 8))
    ]
    return [check(at, dial) for dial in dials]


def check(at: Scene, dial: Dial) -> dict[str, Any]:
    """One setting with the planner's bytes, with experts and without."""
    mixed, plain = counted(at, dial), counted(at, dial, dense=True)
    return {
        "dial": asdict(dial), "intra_bytes": mixed.intra_bytes, "inter_bytes": mixed.inter_bytes,
        "dense_intra_bytes": plain.intra_bytes, "dense_inter_bytes": plain.inter_bytes,
    }  # fmt: skip


# --- the page ---


def page_data(at: Scene) -> dict[str, Any]:
    """All that the page knows, as plain JSON values."""
    return {
        "model": at.shape.name, "cluster": at.cluster.name, "device": at.cluster.device.name, "facts": at.facts(),
        "start": asdict(at.start()), "checks": checks(at),
    }  # fmt: skip


def render(data: dict[str, Any]) -> str:
    """The page of this data. Data is inert JSON: no name of a model or a machine becomes markup."""
    folder = files("turnout.plan") / "page"
    script = "\n".join((folder / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    parts = {
        "title": html.escape(str(data["model"])),
        "digest": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "style": (folder / "explain.css").read_text(encoding="utf-8"),
        "data": text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"),
        "script": script,
    }
    template = (folder / "explain.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)
