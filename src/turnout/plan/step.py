"""What a training step asks of the network: the planner's query to `volume`."""

from collections import Counter
from dataclasses import dataclass

from turnout.errors import ConfigError
from turnout.plan.job import Job
from turnout.plan.model import ModelShape
from turnout.plan.pipeline import Stage
from turnout.strategy import Strategy


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a step asks of the network. `strategy` is resolved: its dp is known."""

    shape: ModelShape
    strategy: Strategy
    devices_per_node: int
    tokens: float  # of one pipeline's step on one context-parallel rank
    micro_batches: float  # it is cut into
    capacity_factor: float = 1.0  # padded buffers send this many times their mean; 1: only what is routed
    node_limit: int = 0  # nodes a token may reach; 0: all
    expert_loads: tuple[float, ...] = ()  # assignments each expert got, from a trace; empty: all the same
    reshards: bool = True  # under ZeRO-3 parameters are gathered again for every micro-batch
    zero_sums: bool = False  # under ZeRO-1 whole gradients are summed on every rank
    stage: Stage | None = None  # of which pipeline stage; none: the mean over stages

    def __post_init__(self) -> None:
        refuse_copies(self.strategy)


def refuse_copies(strategy: Strategy) -> None:
    """Raises: ConfigError where experts have copies: what those bring and cost hangs on loads that nobody told."""
    if strategy.expert_copies:
        raise ConfigError(
            f"strategy.expert_copies={strategy.expert_copies}: memory knows copies, seconds and bytes on the wire "
            "do not; nearest legal: 0, and what copies bring to a recorded run says `turnout plan placement`"
        )


def step_of(
    job: Job,
    devices_per_node: int,
    *,
    node_limit: int = 0,
    expert_loads: tuple[float, ...] = (),
    stage: Stage | None = None,
) -> Step:
    """The step of a job on nodes of that many devices."""
    return Step(
        shape=job.shape,
        strategy=job.strategy,
        devices_per_node=devices_per_node,
        tokens=job.rank_tokens * job.micro_batches,
        micro_batches=job.micro_batches,
        capacity_factor=job.padding,
        node_limit=node_limit,
        expert_loads=expert_loads,
        reshards=job.framework.reshards,
        zero_sums=job.framework.zero_sums,
        stage=stage,
    )


def layers_of(step: Step) -> dict[int, float]:
    """Experts of a layer (0: dense) -> how many such layers a rank has."""
    shape, stage = step.shape, step.stage
    held = range(shape.all_layers) if stage is None else stage.layers
    share = 1 / step.strategy.pp if stage is None else 1.0
    counts = {experts: number * share for experts, number in Counter(map(shape.experts_of, held)).items()}
    if shape.mtp_layers and (stage is None or stage.head):
        last = shape.experts_of(shape.all_layers - 1)
        counts[last] = counts.get(last, 0.0) + shape.mtp_layers * share
    return counts


def buffer_bytes(step: Step) -> float:
    """Bytes of the activations of one micro-batch between two layers."""
    return step.tokens / step.micro_batches * step.shape.dim * step.strategy.activation_bytes
