"""How a model lies on the ranks of a job, once a strategy is applied to it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from turnout.comm import Groups, Ledger, World
from turnout.comm.ledger import Kind
from turnout.parallel.fully_sharded import reshard, sum_at_end
from turnout.parallel.reach import dispatcher_of, moe_layers, prefix_of, sending_own
from turnout.parallel.shards import Shards
from turnout.parallel.stage_gather import joined_stages
from turnout.parallel.stages import Stages
from turnout.parallel.supported import check_shards, check_supported
from turnout.parallel.tokens import cutting
from turnout.strategy import Strategy

SENT = ("intra_bytes", "inter_bytes", "intra_messages", "inter_messages")  # of a step, as a run records it


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How a model lies on the ranks of a job, and what their collectives need."""

    strategy: Strategy  # dp is filled in
    groups: Groups
    shards: Shards  # which tensors are slices, by name
    ledger: Ledger  # what expert layers sent
    stages: Stages | None = None  # None: this rank has all blocks

    @property
    def world(self) -> World:
        return self.groups.world

    @property
    def alike(self) -> int:
        """On how many ranks a dense weight is, in parts or whole: all, or those of one stage."""
        return self.world.size // self.strategy.pp

    @property
    def text_place(self) -> tuple[int, int]:
        """Which text is this rank's, and of how many: tensor-parallel ranks, and stages, are all given the same."""
        return self.world.rank % self.alike // self.strategy.tp, self.alike // self.strategy.tp

    def own_tokens(self, value_BS: Tensor) -> Tensor:
        """Of a number for each token of a batch those that this rank's experts layers report on."""
        tensor = self.groups.tensor
        if tensor is None or not self.strategy.sequence_parallel:
            return value_BS
        return cutting(value_BS.shape, tensor.size).share(value_BS, tensor.place)

    def own_targets(self, targets_BS: Tensor) -> Tensor:
        """Those whose loss `Decoder.loss` takes on this rank."""
        tensor = self.groups.tensor
        return targets_BS if tensor is None else cutting(targets_BS.shape, tensor.size).share(targets_BS, tensor.place)

    @property
    def repeats(self) -> int:
        """On how many ranks the experts' layers report the same tokens."""
        return 1 if self.strategy.sequence_parallel else self.strategy.tp

    @property
    def random_stream(self) -> tuple[int, int]:
        """Which random numbers are this rank's, and of how many: those that route the same tokens route them alike."""
        return self.world.rank // self.repeats, self.world.size // self.repeats

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """On the job's first rank all tensors of the model whole, on the CPU where they were gathered.

        Every rank calls it, with what it has of them.
        """
        gathered = self.shards.whole(tensors)
        staged = self.groups.stages
        # the ranks where tensors of a stage are put together are those of the first rank's pipeline
        return gathered if staged is None or self.world.rank != self.shards.first else joined_stages(gathered, staged)

    def copies(self, model: nn.Module) -> dict[Tensor, int | tuple[int, ...]]:
        """The parameters that not every rank has whole, and on how many ranks there is the same part; of experts that
        have copies within a group, each expert's number.
        """
        named, tied = list(model.named_parameters()), self.shards.tied
        parts: dict[Tensor, int] = {weight: self.shards.parts(name) for name, weight in named}
        found: dict[Tensor, int | tuple[int, ...]] = {
            weight: self.alike // number for weight, number in parts.items() if number > 1 or self.stages is not None
        }
        for name, weight in named:
            if holders := self.shards.holders(name):
                found[weight] = tuple(self.alike // parts[weight] * number for number in holders)
        return found | {weight: 2 * self.alike for name, weight in named if name in tied}

    def reshard(self, model: nn.Module) -> None:
        """After a forward pass without a backward one: the parameters are again what this rank keeps of them."""
        if self.shards.shardings:
            reshard(model)

    def before_backward(self, model: nn.Module, *, is_last: bool) -> None:
        """Before each micro-batch of a step: which sums over ranks wait for the last."""
        if self.shards.shardings:
            sum_at_end(model, is_last=is_last, whole=self.strategy.zero_sum == "step")

    def switched(
        self, model: nn.Module, *, alltoall: str = "", overlap: int = 0, adaptive_r: int | None = None
    ) -> "Parallel":
        """The same layout with another program, number of chunks or r from the next pass on; left out: as it is.

        Every rank calls it between steps with the same values. No parameter moves, and nothing is sent.
        Raises: ConfigError naming the value that is not legal.
        """
        was = self.strategy
        changed = replace(
            was,
            alltoall=alltoall or was.alltoall,
            overlap=overlap or was.overlap,
            adaptive_r=was.adaptive_r if adaptive_r is None else adaptive_r,
        )
        check_supported(changed)
        of_experts = self.shards.of_experts()
        check_shards(changed, has_experts=bool(of_experts))
        group = self.groups.experts
        if group is None:
            return replace(self, strategy=changed)
        for name, layer in moe_layers(model):
            prefix = prefix_of(name)
            cuts = {each.removeprefix(prefix): cut for each, cut in of_experts.items() if each.startswith(prefix)}
            dispatcher = dispatcher_of(name, changed, group, cuts, self.ledger)
            layer.reach(sending_own(name, dispatcher, changed, self.groups.tensor, self.ledger))
        return replace(self, strategy=changed)

    def take_sent(self) -> dict[str, float] | None:
        """Bytes and messages that expert layers sent since the last call, by class of link; None if they never do."""
        experts = self.groups.experts
        if experts is None:
            return None
        sent = self.ledger.traffic(experts.rank, experts.mesh)
        kinds: tuple[Kind, ...] = ("slices", "weights", "twins")
        for kind in kinds:
            sent += self.ledger.traffic(experts.place, experts.whole_mesh, kind=kind)
        self.ledger.clear()
        return {name: getattr(sent, name) for name in SENT}

    def over_ranks(self, value: float) -> float:
        """A number added up over all ranks."""
        return self.world.total([value])[0]
