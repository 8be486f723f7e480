"""What verbs of `turnout plan` ask alike: a model on a cluster, a batch, a layout."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    # plan is imported when a verb runs, so that --help is quick
    from turnout.plan.query import Query

Model = Annotated[
    str,
    typer.Argument(
        help="A model by name (`turnout plan models`), or the path of a Hugging Face config.json or of a .toml file of "
        "dimensions.",
        show_default=False,
    ),
]
Cluster = Annotated[
    str, typer.Option("--cluster", help="A machine by name (`turnout plan clusters`), or the path of a .toml file.")
]
Nodes = Annotated[int, typer.Option("--nodes", help="Nodes of the job; 0: those that --devices fill.")]
Devices = Annotated[int, typer.Option("--devices", help="Devices of the job; 0: all of --nodes.")]
Seq = Annotated[int, typer.Option("--seq", help="Tokens of a sequence.")]
Batch = Annotated[int, typer.Option("--batch", help="Sequences of an optimizer step, over all devices.")]
Layout = Annotated[
    str,
    typer.Option(
        "--layout",
        help="tp=8,pp=16,ep=64,...: fields of Strategy; sp, vp, mbs are short for sequence_parallel, virtual_stages, "
        "micro_batch. Empty: the search's pick.",
        metavar="A=V,...",
    ),
]
Further = Annotated[
    int,
    typer.Option(
        "--mtp-layers", help="Blocks that predict further tokens, as DeepSeek-V3 trains 1; -1: as the model has them."
    ),
]
Framework = Annotated[
    str,
    typer.Option(
        "--framework",
        help="The code whose memory and overlap are assumed: nemo, deepseek, torchtitan, nanotron, ...; "
        "an unknown name lists all.",
    ),
]
Skew = Annotated[float, typer.Option("--skew", help="Rows of the busiest expert rank over the mean; 1: balanced.")]
Capacity = Annotated[
    float,
    typer.Option(
        "--capacity-factor", help="Pad every expert's buffer to this times its mean of rows; 0: dropless, none padded."
    ),
]
Price = Annotated[
    float, typer.Option("--usd-per-device-hour", help="Rent of a device; 0: what the cluster's description says.")
]
Trace = Annotated[
    Path | None,
    typer.Option("--trace", help="Route as this run of Turnout did (its trace/counts.bin).", metavar="RUN"),
]
TraceLayer = Annotated[
    str, typer.Option("--layer", help="With --trace: all, or the number of the layer that stands for all of them.")
]
Plot = Annotated[Path | None, typer.Option("--plot", help="Also draw the answer into this file.", metavar="FILE.png")]
Page = Annotated[
    Path | None, typer.Option("--html", help="Also write the answer as a page: one file, no network.", metavar="FILE")
]
Csv = Annotated[Path | None, typer.Option("--csv", help="Also write the table to this file.", metavar="FILE")]


def query_of(model: str, **fields: Any) -> "Query":
    """The question the options ask; `layout` may be empty.

    Raises: ConfigError naming the field that is not legal and the nearest value that is.
    """
    from turnout.plan.layout import layout_of
    from turnout.plan.query import Query

    layout = fields.pop("layout", "")
    query = Query(model=model, **fields)
    query = query.with_strategy(layout_of(layout, query.machine.device))
    # unknown names are errors here, before anything is computed
    _ = (query.shape, query.machine, query.world)
    return query


def headline(query: "Query") -> str:
    """What is asked, in one line."""
    from turnout.plan.layout import layout_text

    machine, world = query.machine, query.world
    nodes = -(-world // machine.devices_per_node)
    name = (query.shape.name or str(query.model)) + _further(query.shape.mtp_layers)
    return (
        f"{name} on {world:,} x {machine.device.name} ({machine.name}, {nodes:,} node{'s' * (nodes > 1)}), "
        f"{query.global_batch:,} sequences of {query.seq_len:,} tokens; layout {layout_text(query.job().strategy)}"
        f"{_routing(query)}"
    )


def _further(blocks: int) -> str:
    return f", {blocks} block{'s' * (blocks > 1)} for further tokens," if blocks else ""


def _routing(query: "Query") -> str:
    """How tokens go, where it is not evenly and dropless."""
    if query.capacity_factor:
        return f"; capacity factor {query.capacity_factor:g}"
    busiest = query.job().busiest
    if busiest < query.skew:
        return f"; skew {busiest:g} ({query.skew:g} asked: no rank gets more than all rows)"
    if busiest > query.skew:
        return f"; skew {busiest:.4g}, for ep={query.strategy.ep} does not divide {query.shape.num_experts} experts"
    return "" if busiest == 1 else f"; skew {busiest:g}"


def asked(query: "Query") -> dict[str, Any]:
    """What is asked, as every verb's JSON repeats it."""
    from turnout.plan.layout import layout_text

    return {
        "model": query.shape.name or str(query.model),
        "cluster": query.machine.name,
        "devices": query.world,
        "seq_len": query.seq_len,
        "global_batch": query.global_batch,
        "framework": query.framework,
        "layout": layout_text(query.job().strategy),
        "mtp_layers": query.shape.mtp_layers,
        "skew": query.job().busiest,
        "capacity_factor": query.capacity_factor,
    }
