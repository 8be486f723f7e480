"""Should there be experts here at all: the model beside dense ones of as many active, and as many total, parameters."""

from dataclasses import dataclass, replace
from typing import Any

from turnout.plan.memory import memory
from turnout.plan.model import ModelShape
from turnout.plan.query import Query
from turnout.plan.time import step_time


@dataclass(frozen=True, kw_only=True)
class Twin:
    """One model of the comparison on the same devices, batch and layout but for the experts' axes."""

    name: str
    total_params: int
    active_params: int
    step_s: float
    peak_bytes: float  # on the device that needs most
    fits: bool
    bytes_per_token: float  # memory of all devices at the peak over tokens of a step

    def to_json(self) -> dict[str, Any]:
        """As `plan time --json` prints it."""
        return dict(vars(self))


def twins(query: Query) -> tuple[Twin, ...]:
    """The model, then a dense one of its active parameters, then one of all its parameters; of a dense model nothing.

    Raises: ConfigError if the layout is not legal for the model.
    """
    shape = query.shape
    if not shape.num_experts:
        return ()
    rows = [_twin("with experts", query)]
    dense = replace(query.strategy, ep=1, etp=1, folded=False, alltoall="flat", overlap=1, dp=0)
    for name, hidden in (("dense, as many active", active_hidden(shape)), ("dense, as many in all", all_hidden(shape))):
        twin = replace(query, model=dense_twin(shape, hidden), strategy=dense, skew=1.0, capacity_factor=0.0)
        rows.append(_twin(name, twin))
    return tuple(rows)


def tokens_to_save(rows: tuple[Twin, ...]) -> float:
    """Share of its tokens a model with experts must save over its dense twin to be done as early; below 0: none."""
    return 1 - rows[1].step_s / rows[0].step_s


def dense_twin(shape: ModelShape, hidden: int) -> ModelShape:
    """The same blocks with an FFN of that hidden width in all of them."""
    return replace(
        shape, ffn_hidden=hidden, num_experts=0, top_k=0, expert_hidden=0, experts_by_layer=(), shared_hidden=0,
        shared_gates=0, latent_dim=0, expert_groups=0, top_groups=0, dense_first=0,
    )  # fmt: skip


def active_hidden(shape: ModelShape) -> int:
    """FFN width of the dense model with as many parameters as a token of this one meets, routers left out."""
    return _hidden(shape, [_ffn_params(shape, layer, shape.top_k) for layer in range(shape.all_layers)])


def all_hidden(shape: ModelShape) -> int:
    """FFN width of the dense model with all parameters of this one, routers left out."""
    return _hidden(shape, [_ffn_params(shape, layer, shape.experts_of(layer)) for layer in range(shape.all_layers)])


def _ffn_params(shape: ModelShape, layer: int, experts: int) -> int:
    if not shape.experts_of(layer):
        return shape.dense_ffn_params
    return shape.shared_params + experts * shape.expert_params


def _hidden(shape: ModelShape, params: list[int]) -> int:
    matrices = 3 if shape.gated else 2
    return max(1, round(sum(params) / len(params) / (matrices * shape.dim)))


def _twin(name: str, query: Query) -> Twin:
    job, cluster = query.job(), query.machine
    peak = memory(job)
    return Twin(
        name=name,
        total_params=job.shape.total_params,
        active_params=job.shape.active_params,
        step_s=step_time(job, cluster).step_s,
        peak_bytes=peak.allocated_bytes,
        fits=peak.fits(cluster.device.memory_bytes),
        bytes_per_token=peak.allocated_bytes * job.world / (query.global_batch * query.seq_len),
    )
