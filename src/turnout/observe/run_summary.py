"""A run in the few numbers that advice is given on."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from turnout.observe.balance import DEAD_LOAD
from turnout.observe.metrics import Metrics
from turnout.observe.routing import Routing
from turnout.observe.run_folder import RunRecord, column, number
from turnout.observe.spikes import Spike, find_spikes
from turnout.observe.thin import frame_load, smooth
from turnout.observe.trace import Trace

_LEAST_FAIR_COUNT = 20  # with fewer assignments per expert an empty expert can be chance


@dataclass(frozen=True, kw_only=True)
class LayerLoad:
    """One MoE layer over the last tenth of the run."""

    name: str
    load: tuple[float, ...]  # of each expert, over the fair share
    fair_count: float  # assignments an expert would get if all got the same
    dropped_share: float = 0.0  # for want of room

    @property
    def dead(self) -> tuple[int, ...]:
        """Experts below 0.1 % of the fair share, when there were enough tokens to tell."""
        if self.fair_count < _LEAST_FAIR_COUNT:
            return ()
        return tuple(expert for expert, load in enumerate(self.load) if load < DEAD_LOAD)

    @property
    def hottest(self) -> int:
        return max(range(len(self.load)), key=self.load.__getitem__)

    @property
    def max_load(self) -> float:
        return max(self.load)

    @property
    def entropy(self) -> float:
        """Entropy of the load over ln E; 1 is even."""
        if len(self.load) == 1:
            return 1.0
        shares = [load / len(self.load) for load in self.load if load > 0]
        return -sum(share * math.log(share) for share in shares) / math.log(len(self.load))

    @property
    def effective_experts(self) -> float:
        """The number of evenly used experts with the same entropy."""
        return len(self.load) ** self.entropy


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What `advise` reads. NaN: not measured."""

    last_step: int
    loss_first: float = math.nan  # both smoothed
    loss_last: float = math.nan
    spikes: tuple[Spike, ...] = ()
    nonfinite: tuple[int, ...] = ()  # steps without a finite loss
    evals: tuple[tuple[int, float], ...] = ()  # (step, validation loss)
    layers: tuple[LayerLoad, ...] = ()
    window: tuple[int, int] = (0, 0)  # steps that `layers` is counted over
    routing: Routing = Routing()
    declined_share: float = math.nan  # choices the router left out by design, of all, at the end
    router_entropy: float = math.nan  # mean over layers at the end; 1 is undecided
    tokens_per_s_early: float = math.nan  # medians of the first and the last quarter
    tokens_per_s_late: float = math.nan


def summarize(record: RunRecord) -> RunSummary:
    """The numbers of a run that advice is given on."""
    steps = column(record.metrics, "step")
    loss = column(record.metrics, "loss")
    smoothed = smooth(loss)
    speed = column(record.metrics, "tokens_per_s")
    quarter = max(1, len(steps) // 4)
    evals = [(line["step"], number(line.get("val_loss"))) for line in record.metrics.evals]
    layers, window = last_window(record.trace)
    return RunSummary(
        last_step=int(steps[-1]) if len(steps) else 0,
        loss_first=_median(loss[: max(1, len(loss) // 50)]),
        loss_last=float(smoothed[-1]) if len(steps) else math.nan,
        spikes=find_spikes(steps.tolist(), loss.tolist()),
        nonfinite=_nonfinite(record.metrics),
        evals=tuple((step, value) for step, value in evals if math.isfinite(value)),
        layers=layers,
        window=window,
        routing=record.routing,
        declined_share=_median(column(record.metrics, "declined_share")[-quarter:]),
        router_entropy=_median(column(record.metrics, "router_entropy")[-quarter:]),
        # the first steps warm up caches and compile
        tokens_per_s_early=_median(speed[min(5, len(speed) // 10) : quarter + 5]),
        tokens_per_s_late=_median(speed[-quarter:]),
    )


def last_window(trace: Trace) -> tuple[tuple[LayerLoad, ...], tuple[int, int]]:
    """Each layer over the last tenth of the trace, at least 20 records; layers without tokens are left out."""
    num_records = len(trace.steps)
    if num_records == 0:
        return (), (0, 0)
    begin = max(0, num_records - max(20, num_records // 10))
    load = np.split(frame_load(trace, begin, num_records), np.cumsum(trace.num_experts)[:-1])
    layers = []
    for name, layer_load, counts, dropped in zip(trace.layers, load, trace.counts, trace.dropped, strict=True):
        assigned = int(counts[begin:].sum(dtype=np.int64))
        if assigned:
            layers.append(
                LayerLoad(
                    name=name,
                    load=tuple(layer_load.tolist()),
                    fair_count=assigned / len(layer_load),
                    dropped_share=int(dropped[begin:].sum(dtype=np.int64)) / assigned,
                )
            )
    return tuple(layers), (int(trace.steps[begin]), int(trace.steps[-1]))


def _nonfinite(metrics: Metrics) -> tuple[int, ...]:
    return tuple(line["step"] for line in metrics.steps if not math.isfinite(number(line.get("loss"))))


def _median(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else math.nan
