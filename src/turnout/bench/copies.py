"""Case copies: a layer with a skewed load on several ranks of this machine, with and without copies of its experts.

All placements live in the same processes and take turns, each as a layer of its own with the same weights; a pass is
over when it is over on the slowest rank. The load is that of the router `forced`, which falls from expert to expert as
Zipf's law has it: the same in every run. Rows and bytes are counted, not predicted.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from turnout.balance import Prices, Routed, balanced, copied
from turnout.bench.race import Timing, ratio
from turnout.bench.run import check_gate, ratio_keys, result, row
from turnout.comm import World
from turnout.comm.processes import as_rank, start_ranks
from turnout.errors import ConfigError
from turnout.layers import MoE
from turnout.parallel import Parallel, apply, check_replicas, moved, reduce_gradients
from turnout.placement import Placement
from turnout.routers import Forced
from turnout.strategy import Strategy
from turnout.topology import Link, Mesh

TIMEOUT_S = 600.0
IN_ORDER, SEARCHED = "in order", "searched"
MODES: tuple[Literal["forward", "train"], ...] = ("forward", "train")
# loads alone are to be even: what ranks send each other on one machine is not the question here
_FREE = Link(bytes_per_s=1e30)
_LOADS = Prices(row_s=1.0, row_bytes=0.0, expert_bytes=0.0, intra=_FREE, inter=_FREE)


@dataclass(frozen=True, kw_only=True)
class CopiesCase:
    """A layer and its load."""

    ranks: int = 2
    tokens: int = 2048  # of each rank
    dim: int = 256
    hidden: int = 512
    experts: int = 16
    k: int = 2  # experts of a token
    skew: float = 1.0  # exponent by which the load falls from expert to expert
    copies: tuple[int, ...] = (4,)  # of experts, over all ranks: one placement each

    def __post_init__(self) -> None:
        if not 2 <= self.ranks <= self.experts:
            raise ConfigError(
                f"--ranks {self.ranks} must be from 2 to --experts {self.experts}: each holds at least one"
            )
        for number in self.copies:
            Strategy(ep=self.ranks, expert_copies=number).check(self.ranks, num_experts=self.experts, uneven=True)

    def layer(self) -> MoE:
        """The whole layer, the same for everybody."""
        torch.manual_seed(0)
        router = Forced(k=self.k, skew=self.skew)
        return MoE(self.dim, self.hidden, self.experts, router=router, losses=())


def run(case: CopiesCase, *, rounds: int, warmup: int, threads: int = 0) -> dict[str, Any]:
    """Rows of every placement, forward alone and in training.

    Raises: TurnoutError, before anything is timed, if a backend does not compute what the oracle computes.
    """
    check_gate()
    threads = threads or max(1, torch.get_num_threads() // case.ranks)
    with TemporaryDirectory() as folder:
        start_ranks(_rank, case.ranks, case, folder, threads, rounds, warmup)
        found = [json.loads((Path(folder) / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(case.ranks)]
    rows = [each | {"threads": threads} for mode in MODES for each in _rows(mode, [of_rank[mode] for of_rank in found])]
    return result(rows, case=asdict(case), threads=threads)


def _rows(mode: str, of_ranks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    timings = {
        name: Timing(ms=tuple(max(each) for each in zip(*(found[name]["ms"] for found in of_ranks), strict=True)))
        for name in of_ranks[0]
    }
    rows = []
    for name, timing in timings.items():
        computed = [found[name]["rows"] for found in of_ranks]
        rows.append(
            {
                **row("copies", name, timing),
                "mode": mode,
                "max_load": max(computed) / (sum(computed) / len(computed)),
                "row_bytes": sum(found[name]["row_bytes"] for found in of_ranks),
                "copy_bytes": sum(found[name]["copy_bytes"] for found in of_ranks),
                "weight_bytes": max(found[name]["weight_bytes"] for found in of_ranks),
                **ratio_keys("ratio_to_in_order", ratio(timing, timings[IN_ORDER])),
            }
        )
    return rows


# --- on a rank ---


def _rank(rank: int, case: CopiesCase, folder: str, threads: int, rounds: int, warmup: int) -> None:
    torch.set_num_threads(threads)
    with as_rank(rank, case.ranks, folder, timeout_s=TIMEOUT_S) as world:
        x_TD = torch.randn(case.tokens, case.dim, generator=torch.Generator().manual_seed(rank))
        placed = _placed(case, x_TD, world)
        found: dict[str, dict[str, Any]] = {}
        for mode in MODES:
            passes = {name: each.forward if mode == "forward" else each.train for name, each in placed.items()}
            ms = _take_turns(passes, rounds=rounds, warmup=warmup)
            found[mode] = {name: {"ms": ms[name], **placed[name].counted(passes[name])} for name in placed}
        (Path(folder) / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")


def _placed(case: CopiesCase, x_TD: Tensor, world: World) -> dict[str, "_Placed"]:
    """The layer under every placement, by the load that one pass shows."""
    assigned_E = case.layer()(x_TD).stats.assigned_E.tolist()
    loads = Routed(rows_RE=torch.tensor(world.all(assigned_E)).double().numpy(), mesh=Mesh(nodes=1, local=case.ranks))
    places = {IN_ORDER: Placement.even(case.experts, case.ranks), SEARCHED: balanced(loads, _LOADS)}
    for number in case.copies:
        places[f"{number} copies"] = copied(list(loads.loads_E), loads.mesh, copies=number)
    return {name: _Placed(case, x_TD, world, where) for name, where in places.items()}


def _take_turns(passes: Mapping[str, Callable[[], None]], *, rounds: int, warmup: int) -> dict[str, list[float]]:
    """Milliseconds of every pass on this rank; all ranks begin together and draw the same order."""
    taken: dict[str, list[float]] = {name: [] for name in passes}
    for number in range(warmup + rounds):
        for name in Random(number).sample(sorted(passes), len(passes)):
            dist.barrier()
            started = perf_counter()
            passes[name]()
            if number >= warmup:
                taken[name].append(1e3 * (perf_counter() - started))
    return taken


class _Placed:
    """The layer under one placement."""

    def __init__(self, case: CopiesCase, x_TD: Tensor, world: World, where: Placement) -> None:
        self._layer, self._x_TD, self._computed = case.layer(), x_TD, 0
        parallel = apply(self._layer, Strategy(ep=case.ranks), world=world, timeout_s=TIMEOUT_S)
        self._parallel: Parallel = moved(self._layer, parallel, None, {"": where})
        check_replicas(self._layer, self._parallel)
        self._layer.experts.register_forward_pre_hook(self._note)

    def forward(self) -> None:
        with torch.no_grad():
            self._layer(self._x_TD)

    def train(self) -> None:
        """Forward, backward and the sum over ranks, without an update: every pass is the same."""
        self._layer(self._x_TD).y.square().mean().backward()
        reduce_gradients(self._layer, self._parallel)
        self._layer.zero_grad(set_to_none=True)

    def counted(self, pass_: Callable[[], None]) -> dict[str, int]:
        """Of one pass of this rank: rows that its experts compute, and bytes that it sends; and of its experts."""
        ledger, self._computed = self._parallel.ledger, 0
        ledger.clear()
        pass_()
        ways = ledger.sent("the layer", "forward"), ledger.sent("the layer", "backward")
        twins = ledger.sent("the layer", "backward", "twins")
        return {
            "rows": self._computed,
            "row_bytes": sum(size for way in ways for size, _ in way.values()),
            "copy_bytes": sum(size for size, _ in twins.values()),
            "weight_bytes": sum(weight.nbytes for weight in self._layer.experts.parameters()),
        }

    def _note(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._computed += int(inputs[1].sum())
