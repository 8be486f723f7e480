"""What one rank of `turnout bench alltoall` sends: a program with rows that say whose they are."""

import torch
import torch.distributed as dist
from torch import Tensor

from turnout.alltoall import PROGRAMS, combine, dispatch
from turnout.bench.alltoall_case import ExchangeCase
from turnout.bench.turns import Work
from turnout.comm import Arrived, ExpertGroup, Ledger, Sizes, TorchTransport, World
from turnout.comm.picks import Picks
from turnout.comm.wire import begun
from turnout.errors import TransportError
from turnout.placement import Placement


class Exchange:
    """One program on one rank, with rows that say whose they are."""

    def __init__(self, case: ExchangeCase, name: str, group: ExpertGroup, row_bytes: int) -> None:
        self._case, self._rank, self._group = case, group.rank, group
        self.name, self.ledger = name, Ledger()
        self._program = PROGRAMS[name]
        self._transport = TorchTransport(self._program, group, self.ledger, name)
        self._placement = Placement.even(case.num_experts, group.mesh.size)
        self._sizes, self._x_TD = _sizes(case, self._placement, group), _rows(case, self._rank, row_bytes)
        token_M = torch.tensor(_by_expert(case, self._rank), dtype=torch.int64)
        self._picks = Picks(index_M=token_M, num_rows=case.num_tokens, one_each=False)
        self._weight_M = torch.ones(len(token_M))

    def there(self) -> Arrived:
        """Rows at their experts, as a layer sends them once the counts are known."""
        parcels = self._transport.load(self._x_TD, self._sizes, picks=self._picks, weight_M=self._weight_M)
        return self._transport.arrive(dispatch(self._program, self._transport, parcels))

    def there_and_back(self) -> Tensor:
        """The sum of each token's copies. Shapes: returns (T, D)."""
        arrived = self.there()
        return combine(self._program, self._transport, self._transport.depart(arrived, arrived.x_MD)).landed().sums()

    def check(self) -> None:
        """Raises: TransportError if a row is missing, or is somebody else's."""
        want = []
        for expert in self._placement.slots_of(self._rank):
            for source in range(self._group.mesh.size):
                tokens = enumerate(self._case.choices(source))
                want += [_mark(source, token) for token, choices in tokens if expert in choices]
        got_M = self.there().x_MD[:, 0]
        if got_M.tolist() != want:
            raise TransportError(f"rank {self._rank}: {self.name} does not deliver the rows it was given")
        home_T = self.there_and_back()[:, 0]
        if not torch.equal(home_T, self._x_TD[:, 0] * self._case.k):
            raise TransportError(f"rank {self._rank}: {self.name} does not bring back the rows it delivered")

    def bare(self) -> Work:
        """The collectives alone: as many bytes between the same ranks, ready and unread."""
        calls = []
        for sent in self.there().parcels.trail:
            if sent.route is None:
                continue
            route, row_bytes = sent.route, self._x_TD.shape[1] * self._x_TD.element_size()
            out, in_ = (_bytes(route.rows[way], route.labels[way], row_bytes) for way in (0, 1))
            source, target = (torch.zeros(sum(each), dtype=torch.uint8) for each in (out, in_))
            calls.append((target, source, in_, out, route))

        def collectives() -> None:
            for target, source, in_, out, route in calls:
                if route.shared is not None:
                    route.shared.all_to_all(source, in_, out)
                    continue
                work = begun(target, source, in_, out, route)
                assert work is not None
                work.wait()

        return collectives


def _bytes(rows: tuple[int, ...], labels: tuple[int, ...], row_bytes: int) -> list[int]:
    """For each peer: rows, and of merged ones the labels, of which each is an int32 and a float32."""
    return [row_bytes * number + 8 * (labels[peer] if labels else 0) for peer, number in enumerate(rows)]


def _rows(case: ExchangeCase, rank: int, row_bytes: int) -> Tensor:
    """Shapes: returns (T, D), every row full of its mark."""
    mark_T = torch.tensor([_mark(rank, token) for token in range(case.num_tokens)])
    return mark_T.unsqueeze(1).repeat(1, row_bytes // mark_T.element_size())


def _mark(rank: int, token: int) -> float:
    # whole numbers that float32 has exactly, also k times as large
    return float((rank * 7919 + token) % 65521 + 1)


def _by_expert(case: ExchangeCase, rank: int) -> list[int]:
    """The tokens of a rank's rows in order of the experts they go to."""
    rows = [(expert, token) for token, choices in enumerate(case.choices(rank)) for expert in choices]
    return [token for _, token in sorted(rows)]


def _sizes(case: ExchangeCase, placement: Placement, group: ExpertGroup) -> Sizes:
    mesh, routing = group.mesh, case.routing
    experts = [[0] * case.num_experts for _ in range(mesh.size)]
    for source in range(mesh.size):
        for choices in case.choices(source):
            for expert in choices:
                experts[source][expert] += 1
    ranks, firsts = range(mesh.size), range(0, mesh.size, mesh.local)
    return Sizes(
        mesh=mesh,
        placement=placement,
        experts=experts,
        merged={
            "rank": [[routing.rows("rank", source, to) for to in ranks] for source in ranks],
            "node": [[routing.rows("node", source, first) for first in firsts] for source in ranks],
        },
        slices=[[sum(each[expert] for each in experts) for expert in placement.slots_of(group.rank)]],
    )


def gathering(case: ExchangeCase, world: World, row_bytes: int) -> Work:
    x_TD = _rows(case, world.rank, row_bytes)
    out = x_TD.new_empty(world.size * x_TD.shape[0], x_TD.shape[1])
    return lambda: dist.all_gather_into_tensor(out, x_TD)
