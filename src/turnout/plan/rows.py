"""What a row in the schema of published_cases.json describes: machine, model, code, layout, batch."""

import re
from dataclasses import replace
from typing import Any, Literal

from turnout.clusters import CLUSTERS
from turnout.errors import TurnoutError
from turnout.plan.framework import FRAMEWORKS, Framework
from turnout.plan.job import Job
from turnout.plan.memory import memory
from turnout.plan.model import MLAShape, ModelShape
from turnout.plan.shapes import SHAPES, gpt, llama, with_experts
from turnout.strategy import Precision, Strategy
from turnout.topology import Cluster

Row = dict[str, Any]
# words of a row's `gpu`, the first that is found deciding
_MACHINES = (
    ("GB300", "gb300-nvl72"), ("GB200", "gb200-nvl72"), ("B300", "dgx-b300"), ("B200", "dgx-b200"),
    ("H100-96", "h100-hbm2e"), ("H100-EFA", "aws-p5"), ("H200", "dgx-h200"), ("H100", "dgx-h100"), ("H800", "h800"),
    ("A800", "a800"), ("A100-40", "dgx-a100-40"), ("A100", "dgx-a100"), ("V100", "dgx2-v100"), ("TPUv4", "tpu-v4"),
    ("TPUv5p", "tpu-v5p"), ("MI300", "mi300x"), ("910B", "ascend-910b"),
)  # fmt: skip
_PRECISIONS: tuple[tuple[str, Precision], ...] = (
    ("fp4", "fp4"), ("fp8", "fp8"), ("float8", "fp8"), ("fp16", "fp16"), ("fp32", "fp32"),
)  # fmt: skip
# an all-reduce inside a node below this share of what the link carries did not run on it
NVLINK_IN_USE = 0.5
# of the buffer that runs measured their bandwidths with; not published: 1 GiB taken
TESTED_BYTES = 2**30
# year and month since which torchtitan compiles its loss: https://github.com/pytorch/torchtitan/pull/1033
_COMPILED_LOSS = 202504
# flash attention (arXiv:2205.14135) is of May 2022; what was published before it kept scores in memory
_FLASH_ATTENTION = 2206


def count(record: Row, name: str, default: int | None = None) -> int:
    """A positive whole number of a row or of a part of one; 0 and null are `default`.

    Raises: Refused if it is missing and has no default, or is not such a number.
    """
    value = record.get(name)
    if value in (None, 0, ""):
        if default is None:
            raise Refused(f"the row does not say {name}")
        return default
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole or value < 0:
        raise Refused(f"{name}={value!r} is not a positive whole number")
    return int(value)


def _number(record: Row, name: str, default: float) -> float:
    value = record.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise Refused(f"{name}={value!r} is not a number of at least 0")
    return float(value)


class Refused(TurnoutError):
    """A row says too little, or asks for what the planner does not model."""


def cluster_of(row: Row) -> Cluster:
    """The machine a row ran on. Raises: Refused if no description fits."""
    gpu = str(row.get("gpu"))
    for words, name in _MACHINES:
        if words in gpu and "core" not in gpu:
            return _measured_fabric(row, CLUSTERS[name])
    raise Refused(f"gpu={gpu!r} has no cluster description; known: {', '.join(CLUSTERS.names())}")


def _measured_fabric(row: Row, cluster: Cluster) -> Cluster:
    """The cluster with what a row's own collectives measured, where it says so."""
    inside = _number(row, "all_reduce_intra_gb_per_s", 0.0) * 1e9
    if 0 < inside < NVLINK_IN_USE * cluster.intra.bytes_per_s:
        cluster = replace(cluster, intra=replace(cluster.intra, bytes_per_s=inside))
    gathered, summed = (_number(row, f"all_{name}_gb_per_s", 0.0) * 1e9 for name in ("gather", "reduce"))
    if not (gathered or summed) or count(row, "gpus") <= cluster.devices_per_node:
        return cluster
    if gathered:
        # most hops of a ring are inside nodes, and where its steps are slow they are slow on both
        hop = _hop_s(row, cluster, gathered)
        intra, inter = (replace(each, latency_s=max(each.latency_s, hop)) for each in (cluster.intra, cluster.inter))
        return replace(cluster, intra=intra, inter=inter)
    # bus bandwidth counts a node's cards together
    card = min(cluster.inter.bytes_per_s, summed / cluster.devices_per_node)
    return replace(cluster, inter=replace(cluster.inter, bytes_per_s=card))


