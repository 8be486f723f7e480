"""Every legal layout of a job: which values each field may take, and which of their combinations are legal.

Layouts that a job cannot tell apart are listed once: programs of an all-to-all that does not cross nodes, ZeRO without
copies, folded axes that lie as unfolded ones do.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import product
from math import gcd
from typing import Any

from turnout.alltoall import PROGRAMS
from turnout.errors import ConfigError
from turnout.plan.collectives import group
from turnout.plan.framework import Framework
from turnout.plan.job import Job
from turnout.plan.pipeline import cuts_as_needed
from turnout.strategy import Strategy

# a shorter piece of a sequence has too few scores to hide a ring behind
LEAST_PIECE_TOKENS = 4096
MOST_SEQUENCES = 16  # of a micro-batch
# fields of a layout that are searched; the others are the query's
SEARCHED = (
    "tp", "sequence_parallel", "cp", "pp", "virtual_stages", "schedule", "ep", "etp", "folded", "zero", "recompute",
    "micro_batch", "alltoall", "overlap", "dispatch_precision",
)  # fmt: skip
Fields = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Space:
    """Values tried for each field of a layout; an empty tuple: all that suit the job."""

    tp: tuple[int, ...] = ()  # divisors of the heads, up to a node
    sequence_parallel: tuple[bool, ...] = (False, True)
    cp: tuple[int, ...] = ()  # powers of two, pieces of a sequence not below LEAST_PIECE_TOKENS
    pp: tuple[int, ...] = ()  # divisors of the devices, up to the blocks
    schedule: tuple[str, ...] = ()  # those of the framework
    virtual_stages: tuple[int, ...] = ()  # of interleaved schedules: powers of two, and one block a chunk
    ep: tuple[int, ...] = ()  # divisors of the experts
    etp: tuple[int, ...] = ()  # powers of two up to a node, and tp
    folded: tuple[bool, ...] = (False, True)
    zero: tuple[int, ...] = (0, 1, 2, 3)
    recompute: tuple[str, ...] = ("none", "light", "selective", "full")
    micro_batch: tuple[int, ...] = ()  # powers of two up to MOST_SEQUENCES
    alltoall: tuple[str, ...] = ()  # programs that differ on the experts' ranks
    overlap: tuple[int, ...] = (1, 2)
    dispatch_precision: tuple[str, ...] = ()  # the query's alone

    def __post_init__(self) -> None:
        for field in fields(self):
            for value in getattr(self, field.name):
                # one field at a time, so that the error is about its own value
                if isinstance(value, int) and not isinstance(value, bool) and value < (field.name != "zero"):
                    raise ConfigError(f"space.{field.name}={value} must be at least {int(field.name != 'zero')}")
        for name in self.alltoall:
            PROGRAMS[name]


@dataclass(frozen=True, kw_only=True)
class Legal:
    """Legal values of the fields of a layout, given those before it; `job` says all that is not searched."""

    job: Job
    devices_per_node: int
    space: Space

    # --- the pipeline ---

    def pipelines(self) -> Iterator[Fields]:
        """Stages, chunks, schedule."""
        blocks, world = self.job.shape.all_layers, self.job.world
        for pp in self.space.pp or divisors(world):
            if world % pp or pp > blocks:
                continue
            for schedule in self.space.schedule or self.job.framework.schedules:
                # without a pipeline all schedules are one
                if (pp == 1 and schedule != "1f1b") or (schedule == "dualpipe" and pp % 2):
                    continue
                for chunks in self._chunks(blocks // pp) if schedule == "interleaved" else (1,):
                    yield {"pp": pp, "virtual_stages": chunks, "schedule": schedule}

    def _chunks(self, most: int) -> tuple[int, ...]:
        every = self.space.virtual_stages or (*powers(most), most)
        return tuple(sorted({chunks for chunks in every if 2 <= chunks <= most}))

    # --- attention and dense layers ---

    def grids(self, pp: int) -> Iterator[Fields]:
        """Tensor and context parallel ranks."""
        job, ranks = self.job, self.job.world // pp
        tensor = self.space.tp or tuple(tp for tp in divisors(job.shape.num_heads) if tp <= self.devices_per_node)
        context = self.space.cp or powers(max(1, job.seq_len // LEAST_PIECE_TOKENS))
        for tp, cp, sequence in product(tensor, context, self.space.sequence_parallel):
            if ranks % (tp * cp) or job.shape.num_heads % tp or job.seq_len % cp or (sequence and tp == 1):
                continue
            if job.strategy.cp_kind == "ring" or job.shape.num_heads // tp % cp == 0:
                yield {"tp": tp, "cp": cp, "sequence_parallel": sequence}

    def micro_batches(self, dp: int, pipeline: Fields) -> Iterator[Fields]:
        """Sequences of a micro-batch that cut the batch as the schedule needs it."""
        each, rest = divmod(self.job.global_batch, dp)
        if rest:
            return
        for size in self.space.micro_batch or powers(MOST_SEQUENCES):
            if each % size == 0 and cuts_as_needed(each // size, pipeline["schedule"], pipeline["pp"]):
                yield {"micro_batch": size}

    def shardings(self, dp: int, grid: Fields) -> Iterator[Fields]:
        """ZeRO stages; one if nothing has copies."""
        shard, dense = self.job.strategy.zero_size, dp * grid["cp"]
        # whole experts have copies on tensor-parallel ranks too
        copies = dense * (grid["tp"] if self.job.shape.num_experts else 1)
        for zero in self.space.zero if copies > 1 else self.space.zero[:1]:
            if not shard or dense % shard == 0:
                yield {"zero": zero}

    def recomputations(self) -> Iterator[Fields]:
        """What backward may compute again; "selective" and "light" only where the framework can."""
        framework = self.job.framework
        for kind in self.space.recompute:
            asked = len(self.space.recompute) == 1
            has = {"selective": selects(framework), "light": framework.light_recompute}
            if asked or has.get(kind, True):
                yield {"recompute": kind}

    # --- experts ---

    def experts(self, pp: int, grid: Fields) -> Iterator[Fields]:
        """Expert axes, folded or not."""
        if not self.job.shape.num_experts:
            if 1 in (self.space.ep or (1,)) and 1 in (self.space.etp or (1,)):
                yield {"ep": 1, "etp": 1, "folded": False}
            return
        tp, ranks = grid["tp"], self.job.world // pp
        shard = self.job.strategy.zero_size or 1
        for folded, etp in product(self.space.folded, self._expert_tensor_ranks(tp)):
            if not (folded and self._shards_tokens(grid | {"etp": etp})) and etp not in (1, tp):
                continue
            # with etp = tp folded axes lie as unfolded ones do
            if folded and etp == tp and False in self.space.folded:
                continue
            room = ranks // etp if folded else ranks // tp
            for ep in self.space.ep or divisors(self._experts):
                if self._divides(ep) and room % ep == 0 and ranks % (ep * etp * shard) == 0:
                    yield {"ep": ep, "etp": etp, "folded": folded}

    def _divides(self, ep: int) -> bool:
        """Whether experts lie evenly on `ep` ranks, or may lie unevenly because just that is asked for."""
        may = ep in self.space.ep and self.job.shape.may_lie_unevenly and ep <= self._experts
        return may or self._experts % ep == 0

    @cached_property
    def _experts(self) -> int:
        """Experts that every sparse layer has a multiple of."""
        shape = self.job.shape
        return gcd(shape.num_experts, *(shape.experts_of(layer) for layer in shape.sparse_layers))

    def _expert_tensor_ranks(self, tp: int) -> tuple[int, ...]:
        every = self.space.etp or (*powers(self.devices_per_node), tp)
        return tuple(sorted({etp for etp in every if self.job.shape.expert_hidden % etp == 0}))

    def exchanges(self, layout: Fields) -> Iterator[Fields]:
        """All-to-all programs, chunks that overlap, precision of rows: what changes the exchange and nothing else."""
        sharded, sends = self._shards_tokens(layout), layout["ep"] > 1
        gathers = layout["etp"] > 1 and sharded
        overlaps = self.space.overlap if sends or gathers else self.space.overlap[:1]
        precisions = self.space.dispatch_precision or (self.job.strategy.dispatch_precision,)
        programs = self._programs(layout, sharded)
        for program, overlap, precision in product(programs, overlaps, precisions if sends else precisions[:1]):
            yield {"alltoall": program, "overlap": overlap, "dispatch_precision": precision}

    def _shards_tokens(self, layout: Fields) -> bool:
        """Whether each of the ranks that hold a slice dispatches tokens of its own."""
        own = {name: layout[name] for name in ("tp", "sequence_parallel", "etp")}
        return replace(self.job.strategy, **own).tokens_sharded

    def _programs(self, layout: Fields, sharded: bool) -> tuple[str, ...]:
        coordinates = layout["etp"] == layout["tp"] and not sharded
        asked = tuple(name for name in self.space.alltoall if name != "coordinated" or coordinates)
        if layout["ep"] == 1:
            return asked[:1] if self.space.alltoall else ("flat",)
        if self.space.alltoall:
            return asked
        mesh = group(layout["ep"], layout["etp"] if layout["folded"] else layout["tp"], self.devices_per_node)
        across, merges = mesh.nodes > 1 and mesh.local > 1, self.job.shape.top_k > 1
        # padded rows are sent one by one
        merges = merges and not self.job.capacity_factor
        useful = {
            "flat": True,
            "hierarchical": across,
            "node_dedup": across and merges,
            "rank_dedup": merges and self._experts > layout["ep"],
            "coordinated": coordinates and layout["tp"] > 1,
        }
        others = (name for name in PROGRAMS.names() if name not in useful)
        return (*(name for name, helps in useful.items() if helps), *others)

    def refusal(self) -> ConfigError:
        """Why there is no legal layout: what is wrong with the first one of the space."""
        job, space = self.job, self.space
        tried = {field.name: getattr(space, field.name)[0] for field in fields(space) if getattr(space, field.name)}
        try:
            replace(job.strategy, dp=0, **tried).check(
                job.world, num_experts=job.shape.num_experts, num_layers=job.shape.all_layers,
                num_heads=job.shape.num_heads, seq_len=job.seq_len, global_batch=job.global_batch,
            )  # fmt: skip
        except ConfigError as error:
            return error
        return ConfigError(
            f"no layout of {job.world} devices cuts global_batch={job.global_batch} as its schedule needs it; "
            f"nearest legal: {max(1, round(job.global_batch / job.world)) * job.world}"
        )


def selects(framework: Framework) -> bool:
    """Whether selective recomputation has something to select: scores that are kept, or products."""
    return framework.selective == "products" or not framework.flash_attention


def as_listed(strategy: Strategy, framework: Framework) -> Strategy:
    """The same layout as a search lists it, where a field that says otherwise changes nothing."""
    changes: Fields = {}
    if strategy.etp == strategy.tp:
        changes["folded"] = False
    if strategy.recompute == "selective" and not selects(framework):
        changes["recompute"] = "none"
    if strategy.ep == 1:
        changes["alltoall"] = "flat"
    return replace(strategy, **changes)


def divisors(total: int) -> tuple[int, ...]:
    """All divisors, in order."""
    small = [d for d in range(1, int(total**0.5) + 1) if total % d == 0]
    return tuple(sorted({*small, *(total // d for d in small)}))


def powers(most: int) -> tuple[int, ...]:
    """Powers of two up to `most`."""
    return tuple(2**i for i in range(most.bit_length()))
