"""`turnout plan volume`: bytes and messages of every collective of a step."""

from pathlib import Path
from typing import Annotated, Any

import typer

from turnout.cli import options, plan_options

EXAMPLE = (
    'Example: turnout plan volume deepseek-v3 --cluster h800 --nodes 256 --batch 15360 '
    '--layout "tp=1,pp=16,ep=64,folded=true,alltoall=node_dedup" --json'
)  # fmt: skip


Links = Annotated[
    bool, typer.Option("--links", help="Also say what goes to each device of its node, of its rail, and beyond.")
]


def add_to(app: typer.Typer) -> None:
    app.command(epilog=EXAMPLE)(volume)


def volume(
    model: plan_options.Model,
    cluster: plan_options.Cluster = "dgx-h100",
    nodes: plan_options.Nodes = 0,
    devices: plan_options.Devices = 0,
    seq: plan_options.Seq = 4096,
    batch: plan_options.Batch = 1024,
    layout: plan_options.Layout = "",
    framework: plan_options.Framework = "megatron-core",
    skew: plan_options.Skew = 1.0,
    capacity_factor: plan_options.Capacity = 0.0,
    mtp_layers: plan_options.Further = -1,
    trace: plan_options.Trace = None,
    layer: plan_options.TraceLayer = "all",
    links: Links = False,
    csv: plan_options.Csv = None,
    plot: plan_options.Plot = None,
    page: plan_options.Page = None,
    as_json: options.Json = False,
) -> None:
    """What one device sends in a step: every collective, inside the node and between nodes, with its seconds."""
    from turnout.cli import plan_page, plan_print
    from turnout.cli.console import print_json
    from turnout.cli.plan_pick import with_layout, with_skew_of
    from turnout.plan.links import links_of
    from turnout.plan.step import step_of
    from turnout.plan.time import collective_s, node_limit
    from turnout.plan.volume import to_json
    from turnout.plan.volume import volume as collectives

    screen = plan_page.console(as_json=as_json)
    query = plan_options.query_of(
        model, cluster=cluster, nodes=nodes, devices=devices, seq_len=seq, global_batch=batch, layout=layout,
        framework=framework, skew=skew, capacity_factor=capacity_factor, mtp_layers=mtp_layers,
    )  # fmt: skip
    query = with_layout(query, layout, screen)
    timed, _ = with_skew_of(query, trace, layer)
    job, machine = query.job(), query.machine
    step = step_of(job, machine.devices_per_node, node_limit=node_limit(job, machine))
    parts = collectives(step)
    layers: dict[str, Any] = {}
    if trace:
        parts, layers = _recorded(screen, query, step, parts, trace, layer)
    busiest = timed.job().busiest
    document = to_json(parts, lambda part: collective_s(part, machine), busiest)
    found = links_of(parts, tensor=job.strategy.tp if job.strategy.alltoall == "coordinated" else 1)
    document["links"] = [each.to_json() for each in found]
    screen.print(f"  {plan_options.headline(query)}", soft_wrap=True)
    screen.print(_table(parts, document, busiest))
    screen.print("  bytes sent by one device in a step, the mean over stages; seconds before anything is hidden")
    if busiest > 1:
        screen.print("  busiest GB: of the device whose experts get most rows; all wait for it, and so do the seconds")
    if links:
        screen.print()
        screen.print(_links_table(found))
    if layers:
        _print_layers(screen, layers)
    plan_print.write_csv(csv, document["collectives"], screen)
    if plot or page:
        from turnout.plan.figures import volume_figure

        title, headline = "Bytes of a training step", plan_options.headline(query)
        figure = volume_figure(parts, [row["seconds"] for row in document["collectives"]])
        plan_page.write_pictures(screen, figure, title=title, headline=headline, plot=plot, page=page)
    if as_json:
        print_json(document | layers | plan_options.asked(query))