def _hop_s(row: Row, cluster: Cluster, gathered: float) -> float:
    """Seconds of a step of a ring over nodes: what a run's own all-gather took beyond its bytes, step by step."""
    node_bytes_per_s = cluster.inter.bytes_per_s * cluster.devices_per_node
    return TESTED_BYTES / count(row, "gpus") * (1 / gathered - 1 / node_bytes_per_s)


def shape_of(row: Row, models: dict[str, Row]) -> ModelShape:
    """The model of a row: its own dimensions, a named shape, or the file's record of it.

    Raises: Refused if none of the three is there.
    """
    name = str(row.get("model"))
    dims = row.get("dims") or {}
    if not isinstance(dims, dict):
        raise Refused(f"dims={dims!r} is not an object")
    if name in SHAPES:
        shape = SHAPES[name]
    elif "layers" in dims or name in models:
        shape = shape_of_record(dims if "layers" in dims else models[name], name)
    else:
        raise Refused(f"model={name!r} has no dimensions; named shapes: {', '.join(SHAPES.names())}")
    layers = count(row, "n_layers_override", 0)
    if layers:
        # cut models keep one dense block of those in front
        shape = replace(shape, num_layers=layers, dense_first=min(shape.dense_first, 1))
    return replace(shape, mtp_layers=1) if row.get("mtp") else shape


def shape_of_record(record: Row, name: str) -> ModelShape:
    """A model record of the file (`layers`, `hidden`, `heads`, ...) as a shape."""
    layers, dim, heads, vocab = (count(record, key) for key in ("layers", "hidden", "heads", "vocab"))
    ffn = count(record, "ffn_dense", count(record, "ffn", 4 * dim))
    moe = record.get("moe") or (record if record.get("experts") else None)
    if not record.get("gated_mlp", bool(moe)) and not record.get("gated"):
        shape = gpt(layers=layers, dim=dim, heads=heads, vocab=vocab, ffn=ffn)
    else:
        kv_heads = count(record, "kv_heads", heads)
        shape = llama(layers=layers, dim=dim, ffn=ffn, heads=heads, kv_heads=kv_heads, vocab=vocab)
    shape = replace(shape, name=name, tied_embeddings=bool(record.get("tied", shape.tied_embeddings)))
    shape = _noted(shape, record)
    if moe:
        shape = with_experts(
            replace(shape, dense_first=count(moe, "dense_first_layers", 0)), experts=count(moe, "experts"),
            top_k=count(moe, "top_k"), hidden=count(moe, "expert_ffn"), shared=count(moe, "shared_ffn", 0),
        )  # fmt: skip
    return shape


def _noted(shape: ModelShape, record: Row) -> ModelShape:
    """The shape with the head widths a record gives, as fields or in the words of its note."""
    note = str(record.get("note") or "")
    latent = re.search(r"q_lora (\d+), kv_lora (\d+), qk nope (\d+) \+ rope (\d+), v (\d+)", note)
    if latent:
        q_rank, kv_rank, nope, rope, v = map(int, latent.groups())
        mla = MLAShape(q_rank=q_rank, kv_rank=kv_rank, nope_dim=nope, rope_dim=rope, v_dim=v)
        return replace(shape, mla=mla, head_dim=nope + rope)
    width = re.search(r"head_dim (\d+)", note)
    return replace(shape, head_dim=count(record, "head_dim", int(width[1]) if width else shape.head_dim))


def framework_of(row: Row) -> Framework:
    """The code a row ran under, from its suite, system and source."""
    words = " ".join(str(row.get(key) or "") for key in ("suite", "system", "source", "id")).lower()
    if "nanotron" in words:
        return FRAMEWORKS["nanotron"]
    if "torchtitan" in words:
        return FRAMEWORKS[_torchtitan(row)]
    published = re.search(r"arxiv[: ](\d{4})\.", words)
    if row.get("precision") == "fp16" or (published and int(published[1]) < _FLASH_ATTENTION):
        return FRAMEWORKS["megatron-2021"]
    if row.get("system") == "Megatron-LM" and row.get("suite") == "megascale":
        return FRAMEWORKS["megatron-2022"]
    return FRAMEWORKS["nemo" if "nemo" in words or "bridge" in words else "megatron-core"]


def _torchtitan(row: Row) -> str:
    """Which torchtitan a row ran under, by the date in the name of its source; without one, today's."""
    dated = re.search(r"(20[12]\d)-?([01]\d)", str(row.get("source")))
    before = dated is not None and int(dated[1] + dated[2]) < _COMPILED_LOSS
    return "torchtitan-2024" if before or "eager" in str(row.get("precision")) else "torchtitan"


def precision_of(row: Row) -> Precision:
    """Precision of matrix products."""
    words = str(row.get("precision", "bf16")).lower()
    for name, precision in _PRECISIONS:
        if name in words:
            return precision
    return "bf16"


