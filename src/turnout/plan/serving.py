"""What is asked of the planner about inference: a model on devices, so many sequences at once, a prompt, an answer."""

from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from math import ceil

from turnout.errors import ConfigError
from turnout.plan.framework import FRAMEWORKS
from turnout.plan.inference_experts import Offload
from turnout.plan.job import Job
from turnout.plan.model import ModelShape
from turnout.plan.parameters import Parameters, fitted
from turnout.plan.query import Query
from turnout.plan.wire import Run
from turnout.strategy import ELEMENT_BYTES, Precision, Strategy
from turnout.topology import Cluster

# what training alone has, or this part of the planner does not know
TRAINING = {"pp": 1, "cp": 1, "virtual_stages": 1, "zero": 0, "recompute": "none", "expert_copies": 0}
FRAMEWORK = FRAMEWORKS["megatron-core"]  # whose fused attention and activation kernels are assumed


@dataclass(frozen=True, kw_only=True)
class Serving:
    """One deployment. Attention lives on tp ranks, copied dp times; experts on ep ranks, each cut over etp."""

    model: str | ModelShape  # name of a model, path of a config.json, or the dimensions
    cluster: str | Cluster = "dgx-h100"  # name of a machine, path of a .toml file, or the machine
    nodes: int = 0  # nodes the deployment runs on; 0: those of `devices`
    devices: int = 0  # devices it runs on; 0: all of `nodes`
    batch: int = 1  # sequences that are decoded at once, over all devices
    context: int = 2048  # tokens of a prompt
    new_tokens: int = 256  # tokens of an answer
    prefill_batch: int = 1  # prompts that one data-parallel rank prefills at once
    strategy: Strategy = field(default_factory=Strategy)
    kv_precision: Precision = "bf16"  # of cached keys and values
    skew: float = 1.0  # rows of the busiest expert rank over the mean
    redundant_experts: int = 0  # copies of busy experts that a layer has beside its experts
    one_sided: bool = False  # all sends of an exchange are under way at once (DeepEP's low-latency kernels)
    offload: Offload = field(default_factory=Offload)

    def __post_init__(self) -> None:
        least = {"batch": 1, "context": 1, "new_tokens": 1, "prefill_batch": 1, "redundant_experts": 0, "skew": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if not bound <= value < float("inf"):
                raise ConfigError(f"serving.{name}={value} must be at least {bound}; nearest legal: {bound}")
        if self.kv_precision not in ELEMENT_BYTES:
            raise ConfigError(f"serving.kv_precision={self.kv_precision!r} must be one of: {', '.join(ELEMENT_BYTES)}")
        for name, legal in TRAINING.items():
            if getattr(self.strategy, name) != legal:
                raise ConfigError(
                    f"strategy.{name}={getattr(self.strategy, name)} is not planned for inference; "
                    f"nearest legal: {legal}{' (redundant_experts is)' if name == 'expert_copies' else ''}"
                )

    @cached_property
    def shape(self) -> ModelShape:
        """The model without what only training has, copies of experts counted as experts.

        Raises: ConfigError if the model is unknown, has an encoder, or has no experts to copy.
        """
        return served_shape(self._query.shape, self.redundant_experts)

    @cached_property
    def machine(self) -> Cluster:
        """Raises: ConfigError if the cluster is unknown or its file does not fit."""
        return self._query.machine

    @cached_property
    def world(self) -> int:
        """Devices. Raises: ConfigError if nothing says how many, or two numbers do not agree."""
        return self._query.world

    @cached_property
    def layout(self) -> Strategy:
        """The strategy with dp filled in.

        Raises: ConfigError naming the field that does not fit and the nearest legal value.
        """
        shape = self.shape
        return self.strategy.check(
            self.world, num_experts=shape.num_experts, num_layers=shape.all_layers, num_heads=shape.num_heads
        )

    @property
    def rank_batch(self) -> int:
        """Sequences of the data-parallel rank that has most."""
        return ceil(self.batch / self.layout.dp)

    @cached_property
    def parameters(self) -> Parameters:
        """The planner's fitted efficiencies."""
        return fitted()

    def run(self, tokens: float) -> Run:
        """A forward pass of so many tokens a data-parallel rank, as terms of time are asked about it."""
        strategy = replace(self.layout, micro_batch=1, overlap=1)
        job = Job(
            shape=self.shape, strategy=strategy, seq_len=max(1, ceil(tokens)), global_batch=strategy.dp,
            framework=FRAMEWORK, skew=self.skew,
        )  # fmt: skip
        return Run(job=job, cluster=self.machine, parameters=self.parameters)

    def looked_up(self) -> "Serving":
        """The same with the model and the machine in place of their names."""
        return replace(self, model=self._query.shape, cluster=self.machine)

    @cached_property
    def _query(self) -> Query:
        return Query(
            model=self.model, cluster=self.cluster, nodes=self.nodes, devices=self.devices, seq_len=self.context,
            global_batch=self.batch,
        )  # fmt: skip


@lru_cache(maxsize=64)
def served_shape(shape: ModelShape, redundant_experts: int) -> ModelShape:
    """A model without what only training has, copies of experts counted as experts.

    Raises: ConfigError if it has an encoder, or no experts to copy.
    """
    if shape.encoder_layers:
        raise ConfigError(f"model.encoder_layers={shape.encoder_layers} is not planned for inference; nearest legal: 0")
    if redundant_experts and (not shape.num_experts or shape.experts_by_layer):
        raise ConfigError(
            f"serving.redundant_experts={redundant_experts} needs layers of equally many experts; nearest legal: 0"
        )
    return replace(shape, mtp_layers=0, num_experts=shape.num_experts + redundant_experts)
