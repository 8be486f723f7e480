"""`turnout plan memory`: bytes of device memory by pipeline stage, and what would make a job fit."""

from typing import Any

import typer

from turnout.cli import options, plan_options

EXAMPLE = 'Example: turnout plan memory mixtral-8x7b --nodes 4 --batch 256 --layout "tp=2,pp=4,ep=4" --json'
# columns of the table: heading, and the field of Memory
COLUMNS = (
    ("weights", "weights_bytes"),
    ("gradients", "gradients_bytes"),
    ("optimizer", "optimizer_bytes"),
    ("activations", "activations_bytes"),
    ("experts' rows", "moe_bytes"),
    ("logits", "logits_bytes"),
    ("buffers", "buffer_bytes"),
    ("framework", "framework_bytes"),
    ("all", "allocated_bytes"),
)


def add_to(app: typer.Typer) -> None:
    app.command(epilog=EXAMPLE)(memory)


def memory(
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
    csv: plan_options.Csv = None,
    plot: plan_options.Plot = None,
    page: plan_options.Page = None,
    as_json: options.Json = False,
) -> None:
    """Peak memory of each pipeline stage by what needs it; whether it fits, by how much, and what would make it fit."""
    from turnout.cli import plan_page, plan_print
    from turnout.cli.console import print_json
    from turnout.cli.plan_pick import with_layout, with_skew_of
    from turnout.plan.memory import beside_bytes, memory_by_stage
    from turnout.plan.remedies import over_bytes, remedies

    screen = plan_page.console(as_json=as_json)
    query = plan_options.query_of(
        model, cluster=cluster, nodes=nodes, devices=devices, seq_len=seq, global_batch=batch, layout=layout,
        framework=framework, skew=skew, capacity_factor=capacity_factor, mtp_layers=mtp_layers,
    )  # fmt: skip
    _, query = with_skew_of(with_layout(query, layout, screen), trace, layer)
    job, device = query.job(), query.machine.device
    stages = memory_by_stage(job)
    over = over_bytes(job, device.memory_bytes)
    ways = remedies(query) if over > 0 else ()
    peak = max(each.allocated_bytes for each in stages)
    document = {
        "stages": [{"stage": each.stage} | {name: getattr(each, name) for _, name in COLUMNS} for each in stages],
        "peak_bytes": peak,
        "beside_bytes": beside_bytes(peak),
        "device_bytes": device.memory_bytes,
        "fits": over <= 0,
        "over_bytes": over,
        "remedies": [way.to_json() for way in ways],
    }
    screen.print(f"  {plan_options.headline(query)}", soft_wrap=True)
    screen.print(_table(stages))
    screen.print(f"  {_verdict(document, device)}")
    if ways:
        screen.print(_remedies(ways))
    plan_print.write_csv(csv, document["stages"], screen)
    if plot or page:
        from turnout.plan.figures import memory_figure

        title, headline = "Memory of a training step", plan_options.headline(query)
        figure = memory_figure(_runs(stages), device.memory_bytes - beside_bytes(peak))
        plan_page.write_pictures(screen, figure, title=title, headline=headline, plot=plot, page=page)
    if as_json:
        print_json(document | plan_options.asked(query))


def _table(stages: tuple[Any, ...]) -> Any:
    from turnout.cli import plan_print as show
    from turnout.cli.console import table

    headings = show.columns(("stage",), (heading for heading, _ in COLUMNS))
    cells = [[label, *(show.gib(getattr(each, name)) for _, name in COLUMNS)] for label, each in _runs(stages)]
    return table("GiB of one device by pipeline stage, at its peak", headings, cells)


def _runs(stages: tuple[Any, ...]) -> list[tuple[str, Any]]:
    """Neighbouring stages that need the same are one row: "3-14"."""
    runs: list[list[Any]] = []
    for each in stages:
        sizes = [getattr(each, name) for _, name in COLUMNS]
        if runs and [getattr(runs[-1][-1], name) for _, name in COLUMNS] == sizes:
            runs[-1].append(each)
        else:
            runs.append([each])
    return [(str(run[0].stage) if len(run) == 1 else f"{run[0].stage}-{run[-1].stage}", run[0]) for run in runs]


def _verdict(document: dict[str, Any], device: Any) -> str:
    from turnout.cli import plan_print as show

    needs = f"{show.gib(document['peak_bytes'])} GiB and {show.gib(document['beside_bytes'])} beside"
    has = f"{device.name} has {show.gib(document['device_bytes'])} GiB"
    if document["fits"]:
        return f"fits: {needs}; {has}, {show.gib(-document['over_bytes'])} stay free"
    return f"does not fit: {needs}; {has}, {show.gib(document['over_bytes'])} are lacking"


def _remedies(ways: tuple[Any, ...]) -> Any:
    from turnout.cli import plan_print as show
    from turnout.cli.console import table

    fits = ways[0].over_bytes <= 0
    title = "What would make it fit, the shortest step first" if fits else "Nothing tried fits; what lacks least"
    headings = show.columns(("change of the layout",), ("needs GiB", "left GiB", "step"))
    cells = [
        [
            ",".join(f"{name}={str(value).lower()}" for name, value in way.changes.items()),
            show.gib(way.peak_bytes), show.gib(-way.over_bytes) if fits else f"-{show.gib(way.over_bytes)}",
            show.seconds(way.step_s),
        ]
        for way in ways
    ]  # fmt: skip
    return table(title, headings, cells)
