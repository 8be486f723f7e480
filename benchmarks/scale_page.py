"""Write docs/scale.md: what each all-to-all program sends at 8 to 10,240 ranks. Usage: python -m benchmarks.scale_page

No row moves: the programs run on the counting transport, and the processes' own transport runs in process groups of
torch that send nothing, as one rank of 10,240.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from turnout.alltoall import PROGRAMS, RowSize, Traffic, UniformRouting, combine, dispatch, round_trip, traffic_of
from turnout.clusters.user import load_cluster
from turnout.comm import Ledger, TorchTransport, World, make_groups
from turnout.comm.sizes import equal_sizes
from turnout.placement import Placement
from turnout.plan.collectives import collective
from turnout.plan.wire import collective_s
from turnout.strategy import Strategy
from turnout.topology import Mesh, mesh_of

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
CLUSTER, NODE = "dgx-h100", 8
TOKENS, TENSOR = 4096, 8
LABEL_BYTES, ROW_ELEMENT_BYTES = 8, 2
FAKE_WORLD, FAKE_RANKS, FAKE_EP = 10_240, (0, 77, 10_239), 64
MIB = 2**20
INTRO = """# What a layer sends, from 8 to {most:,} ranks

Written by `python -m benchmarks.scale_page`, which takes seconds on one core. One layer, one forward pass there and
back, {tokens:,} tokens a rank in bfloat16, every expert as likely as any other, nodes of {node}: what one rank sends,
on average, to the ranks of its node and beyond. Rows that stay on their rank are not in it; messages are
point-to-point, empty ones too. Milliseconds are the planner's on `{cluster}`, with nothing hidden.
"""
FAKE = """## The processes' own transport at {world:,} ranks

Ranks {ranks} of {world:,} in process groups of torch that send nothing (`fake`), expert groups of {ep}, padded
blocks: what the transport handed to its collectives, by its ledger, is what the planner counts, to the byte.
"""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer, and the sizes of the expert groups it is looked at with."""

    title: str
    note: str
    dim: int
    top_k: int
    experts: int = 0  # 0: one for each rank
    groups: int = 0  # of experts, of which a token may reach half; 0: no limit
    sizes: tuple[int, ...] = ()


LAYERS = (
    Layer(
        title="DeepSeek-V3",
        note="256 experts of which a token takes 8, width 7168, on at most half of the nodes where there are 8 or more."
        "\nA job of more ranks has more such groups side by side: what a rank sends is what its group makes it send.",
        dim=7168,
        top_k=8,
        experts=256,
        groups=8,
        sizes=(8, 16, 32, 64, 128, 256),
    ),
    Layer(
        title="Mixtral 8x7B",
        note="8 experts of which a token takes 2, width 4096: one group a node is the largest there is.",
        dim=4096,
        top_k=2,
        experts=8,
        sizes=(8,),
    ),
    Layer(
        title="One expert a rank",
        note="As many experts as ranks, 2 for a token, width 4096: one exchange over the whole job: messages decide.",
        dim=4096,
        top_k=2,
        sizes=(8, 64, 512, 4096, 10_240),
    ),
)


def main() -> None:
    started = time.perf_counter()
    parts = [part for layer in LAYERS for part in _section(layer)]
    parts += _fake_section()
    intro = INTRO.format(most=FAKE_WORLD, tokens=TOKENS, node=NODE, cluster=CLUSTER)
    PAGE.write_text("\n".join([intro, *parts]), encoding="utf-8")
    print(f"wrote {PAGE.name} in {time.perf_counter() - started:.0f} s")


def _section(layer: Layer) -> list[str]:
    columns = (
        "ranks of the group",
        "nodes",
        "program",
        "MiB inside",
        "MiB between",
        "messages inside",
        "between",
        "ms",
    )
    rows = [row for ranks in layer.sizes for row in _rows(layer, ranks)]
    return [f"## {layer.title}\n\n{layer.note}\n", *_table(columns, rows)]