def job_of(row: Row, models: dict[str, Row]) -> Job:
    """The training job of a row. Raises: Refused or ConfigError naming what is missing or does not fit."""
    shape, framework = shape_of(row, models), framework_of(row)
    gpus, batch, length = (count(row, name) for name in ("gpus", "gbs", "seq"))
    layout = row.get("layout") or {}
    if not isinstance(layout, dict) or "tp" not in layout:
        raise Refused("layout is not complete: tp is not given")
    if shape.num_experts and "ep" not in layout:
        raise Refused("layout is not complete: ep is not given for a model with experts")
    if row.get("async_tp"):
        framework = replace(framework, overlap_tp=True)
    strategy = _strategy(row, layout, shape, framework)
    strategy = strategy.check(gpus, num_experts=shape.num_experts, num_layers=shape.all_layers)
    job = Job(
        shape=shape, strategy=strategy, seq_len=length, global_batch=batch, framework=framework,
        skew=_number(row, "skew", 1.0),
    )  # fmt: skip
    if _recompute(row) or framework.flash_attention:
        return job
    return _least_recompute(job, cluster_of(row))


def _strategy(row: Row, layout: Row, shape: ModelShape, framework: Framework) -> Strategy:
    tp, pp, virtual = (count(layout, key, 1) for key in ("tp", "pp", "vp"))
    if row.get("schedule") == "interleaved":
        virtual = max(2, virtual)
    if layout.get("vp") is None and pp >= 4 and framework.overlap_pp and not row.get("schedule"):
        # published Megatron-Core recipes interleave deep pipelines, most with one block a chunk
        virtual = max(1, shape.all_layers // pp)
    # recipes may count embedding and output matrix as blocks to cut
    virtual = 1 if pp == 1 else min(virtual, max(1, shape.all_layers // pp))
    sequence = tp > 1 and (framework.sequence_parallel or "sequence" in str(row.get("recompute") or ""))
    fsdp = count(layout, "fsdp", 0)
    zero = layout.get("zero")
    if zero is None:
        zero = 3 if fsdp > 1 else (1 if framework.overlap_dp else 0)
    etp = count(layout, "etp", tp if row.get("method") == "MCore" else 1) if shape.num_experts else 1
    micro_batch = count(row, "mbs", 1)
    if framework.name.startswith("torchtitan") and pp > 1:
        # its batch a rank is cut into as many micro-batches as there are stages
        micro_batch = max(1, micro_batch // (pp * virtual))
    return Strategy(
        tp=tp, pp=pp, cp=count(layout, "cp", 1), virtual_stages=virtual, ep=count(layout, "ep", 1), etp=etp,
        schedule="interleaved" if virtual > 1 else "1f1b", sequence_parallel=sequence, folded=bool(shape.num_experts),
        zero=zero, recompute=_recompute(row) or "none", micro_batch=micro_batch, precision=precision_of(row),
        overlap=2 if "overlap on" in str(row.get("dispatcher")) else 1,
        scatter_gather=framework.scatter_gather and pp > 1,
        alltoall=_alltoall(row, shape, count(layout, "ep", 1) * etp) if shape.num_experts else "flat",
        grad_precision=framework.wire_precision,
    )  # fmt: skip


def _alltoall(row: Row, shape: ModelShape, ranks: int) -> str:
    """The all-to-all program: what the row says; else what routing limited to nodes is made for, or a flat one.

    `ranks` that share the experts of a layer; on one node there is nothing to merge.
    """
    dispatcher = str(row.get("dispatcher") or "").lower()
    if "deepep" in dispatcher or "hybridep" in dispatcher:
        return "node_dedup"
    spread = ranks > cluster_of(row).devices_per_node
    return "node_dedup" if not dispatcher and shape.expert_groups and spread else "flat"


def _recompute(row: Row) -> Literal["", "none", "selective", "full"]:
    """What the row says of recomputation; empty if nothing."""
    words = f"{row.get('recompute') or ''} {row.get('notes') or ''}".lower()
    if row.get("recompute") is None and "recompute" not in words:
        return ""
    if "full" in words or "rematerial" in words:
        return "full"
    return "selective" if "selective" in words else "none"


def _least_recompute(job: Job, cluster: Cluster) -> Job:
    """The job with the least recomputation that fits the device: what a row without flash attention most likely ran."""
    for recompute in ("none", "selective", "full"):
        tried = replace(job, strategy=replace(job.strategy, recompute=recompute))
        if memory(tried).fits(cluster.device.memory_bytes):
            return tried
    return job
