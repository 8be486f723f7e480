"""`turnout plan volume`: bytes and messages of every collective of a step."""

from typing import Any

import typer

from turnout.cli import options, plan_options

EXAMPLE = (
    'Example: turnout plan volume deepseek-v3 --cluster h800 --nodes 256 --batch 15360 '
    '--layout "tp=1,pp=16,ep=64,folded=true,alltoall=node_dedup" --json'
)  # fmt: skip


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
    csv: plan_options.Csv = None,
    as_json: options.Json = False,
) -> None:
    """What one device sends in a step: every collective, inside the node and between nodes, with its seconds."""
    from turnout.cli import plan_print
    from turnout.cli.console import print_json
    from turnout.cli.plan_pick import with_layout
    from turnout.plan.step import step_of
    from turnout.plan.time import collective_s, node_limit
    from turnout.plan.volume import to_json
    from turnout.plan.volume import volume as collectives

    screen = plan_print.wide_console(as_json=as_json)
    query = plan_options.query_of(
        model, cluster=cluster, nodes=nodes, devices=devices, seq_len=seq, global_batch=batch, layout=layout,
        framework=framework,
    )  # fmt: skip
    query = with_layout(query, layout, screen)
    job, machine = query.job(), query.machine
    parts = collectives(step_of(job, machine.devices_per_node, node_limit=node_limit(job, machine)))
    document = to_json(parts, lambda part: collective_s(part, machine))
    screen.print(f"  {plan_options.headline(query)}", soft_wrap=True)
    screen.print(_table(parts, document))
    screen.print("  bytes sent by one device in a step, the mean over stages; seconds before anything is hidden")
    if csv:
        plan_print.write_csv(csv, document["collectives"])
        screen.print(f"  wrote {csv}")
    if as_json:
        print_json(document | plan_options.asked(query))


def _table(parts: tuple[Any, ...], document: dict[str, Any]) -> Any:
    from turnout.cli import plan_print as show
    from turnout.cli.console import table

    headings = show.columns(
        ("collective", "of"), ("ranks", "on nodes", "calls", "inside GB", "between GB", "messages", "seconds")
    )
    cells = [
        [
            part.name, part.axis, f"{part.mesh.size:,}", f"{part.mesh.nodes:,}", show.short(part.calls),
            show.gb(part.intra_bytes), show.gb(part.inter_bytes), show.short(part.messages),
            show.seconds(row["seconds"]),
        ]
        for part, row in zip(parts, document["collectives"], strict=True)
    ]  # fmt: skip
    total = sum(row["seconds"] for row in document["collectives"])
    sums = [show.gb(document["intra_bytes"]), show.gb(document["inter_bytes"])]
    cells.append(["all", "", "", "", "", *sums, "", show.seconds(total)])
    return table("Traffic of one device and step", headings, cells)