def _table(parts: tuple[Any, ...], document: dict[str, Any], busiest: float) -> Any:
    from turnout.cli import plan_print as show
    from turnout.cli.console import table

    skewed = ("busiest GB",) if busiest > 1 else ()
    headings = show.columns(
        ("collective", "of"), ("ranks", "on nodes", "calls", "inside GB", "between GB", *skewed, "messages", "seconds")
    )
    cells = [
        [
            part.name, part.axis, f"{part.mesh.size:,}", f"{part.mesh.nodes:,}", show.short(part.calls),
            show.gb(part.intra_bytes), show.gb(part.inter_bytes), *(show.gb(row["busiest_bytes"]) for _ in skewed),
            show.short(part.messages),
            show.seconds(row["seconds"]),
        ]
        for part, row in zip(parts, document["collectives"], strict=True)
    ]  # fmt: skip
    total = sum(row["seconds"] for row in document["collectives"])
    sums = [show.gb(document["intra_bytes"]), show.gb(document["inter_bytes"])]
    most = sum(row["busiest_bytes"] for row in document["collectives"])
    cells.append(["all", "", "", "", "", *sums, *(show.gb(most) for _ in skewed), "", show.seconds(total)])
    return table("Traffic of one device and step", headings, cells)


def _links_table(found: tuple[Any, ...]) -> Any:
    from turnout.cli import plan_print as show
    from turnout.cli.console import table

    headings = show.columns(("collective", "to devices"), ("of them", "MB to each", "messages to each", "GB in all"))
    cells = [
        [
            each.collective, each.link, show.short(each.peers), show.short(each.link_bytes / 1e6),
            show.short(each.messages), show.gb(each.peers * each.link_bytes),
        ]
        for each in found
    ]  # fmt: skip
    total = sum(each.peers * each.link_bytes for each in found)
    cells.append(["all", "", "", "", "", show.gb(total)])
    return table("Traffic of one device and step by link; of a ring's hops the mean over devices", headings, cells)


# --- a recorded run ---


def _recorded(
    screen: Any, query: Any, step: Any, parts: tuple[Any, ...], run: Path, layer: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(collectives with the run's routing, what it differs in from uniform routing)."""
    from turnout.plan.memory import memory
    from turnout.plan.recorded import layer_traffic, recorded_loads, skewed_jobs, with_recorded
    from turnout.plan.time import step_time

    job, machine = query.job(), query.machine
    found = recorded_loads(run, query.shape, layer)
    rows = [each.to_json() for each in layer_traffic(step, found)]
    timed, held = skewed_jobs(job, found)
    dropped = [each.dropped_share for each in found.values()]
    effects = {
        "mean_skew": timed.skew,
        "worst_skew": held.skew,
        "dropped_share": sum(dropped) / len(dropped),
        "step_s": step_time(timed, machine).step_s,
        "uniform_step_s": step_time(job, machine).step_s,
        "peak_bytes": memory(held).allocated_bytes,
        "uniform_peak_bytes": memory(job).allocated_bytes,
    }
    return with_recorded(step, parts, found), {"trace": str(run), "layers": rows} | effects


def _print_layers(screen: Any, document: dict[str, Any]) -> None:
    from turnout.cli import plan_print as show
    from turnout.cli.console import table

    headings = show.columns(
        ("layer",),
        (
            "skew",
            "of a step",
            "inside GB",
            "uniform inside",
            "between GB",
            "uniform between",
            "busiest rank GB",
            "over uniform",
        ),
    )
    cells = []
    for row in document["layers"]:
        uniform = row["uniform_intra_bytes"] + row["uniform_inter_bytes"]
        cells.append([
            f"{row['layer']} ({row['name']})", f"{row['skew']:.3f}", f"{row['step_skew']:.3f}",
            show.gb(row["intra_bytes"]), show.gb(row["uniform_intra_bytes"]), show.gb(row["inter_bytes"]),
            show.gb(row["uniform_inter_bytes"]), show.gb(row["busiest_bytes"]),
            show.percent(row["busiest_bytes"] / uniform - 1, signed=True) if uniform else "",
        ])  # fmt: skip
    screen.print()
    screen.print(table("The exchange of each layer as the run routed, and as uniform routing would", headings, cells))
    step_s, uniform_s = (show.seconds(document[name]) for name in ("step_s", "uniform_step_s"))
    peak, uniform_peak = (show.gib(document[name]) for name in ("peak_bytes", "uniform_peak_bytes"))
    worst = f"{document['worst_skew']:.3f}"
    lines = [
        "skew: assignments of the busiest rank over the mean, over the whole run; of a step: the mean over steps",
        f"a step takes {step_s} at the mean skew of {document['mean_skew']:.3f}, {uniform_s} if uniform",
        f"the fullest device holds {peak} GiB at the worst skew of {worst}, {uniform_peak} if uniform",
    ]
    if document["dropped_share"]:
        lines.append(f"{document['dropped_share']:.1%} of assignments found no room; as many are counted as sent")
    for line in lines:
        screen.print(f"  {line}", soft_wrap=True)
