"""Rows that measure a part of a step: one MoE layer, one exchange of rows."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from turnout.alltoall import PROGRAMS, UniformRouting, round_trip, traffic_of
from turnout.errors import ConfigError
from turnout.plan.collectives import all_to_all, collective, group
from turnout.plan.compute import layer_time
from turnout.plan.engine import Engine
from turnout.plan.expert_volume import FP8_SCALE_BYTES, row_size
from turnout.plan.job import Job
from turnout.plan.model import ModelShape
from turnout.plan.parameters import Parameters
from turnout.plan.row_fields import Refused, Row, count
from turnout.plan.row_units import BYTES, BYTES_PER_S, SECONDS, unit_of
from turnout.plan.row_words import dispatcher_of
from turnout.plan.shapes import SHAPES
from turnout.plan.time import collective_s
from turnout.strategy import Precision, Strategy
from turnout.topology import Cluster


@dataclass(frozen=True, kw_only=True)
class MicroCase:
    """A row of this kind, ready to be answered with any parameters."""

    answer: Callable[[Parameters], float]


def micro_case(row: Row, cluster: Cluster, precision: Precision) -> MicroCase | None:
    """The case of a row, or none if the row is not of this kind."""
    quantity = str(row.get("quantity"))
    if quantity in ("forward_ms", "backward_ms"):
        per_s = unit_of(row, SECONDS, "ms").per_ours
        return MicroCase(answer=lambda parameters: per_s * _layer_s(row, cluster, parameters, precision))
    if quantity.endswith("_logical_bw"):
        per_rate = unit_of(row, BYTES_PER_S, "GB/s").per_ours
        return MicroCase(answer=lambda _: per_rate * _logical_bytes_per_s(row, cluster))
    if quantity.startswith(("low_latency_", "dispatch_time", "combine_time")):
        per_s = unit_of(row, SECONDS, "us").per_ours
        return MicroCase(answer=lambda _: per_s * _rows_s(row, cluster))
    if quantity.startswith("a2a_"):
        unit = unit_of(row, BYTES_PER_S if quantity.endswith(("bw", "bw_per_gpu")) else SECONDS, "").per_ours
        return MicroCase(answer=lambda _: unit * _exchange(row, cluster))
    return None


def _layer_s(row: Row, cluster: Cluster, parameters: Parameters, precision: Precision) -> float:
    """Seconds of the forward or backward pass of one MoE layer without attention and norms.

    Megatron-LM's moe_perf builds its layers with the library's defaults: an expert has two matrices, and the shared
    expert that its list of cases names is not built (tests/functional_tests/test_cases/common/moe_perf).
    """
    dims, layout = _dims(row), row.get("layout") or {}
    ep, etp = int(layout.get("ep") or 1), int(layout.get("etp") or 1)
    plain = "moe_perf" in str(row.get("source"))
    shape = ModelShape(
        num_layers=1, dim=int(dims["hidden"]), vocab_size=1, num_heads=1, num_kv_heads=1, head_dim=1,
        num_experts=int(dims["experts"]), top_k=int(dims["top_k"]), expert_hidden=int(dims["expert_ffn"]),
        shared_hidden=0 if plain else int(dims.get("shared_ffn") or 0), gated=not plain,
    )  # fmt: skip
    strategy = Strategy(
        dp=int(row["gpus"]), ep=ep, etp=etp, folded=True, micro_batch=int(row.get("mbs") or 1), precision=precision,
        alltoall="rank_dedup" if dispatcher_of(row) == "deepep" else "flat",
    )  # fmt: skip
    job = Job(shape=shape, strategy=strategy, seq_len=int(row["seq"]), global_batch=int(row["gpus"]))
    engine = Engine(device=cluster.device, parameters=parameters)
    forward_s, backward_s = layer_time(job, 0, engine)
    mesh = group(ep, etp, cluster.devices_per_node)
    routing = UniformRouting(
        mesh=mesh, num_tokens=job.routed_tokens, top_k=shape.top_k, num_experts=shape.num_experts
    )  # fmt: skip
    moves = round_trip(PROGRAMS[strategy.alltoall], mesh)
    exchange = collective("ep", "ep", mesh, traffic_of(moves, routing, row_size(strategy, shape.dim)))
    wire = collective_s(exchange, cluster)
    return wire + (forward_s if row["quantity"] == "forward_ms" else backward_s)


def _dims(row: Row) -> Row:
    dims = row.get("dims") or {}
    missing = [name for name in ("hidden", "experts", "top_k", "expert_ffn") if not isinstance(dims.get(name), int)]
    missing += [name for name in ("gpus", "seq") if not isinstance(row.get(name), int)]
    if missing:
        raise ConfigError(f"a row of one MoE layer must give {', '.join(missing)}")
    return dims


def _logical_bytes_per_s(row: Row, cluster: Cluster) -> float:
    """DeepEP's bandwidth: bytes of all rows, those that stay on their own rank or node included, over the time.

    Source: https://github.com/deepseek-ai/DeepEP README; a token reaches at most 4 nodes there.
    """
    ranks = row.get("gpus")
    if not isinstance(ranks, int) or ranks < 2:
        raise ConfigError(f"gpus={ranks!r} must be at least 2 for an exchange of rows")
    mesh = group(ranks, 1, cluster.devices_per_node)
    if mesh.nodes == 1:
        return cluster.alltoall_intra(ranks).bytes_per_s * ranks / (ranks - 1)
    return cluster.inter.bytes_per_s * mesh.nodes / (mesh.nodes - 1)


def _rows_s(row: Row, cluster: Cluster) -> float:
    """Seconds to send every routed row of `seq` tokens a rank, or to return them; each row apart, none merged.

    DeepEP's low-latency kernels dispatch in fp8 with a scale for 128 elements and return bf16.
    """
    ranks, tokens, name = row.get("gpus"), row.get("seq"), str(row.get("model"))
    if not isinstance(ranks, int) or not isinstance(tokens, int) or name not in SHAPES:
        raise ConfigError(f"an exchange of rows needs gpus={ranks!r}, seq={tokens!r} (tokens a rank) and a named model")
    shape = SHAPES[name]
    narrow = row["quantity"] == "low_latency_dispatch" or "fp8" in row["quantity"]
    mesh = group(ranks, 1, cluster.devices_per_node)
    size = tokens * shape.top_k * shape.dim * (1 + FP8_SCALE_BYTES if narrow else 2.0)
    # all sends are under way at once
    traffic = replace(all_to_all(mesh, size), intra_messages=1, inter_messages=1)
    return collective_s(collective("ep", "ep", mesh, traffic), cluster)


def _exchange(row: Row, cluster: Cluster) -> float:
    """Seconds of an all-to-all of the size in the quantity's name, or its bus bandwidth in bytes a second."""
    quantity = str(row["quantity"])
    if "internode" in quantity:
        # what one device's card carries, whatever stays in the node
        return cluster.inter.bytes_per_s
    said = re.search(r"_(\d+)(GiB|GB|MiB|MB)_", quantity)
    if said is None:
        raise Refused(f"quantity {quantity!r} does not say of how many bytes; such as a2a_8MiB_time, a2a_500MB_busbw")
    size = int(said[1]) / BYTES[said[2]]
    ranks = count(row, "gpus", 2 * cluster.devices_per_node)
    mesh = group(ranks, 1, cluster.devices_per_node)
    seconds = collective_s(collective("ep", "ep", mesh, all_to_all(mesh, size)), cluster)
    return seconds if quantity.endswith("_time") else size * (ranks - 1) / ranks / seconds
