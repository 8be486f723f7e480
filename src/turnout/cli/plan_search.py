"""`turnout plan search`: every legal layout evaluated, those that fit ranked."""

from typing import Annotated, Any, cast

import typer

from turnout.cli import options, plan_options

EXAMPLE = 'Example: turnout plan search mixtral-8x7b --nodes 8 --batch 512 --why-not "tp=8,pp=4" --json'
DECIDED = "What of the layout is decided: tp=8,precision=fp8; the rest is searched."
Decided = Annotated[str, typer.Option("--layout", help=DECIDED, metavar="A=V,...")]
RankBy = Annotated[str, typer.Option("--rank", help="What comes first: the least time, cost or memory.")]
Top = Annotated[int, typer.Option("--top", help="Layouts to show.")]
TryNodes = Annotated[
    str,
    typer.Option("--try-nodes", help="Sizes of cluster to choose from in place of --nodes: 8,16,32.", metavar="N,N"),
]
WhyNot = Annotated[
    str, typer.Option("--why-not", help="Also say why this layout is not the pick.", metavar="A=V,...")
]  # fmt: skip

PARETO = 12  # layouts of the front that are shown; --json has all


def add_to(app: typer.Typer) -> None:
    app.command(epilog=EXAMPLE)(search)


def search(
    model: plan_options.Model,
    cluster: plan_options.Cluster = "dgx-h100",
    nodes: plan_options.Nodes = 0,
    devices: plan_options.Devices = 0,
    seq: plan_options.Seq = 4096,
    batch: plan_options.Batch = 1024,
    layout: Decided = "",
    framework: plan_options.Framework = "megatron-core",
    skew: plan_options.Skew = 1.0,
    capacity_factor: plan_options.Capacity = 0.0,
    mtp_layers: plan_options.Further = -1,
    rank: RankBy = "time",
    top: Top = 10,
    usd_per_device_hour: plan_options.Price = 0.0,
    try_nodes: TryNodes = "",
    why_not: WhyNot = "",
    csv: plan_options.Csv = None,
    plot: plan_options.Plot = None,
    page: plan_options.Page = None,
    as_json: options.Json = False,
) -> None:
    """Layouts that fit, best first; what trades memory for time; why yours is not the pick. Exit code 1: none fits."""
    from dataclasses import replace

    from turnout.cli import plan_page, plan_print
    from turnout.cli.console import print_json
    from turnout.plan.bill import priced
    from turnout.plan.search import search as find

    sizes = options.whole_numbers("--try-nodes", try_nodes, example="8,16,32") if try_nodes else ()
    query = plan_options.query_of(
        model, cluster=cluster, nodes=nodes or (0 if devices else max(sizes, default=0)), devices=devices, seq_len=seq,
        global_batch=batch, framework=framework, skew=skew, layout=layout,
        capacity_factor=capacity_factor, mtp_layers=mtp_layers,
    )  # fmt: skip
    query = replace(query, cluster=priced(query.machine, usd_per_device_hour))
    # what is not one of them is refused there
    result = find(query, rank=cast(Any, rank), top=top, nodes=sizes, space=_space(layout))
    screen = plan_page.console(as_json=as_json)
    document = result.to_json()
    _print_result(screen, query, result, by_nodes=bool(sizes))
    if why_not:
        document["why_not"] = _why_not(screen, query, why_not)
    best = [row | {"layout": text} for row, text in zip(document["best"], _texts(result), strict=True)]
    plan_print.write_csv(csv, best, screen)
    if result.best and (plot or page):
        from turnout.plan.figures import search_figure

        title, headline = "Layouts of a training job", _headline(query, by_nodes=bool(sizes))
        figure = search_figure(result.pareto)
        plan_page.write_pictures(screen, figure, title=title, headline=headline, plot=plot, page=page)
    if as_json:
        print_json(document | {"model": query.shape.name, "cluster": query.machine.name})
    if not result.best:
        raise typer.Exit(1)


def _space(layout: str) -> Any:
    """What is searched: all values of the fields that are not decided."""
    from dataclasses import fields

    from turnout.errors import ConfigError
    from turnout.plan.layout import said_of
    from turnout.plan.space import Space

    said = said_of(layout)
    if "dp" in said:
        raise ConfigError(f"--layout dp={said['dp']}: dp follows from the devices and the other axes; leave it out")
    return Space(**{field.name: (said[field.name],) for field in fields(Space) if field.name in said})


def _texts(result: Any) -> list[str]:
    from turnout.plan.layout import layout_text

    return [layout_text(each.strategy) for each in result.best]


def _headline(query: Any, *, by_nodes: bool) -> str:
    """What is asked, in one line."""
    machine = query.machine
    where = machine.name if by_nodes else f"{query.world:,} x {machine.device.name} ({machine.name})"
    return f"{query.shape.name} on {where}, {query.global_batch:,} sequences of {query.seq_len:,} tokens"


def _print_result(screen: Any, query: Any, result: Any, *, by_nodes: bool) -> None:
    from turnout.cli.plan_print import gib

    machine = query.machine
    screen.print(f"  {_headline(query, by_nodes=by_nodes)}")
    memory = gib(machine.device.memory_bytes)
    if not result.best:
        least = f"{result.least_memory_gib:,.1f} GiB"
        screen.print(f"  none of {result.considered:,} legal layouts fits {memory} GiB; the least needs {least}")
        return
    screen.print(_table(f"Best by {result.rank}", result.best))
    if len(result.pareto) > 1:
        shown = result.pareto[:PARETO]
        some = f"; the fastest {len(shown)} of {len(result.pareto)}" if len(shown) < len(result.pareto) else ""
        screen.print()
        screen.print(_table(f"What trades time for memory or money: no other is as good in all{some}", shown))
    fitting = f"{result.fitting:,} of {result.considered:,} legal layouts fit {memory} GiB"
    screen.print(f"  {fitting}; all were evaluated in {result.seconds:.2f} s")


def _table(title: str, rows: Any) -> Any:
    from turnout.cli import plan_print as show
    from turnout.cli.console import table
    from turnout.plan.layout import layout_text

    priced = any(each.usd_per_step is not None for each in rows)
    headings = show.columns(("layout",), ("devices", "step", "MFU", "GiB", *(["a step"] if priced else [])))
    cells = [
        [
            layout_text(each.strategy), f"{each.devices:,}", show.seconds(each.step_s), show.percent(each.mfu),
            f"{each.memory_gib:,.1f}", *([show.dollars(each.usd_per_step)] if priced else []),
        ]
        for each in rows
    ]  # fmt: skip
    built = table(title, headings, cells)
    # a layout is there to be copied: never cut
    built.columns[0].overflow = "fold"
    return built


def _why_not(screen: Any, query: Any, text: str) -> dict[str, Any]:
    """The answer, of which the text is shown."""
    from turnout.plan.layout import layout_of
    from turnout.plan.why_not import why_not

    answer = why_not(query, layout_of(text, query.machine.device))
    screen.print(f"  why not {text}: {answer.text}", soft_wrap=True)
    return answer.to_json()
