"""`turnout plan explain`: what experts do to the traffic between nodes, switch by switch."""

from pathlib import Path
from typing import Annotated, Any

import typer

from turnout.cli import options, plan_options

ExplainModel = Annotated[
    str, typer.Argument(help="A model with experts by name (`turnout plan models`), or the path of its config.json.")
]
Plot = Annotated[Path | None, typer.Option("--plot", help="Also draw the table into this file.", metavar="FILE.png")]
Page = Annotated[
    Path | None, typer.Option("--html", help="Also write a page with sliders: one file, no network.", metavar="FILE")
]


def add_to(app: typer.Typer) -> None:
    app.command(epilog="Example: turnout plan explain gpt4-moe --cluster dgx-h100 --html explain.html")(explain)


def explain(
    model: ExplainModel = "gpt4-moe",
    cluster: plan_options.Cluster = "dgx-a100",
    csv: plan_options.Csv = None,
    plot: Plot = None,
    page: Page = None,
    as_json: options.Json = False,
) -> None:
    """Bytes and seconds inside and between nodes, without experts and with them, under switches flipped one by one."""
    from turnout.cli import plan_print
    from turnout.cli.console import print_json
    from turnout.clusters import load_cluster
    from turnout.plan.explain import explain as rows_of

    machine = load_cluster(cluster)
    rows = rows_of(model, machine)
    screen = plan_print.wide_console(as_json=as_json)
    screen.print(_table(rows, f"{model} on {machine.name}: what one device sends in a step"))
    for line in _reading(machine):
        screen.print(f"  {line}", soft_wrap=True)
    documents = [row.to_json() for row in rows]
    flat = [{name: value for name, value in row.items() if name != "parts"} | row["parts"] for row in documents]
    names = dict.fromkeys(name for row in flat for name in row)
    plan_print.write_csv(csv, [dict.fromkeys(names, 0.0) | row for row in flat], screen)
    if plot:
        from turnout.plan.charts import draw_explain

        draw_explain(plot, rows, title=f"{model} on {machine.name}")
        screen.print(f"  wrote {plot}")
    if page:
        _write_page(page, model, machine)
        screen.print(f"  wrote {page} ({page.stat().st_size / 1024:.0f} KiB)")
    if as_json:
        print_json({"rows": documents, "model": model, "cluster": machine.name})


def _table(rows: tuple[Any, ...], title: str) -> Any:
    from turnout.cli import plan_print as show
    from turnout.cli.console import table

    headings = show.columns(
        ("scenario",),
        ("inside GB", "between GB", "between / inside", "inside s", "between s", "GB / link inside", "GB / card"),
    )
    cells = [
        [
            row.scenario, show.gb(row.intra_bytes), show.gb(row.inter_bytes), f"{row.inter_over_intra:.3f}",
            show.seconds(row.intra_s), show.seconds(row.inter_s), show.seconds(row.intra_bandwidth_s),
            show.seconds(row.inter_bandwidth_s),
        ]
        for row in rows
    ]  # fmt: skip
    return table(title, headings, cells)


def _reading(machine: Any) -> list[str]:
    times = machine.intra.bytes_per_s / machine.inter.bytes_per_s
    where = "where tokens leave the node whole, or k is large against that"
    return [
        "inside s, between s: with each message's latency; GB / link, GB / card: bytes over the bandwidth alone",
        f"a link inside a node is {times:.1f} times as fast as a card: experts make the card the bottleneck {where}",
    ]


def _write_page(path: Path, model: str, machine: Any) -> None:
    from turnout.data.atomic import write_atomic
    from turnout.plan.explain_page import page_data, render, scene

    write_atomic(path, render(page_data(scene(model, machine))).encode())
