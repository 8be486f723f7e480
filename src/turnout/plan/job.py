"""One training job: a model, its layout, its batch, the code that runs it."""

from dataclasses import dataclass, field

from turnout.errors import ConfigError
from turnout.plan.framework import FRAMEWORKS, Framework
from turnout.plan.model import ModelShape
from turnout.strategy import Strategy


@dataclass(frozen=True, kw_only=True)
class Job:
    """What memory and time are asked about. `strategy` is resolved: its dp is known."""

    shape: ModelShape
    strategy: Strategy
    seq_len: int  # tokens of a sequence
    global_batch: int  # sequences of an optimizer step
    framework: Framework = field(default_factory=lambda: FRAMEWORKS["megatron-core"])
    skew: float = 1.0  # rows of the busiest expert rank over the mean
    capacity_factor: float = 0.0  # every expert's buffer is padded to this times its mean of rows; 0: dropless

    def __post_init__(self) -> None:
        if self.seq_len < 1 or self.global_batch < 1:
            raise ConfigError(f"seq_len={self.seq_len} and global_batch={self.global_batch} must be at least 1")
        if self.skew < 1:
            raise ConfigError(f"skew={self.skew} must be at least 1 (the busiest rank over the mean)")
        if not 0 <= self.capacity_factor < float("inf"):
            raise ConfigError(f"capacity_factor={self.capacity_factor} must be at least 0; nearest legal: 0 (dropless)")
        if self.capacity_factor and self.skew != 1:
            raise ConfigError(
                f"capacity_factor={self.capacity_factor} pads the buffers of all experts alike, so that "
                f"skew={self.skew} changes nothing but what is dropped; nearest legal: skew=1"
            )
        self.strategy.world()

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step through each pipeline; a part of one counts as one."""
        return max(1, -(-self.global_batch // (self.strategy.dp * self.strategy.micro_batch)))

    @property
    def rank_tokens(self) -> float:
        """Tokens of one micro-batch on one context-parallel rank."""
        return self.strategy.micro_batch * self.seq_len / self.strategy.cp

    @property
    def routed_tokens(self) -> float:
        """Tokens of one micro-batch that one rank dispatches to experts."""
        return self.rank_tokens / (self.strategy.tp if self.strategy.tokens_sharded else 1)

    @property
    def expert_rows(self) -> float:
        """Rows of one micro-batch that the busiest expert rank works on in a sparse layer, at a part of an expert.

        Ranks that share an expert gather each other's rows; rows of replicated tokens are on all of them already.
        Where weights are gathered and tokens stay, no rank is busier than another.
        """
        if self.strategy.expert_parts == 0:
            return self.routed_tokens * self.shape.top_k * self.padding
        gathered = self.strategy.expert_parts if self.strategy.tokens_sharded else 1
        return self.routed_tokens * self.shape.top_k * self.padding * self.busiest * gathered

    @property
    def padding(self) -> float:
        """Rows of an expert's buffer over those routed to it on average."""
        return self.capacity_factor or 1.0

    @property
    def busiest(self) -> float:
        """Rows of the busiest expert rank over the mean: no rank can have more than all."""
        return min(max(self.skew, self.crowding), float(self.strategy.ep))

    @property
    def crowding(self) -> float:
        """Experts of the rank that holds most of a layer over the mean: above 1 where ep does not divide them."""
        if not self.shape.num_experts:
            return 1.0
        return self.strategy.ep * self.held_experts / self.shape.num_experts

    @property
    def held_experts(self) -> int:
        """Experts of a layer of `num_experts` on the rank that holds most, each of them or a part of each."""
        return -(-self.shape.num_experts // self.strategy.ep)

    @property
    def world(self) -> int:
        return self.strategy.world()
