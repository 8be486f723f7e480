"""`turnout plan placement`: where experts should lie, from what a run routed."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from turnout.cli import options, plan_options

EXAMPLE = "Example: turnout plan placement tiny runs/tiny --ranks 4 --hosts 2 --cluster dgx-h100"
NAMES = {"contiguous": "in order", "eplb": "EPLB", "eplb + copies": "EPLB with copies", "turnout": "searched"}
NAMES |= {"turnout + copies": "searched, with copies"}


def add_to(app: typer.Typer) -> None:
    app.command(epilog=EXAMPLE)(placement)


def placement(
    model: plan_options.Model,
    run: Annotated[Path, typer.Argument(help="A run of Turnout: its trace/ says what was routed.", show_default=False)],
    ranks: Annotated[int, typer.Option("--ranks", help="Ranks that share the experts (strategy.ep).")],
    hosts: Annotated[int, typer.Option("--hosts", help="Hosts that they are on, equally many on each.")] = 1,
    cluster: plan_options.Cluster = "dgx-h100",
    precision: Annotated[str, typer.Option("--precision", help="Of products and of rows on the wire.")] = "bf16",
    every: Annotated[
        int, typer.Option("--every", help="Steps in which a move must pay for itself (loop.rebalance_every).")
    ] = 100,
    spare: Annotated[
        int, typer.Option("--spare", help="Experts a rank may hold beyond its even share (loop.rebalance_spare).")
    ] = 0,
    state_bytes: Annotated[
        float,
        typer.Option("--state-bytes", help="Bytes that move with a parameter: 12 are float32 weights and AdamW's."),
    ] = 12.0,
    groups: Annotated[
        int, typer.Option("--groups", help="Of EPLB and copies: runs of experts that stay on one host.")
    ] = 1,
    redundant: Annotated[
        int, typer.Option("--redundant", help="Also with so many copies of experts (strategy.expert_copies).")
    ] = 0,
    last: Annotated[int, typer.Option("--last", help="Steps at the end of the run that count; 0: all.")] = 0,
    csv: plan_options.Csv = None,
    as_json: options.Json = False,
) -> None:
    """Loads and traffic of a run's experts in order, by EPLB, and by a search of least predicted seconds."""
    from turnout.balance.compare import compared, recorded
    from turnout.balance.machine import ExpertShape, Machine
    from turnout.balance.search import Limits
    from turnout.cli import plan_print as show
    from turnout.cli.console import print_json
    from turnout.clusters import load_cluster
    from turnout.errors import ConfigError
    from turnout.plan.query import Query
    from turnout.strategy import ELEMENT_BYTES
    from turnout.topology import Mesh

    screen = show.wide_console(as_json=as_json)
    if hosts < 1 or ranks < 1 or ranks % hosts:
        near = max(1, round(max(ranks, 1) / max(hosts, 1))) * max(hosts, 1)
        raise ConfigError(f"--hosts {hosts} must divide --ranks {ranks}; nearest legal: --ranks {near}")
    if last < 0 or state_bytes <= 0:
        raise ConfigError(f"--last {last} must be at least 0, and --state-bytes {state_bytes} above 0")
    sizes, mesh = Query(model=model, cluster=cluster).shape, Mesh(nodes=hosts, local=ranks // hosts)
    if not sizes.num_experts:
        raise ConfigError(f"model {model!r} has no experts to place; give one that has")
    # before a precision is looked up that no device has
    machine = Machine.of(load_cluster(cluster), precision, nodes=hosts)
    shape = ExpertShape(
        dim=sizes.latent_dim or sizes.dim,
        hidden=sizes.expert_hidden,
        gated=sizes.gated,
        element_bytes=ELEMENT_BYTES[precision],
    )
    # gradients in float32
    expert_bytes, gradient_bytes = round(shape.params * state_bytes), 4 * shape.params
    found = recorded(run, mesh, last=last)
    numbers = {sizes.experts_of(layer) for layer in sizes.sparse_layers}
    for name, routed in found.layers.items():
        if routed.num_experts not in numbers:
            raise ConfigError(
                f"layer {name!r} of {run} has {routed.num_experts} experts; {model} has {max(numbers)} a layer; give "
                "the model that was trained, or one with as many experts"
            )
    rows = compared(
        found.layers,
        shape.prices(machine, expert_bytes=expert_bytes, gradient_bytes=gradient_bytes, period=every),
        top_k=sizes.top_k,
        expert_bytes=expert_bytes,
        groups=groups,
        redundant=redundant,
        limits=Limits(room=-(-max(each.num_experts for each in found.layers.values()) // ranks) + spare),
    )
    document = [asdict(row) for row in rows]
    screen.print(_table(document, len(found.layers)))
    for line in _notes(found.knows_sources, every, expert_bytes, redundant):
        screen.print(f"  {line}", soft_wrap=True)
    show.write_csv(csv, document, screen)
    if as_json:
        print_json({"rows": document, "sources": "recorded" if found.knows_sources else "alike"})


def _table(rows: list[dict[str, Any]], layers: int) -> Any:
    from turnout.cli import plan_print as show
    from turnout.cli.console import table

    headings = show.columns(
        ("layer", "experts"),
        ("fullest rank", "between hosts, B/token", "a step", "move between hosts, MB", "inside", "takes", "pays after"),
    )
    cells = []
    for row in rows:
        moves = [_megabytes(row["move_inter_bytes"]), _megabytes(row["move_intra_bytes"])]
        cells.append([
            "mean of all" if row["layer"] == "all" else row["layer"], NAMES[row["way"]], f"{row['max_load']:.3f}",
            f"{row['inter_bytes_a_token']:,.0f}", show.seconds(row["step_s"]), *moves,
            "" if row["move_s"] is None else show.seconds(row["move_s"]),
            _steps(row),
        ])  # fmt: skip
    return table(f"Placements of the experts of {layers} layers", headings, cells)


def _megabytes(size: float | None) -> str:
    from turnout.cli.plan_print import short

    return "" if size is None else short(size / 1e6)


def _steps(row: dict[str, Any]) -> str:
    from turnout.cli.plan_print import short

    if not row["move_s"]:
        return ""
    return "never" if row["pays_after"] is None else f"{short(row['pays_after'])} steps"


def _notes(knows_sources: bool, every: int, expert_bytes: int, redundant: int) -> list[str]:
    sources = "as recorded" if knows_sources else "alike, for the run did not record which (loop.rebalance_every does)"
    lines = [
        f"ranks send {sources}; fullest rank: rows over the mean of ranks; a step: what one layer computes and sends",
        f"an expert moves with {expert_bytes:,} bytes; the search counts its move as paid over {every:,} steps",
    ]
    return lines + (
        ["a step with copies has the sum of their gradients in it; EPLB's may lie twice on a rank"] if redundant else []
    )