def _rows(layer: Layer, ranks: int) -> Iterator[Sequence[str]]:
    mesh = mesh_of(ranks, NODE)
    for name in PROGRAMS.names():
        if name == "coordinated":
            continue
        yield _row(str(ranks), mesh, name, traffic(layer, mesh, name))
    # a place is a node of tensor-parallel ranks that hold the same tokens, those of all of them
    if ranks // TENSOR > 1 and (layer.experts or ranks) % (ranks // TENSOR) == 0:
        places = Mesh(nodes=ranks // TENSOR)
        for name in ("flat", "coordinated"):
            yield _row(f"{ranks} / {TENSOR}", places, f"{name}, tp {TENSOR}", traffic(layer, places, name, TENSOR))


def traffic(layer: Layer, mesh: Mesh, program: str, tensor: int = 1) -> Traffic:
    """What a rank sends there and back."""
    # fewer nodes than groups have several groups each, and then all of them may be reached
    limit = mesh.nodes // 2 if layer.groups and mesh.nodes >= layer.groups else 0
    routing = UniformRouting(
        mesh=mesh,
        num_tokens=TOKENS * tensor,
        top_k=layer.top_k,
        num_experts=layer.experts or mesh.size * tensor,
        node_limit=limit,
    )
    row_bytes = ROW_ELEMENT_BYTES * layer.dim
    size = RowSize(row_bytes=row_bytes, back_bytes=row_bytes, label_bytes=LABEL_BYTES)
    # without coordination every tensor-parallel rank sends all tokens of its place
    moves = round_trip(PROGRAMS[program], mesh, tensor if program == "coordinated" else 1)
    return traffic_of(moves, routing, size, tensor=tensor if program == "coordinated" else 1)


def _row(ranks: str, mesh: Mesh, program: str, sent: Traffic) -> Sequence[str]:
    seconds = collective_s(collective("ep all-to-all", "ep", mesh, sent), load_cluster(CLUSTER))
    sizes = (f"{sent.intra_bytes / MIB:,.1f}", f"{sent.inter_bytes / MIB:,.1f}")
    messages = (f"{sent.intra_messages:,.0f}", f"{sent.inter_messages:,.0f}")
    return (ranks, f"{mesh.nodes:,}", program, *sizes, *messages, f"{1e3 * seconds:.2f}")


def _fake_section() -> list[str]:
    rows = [row for rank in FAKE_RANKS for row in _fake_rows(rank)]
    ranks = ", ".join(f"{rank:,}" for rank in FAKE_RANKS)
    intro = FAKE.format(world=FAKE_WORLD, ranks=ranks, ep=FAKE_EP)
    columns = ("rank", "program", "bytes inside", "bytes between", "messages inside", "between")
    return [intro, *_table(columns, rows)]


def _fake_rows(rank: int) -> Iterator[Sequence[str]]:
    """Raises: AssertionError if the ledger and the planner differ."""
    dist.init_process_group("fake", rank=rank, world_size=FAKE_WORLD, store=FakeStore())
    world = World(rank=rank, size=FAKE_WORLD, local_size=NODE)
    group = make_groups(Strategy(ep=FAKE_EP, dp=FAKE_WORLD), world, timeout_s=60.0).experts
    assert group is not None
    layer, dim = LAYERS[0], 8
    capacity = TOKENS * layer.top_k // layer.experts
    sizes = equal_sizes(group, Placement.even(layer.experts, FAKE_EP), capacity)
    routing = UniformRouting(mesh=group.mesh, num_tokens=TOKENS, top_k=layer.top_k, num_experts=layer.experts)
    x_ND = torch.zeros(capacity * layer.experts, dim)
    row_bytes = dim * x_ND.element_size()
    for name in ("flat", "hierarchical"):
        ledger, program = Ledger(), PROGRAMS[name]
        transport = TorchTransport(program, group, ledger, name)
        arrived = transport.arrive(dispatch(program, transport, transport.load(x_ND, sizes)))
        combine(program, transport, transport.depart(arrived, arrived.x_MD)).landed().sums()
        sent = ledger.traffic(group.rank, group.mesh)
        size = RowSize(row_bytes=row_bytes, back_bytes=row_bytes)
        planned = traffic_of(round_trip(program, group.mesh), routing, size)
        assert sent == planned, (sent, planned)
        shown = (sent.intra_bytes, sent.inter_bytes, sent.intra_messages, sent.inter_messages)
        yield (f"{rank:,}", name, *(f"{value:,.0f}" for value in shown))
    dist.destroy_process_group()


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


if __name__ == "__main__":
    main()
