"""The job that a row in the schema of published_cases.json describes: model, code, layout, batch."""

import re
from dataclasses import replace

from turnout.plan.framework import FRAMEWORKS, Framework
from turnout.plan.job import Job
from turnout.plan.memory import memory
from turnout.plan.model import ModelShape
from turnout.plan.row_fields import Refused, Row, count, number
from turnout.plan.row_machine import cluster_of
from turnout.plan.row_model import shape_of
from turnout.plan.row_words import Schedule, dispatcher_of, precision_of, recompute_of, schedule_of
from turnout.strategy import Strategy
from turnout.topology import Cluster

# fields of a row's layout; edp follows from the others
_LAYOUT = ("tp", "pp", "cp", "vp", "ep", "etp", "edp", "dp", "fsdp", "zero", "sp")
# year and month since which torchtitan compiles its loss: https://github.com/pytorch/torchtitan/pull/1033
_COMPILED_LOSS = 202504
# flash attention (arXiv:2205.14135) is of May 2022; what was published before it kept scores in memory
_FLASH_ATTENTION = 2206


def framework_of(row: Row) -> Framework:
    """The code a row ran under, from its suite, system and source."""
    words = " ".join(str(row.get(key) or "") for key in ("suite", "system", "source", "id")).lower()
    if "nanotron" in words:
        return FRAMEWORKS["nanotron" if row.get("primary", True) else "nanotron-2024"]
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


def job_of(row: Row, models: dict[str, Row]) -> Job:
    """The training job of a row. Raises: Refused or ConfigError naming what is missing or does not fit."""
    framework = framework_of(row)
    shape = _trained(shape_of(row, models), row, framework)
    gpus, batch, length = (count(row, name) for name in ("gpus", "gbs", "seq"))
    layout = row.get("layout") or {}
    if not isinstance(layout, dict) or "tp" not in layout:
        raise Refused("layout is not complete: tp is not given")
    _check_known(layout)
    if shape.num_experts and layout.get("ep") is None and count(layout, "fsdp", 0) < 2:
        # FSDP alone shards experts as it does all else
        raise Refused("layout is not complete: ep is not given for a model with experts")
    if row.get("async_tp"):
        framework = replace(framework, overlap_tp=True)
    strategy = _strategy(row, layout, shape, framework)
    _check_replicas(layout, strategy, gpus)
    strategy = strategy.check(gpus, num_experts=shape.num_experts, num_layers=shape.all_layers)
    job = Job(
        shape=shape, strategy=strategy, seq_len=length, global_batch=batch, framework=framework,
        skew=number(row, "skew", 1.0),
    )  # fmt: skip
    if recompute_of(row) or framework.flash_attention:
        return job
    return _least_recompute(job, cluster_of(row))


def _trained(shape: ModelShape, row: Row, framework: Framework) -> ModelShape:
    """The model with what a recipe trains beside it.

    Megatron-Bridge trains DeepSeek-V3 with a block that predicts a further token, and counts its FLOPs:
    https://github.com/NVIDIA-NeMo/Megatron-Bridge, recipes/deepseek/deepseek_v3.py (mtp_num_layers).
    """
    bridge = framework.name == "nemo" and "bridge" in f"{row.get('suite')} {row.get('source')}".lower()
    said = row.get("mtp") is not None
    return replace(shape, mtp_layers=1) if bridge and shape.name.startswith("deepseek-v3") and not said else shape


def _check_known(layout: Row) -> None:
    """Raises: Refused for a field of a layout that would be passed over."""
    unknown = [name for name, value in layout.items() if name not in _LAYOUT and value is not None]
    if unknown:
        raise Refused(f"layout.{unknown[0]}={layout[unknown[0]]!r} is not known; known: {', '.join(_LAYOUT)}")


def _check_replicas(layout: Row, strategy: Strategy, gpus: int) -> None:
    """Raises: Refused if a row's dp, with or without the context-parallel ranks in it, is not what its devices have."""
    said, dense = count(layout, "dp", 0), strategy.tp * strategy.pp
    if said and gpus not in (said * dense, said * dense * strategy.cp):
        raise Refused(
            f"layout.dp={said} times tp={strategy.tp} * cp={strategy.cp} * pp={strategy.pp} is not gpus={gpus}; "
            f"nearest that is: dp={max(1, gpus // (dense * strategy.cp))}"
        )


def _strategy(row: Row, layout: Row, shape: ModelShape, framework: Framework) -> Strategy:
    tp, pp, virtual = (count(layout, key, 1) for key in ("tp", "pp", "vp"))
    asked = schedule_of(row)
    if asked == "interleaved":
        virtual = max(2, virtual)
    if layout.get("vp") is None and pp >= 4 and framework.overlap_pp and not asked:
        # published Megatron-Core recipes interleave deep pipelines, most with one block a chunk
        virtual = max(1, shape.all_layers // pp)
    # recipes may count embedding and output matrix as blocks to cut
    virtual = 1 if pp == 1 else min(virtual, max(1, shape.all_layers // pp))
    sequence = framework.sequence_parallel or "sequence" in str(row.get("recompute") or "")
    sequence = tp > 1 and (sequence if layout.get("sp") is None else bool(layout["sp"]))
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
        schedule=_schedule(asked, pp, virtual), sequence_parallel=sequence, folded=bool(shape.num_experts),
        zero=zero, recompute=recompute_of(row) or "none", micro_batch=micro_batch, precision=precision_of(row),
        overlap=2 if "overlap on" in str(row.get("dispatcher")) else 1,
        scatter_gather=framework.scatter_gather and pp > 1,
        alltoall=_alltoall(row, shape, count(layout, "ep", 1) * etp) if shape.num_experts else "flat",
        grad_precision=framework.wire_precision,
    )  # fmt: skip


def _schedule(asked: Schedule | None, pp: int, virtual: int) -> Schedule:
    if pp > 1 and asked in ("zero_bubble", "dualpipe", "gpipe"):
        return asked
    return "interleaved" if virtual > 1 else "1f1b"


def _alltoall(row: Row, shape: ModelShape, ranks: int) -> str:
    """The all-to-all program: what the row says; else what routing limited to nodes is made for, or a flat one.

    `ranks` that share the experts of a layer; on one node there is nothing to merge.
    """
    said = dispatcher_of(row)
    if said == "deepep":
        return "node_dedup"
    spread = ranks > cluster_of(row).devices_per_node
    return "node_dedup" if not said and shape.expert_groups and spread else "flat"


def _least_recompute(job: Job, cluster: Cluster) -> Job:
    """The job with the least recomputation that fits the device: what a row without flash attention most likely ran."""
    for recompute in ("none", "selective", "full"):
        tried = replace(job, strategy=replace(job.strategy, recompute=recompute))
        if memory(tried).fits(cluster.device.memory_bytes):
            return tried
    return job
