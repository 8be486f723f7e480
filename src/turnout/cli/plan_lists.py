"""`turnout plan models` and `turnout plan clusters`: what the planner knows by name."""

from dataclasses import asdict
from typing import Any

import typer

from turnout.cli import options


def add_to(app: typer.Typer) -> None:
    app.command(epilog="Example: turnout plan models --json")(models)
    app.command(epilog="Example: turnout plan clusters --json")(clusters)


def models(as_json: options.Json = False) -> None:
    """Models by name: parameters, active parameters, shape, and where the sizes are from."""
    from turnout.cli import plan_print as show
    from turnout.cli.console import print_json, table
    from turnout.plan.shapes import SHAPES
    from turnout.plan.sources import source_of

    rows = [
        {
            "name": name, "total_params": shape.total_params, "active_params": shape.active_params,
            "layers": shape.all_layers, "dim": shape.dim, "heads": shape.num_heads, "vocab": shape.vocab_size,
            "experts": shape.num_experts, "top_k": shape.top_k, "source": source_of(name),
        }
        for name, shape in sorted(SHAPES.items(), key=lambda item: item[1].total_params)
    ]  # fmt: skip
    headings = show.columns(("model",), ("parameters", "active", "layers", "width", "heads", "experts", "a token"))
    cells = [
        [
            row["name"], show.count(row["total_params"]), show.count(row["active_params"]), str(row["layers"]),
            f"{row['dim']:,}", str(row["heads"]), str(row["experts"] or "-"), str(row["top_k"] or "-"), row["source"],
        ]
        for row in rows
    ]  # fmt: skip
    screen = show.wide_console(as_json=as_json)
    screen.print(table("Models", headings | {"source": "left"}, cells))
    screen.print("  any other: the path of its config.json, or of a .toml file of dimensions (docs/planner.md)")
    if as_json:
        print_json({"models": rows})


def clusters(as_json: options.Json = False) -> None:
    """Machines by name: devices, links, power, and where the numbers are from."""
    from turnout.cli import plan_print as show
    from turnout.cli.console import print_json, table
    from turnout.clusters import CLUSTERS

    machines = [machine for _, machine in CLUSTERS.items()]
    headings = show.columns(
        ("cluster", "device"),
        ("16-bit TFLOP/s", "fp8", "GB", "TB/s", "a node", "inside GB/s", "between GB/s", "W", "$ an hour"),
    )
    screen = show.wide_console(as_json=as_json)
    screen.print(table("Clusters; links: one way, of one device, as large transfers see them",
                       headings, [_cells(machine) for machine in machines]))  # fmt: skip
    for machine in machines:
        screen.print(f"  {machine.name}: {'; '.join(machine.sources)}", style="dim", soft_wrap=True)
    screen.print("  any other: the path of a .toml file (docs/planner.md)")
    if as_json:
        print_json({"clusters": [asdict(machine) for machine in machines]})


def _cells(machine: Any) -> list[str]:
    from turnout.cli.plan_print import short

    device, peaks = machine.device, machine.device.peak_flops_per_s
    rates = [(peaks.bf16 or peaks.fp16) / 1e12, peaks.fp8 / 1e12]
    memory = [device.memory_bytes / 1e9, device.memory_bytes_per_s / 1e12]
    links = [machine.intra.bytes_per_s / 1e9, machine.inter.bytes_per_s / 1e9]
    watt = machine.device_watt + machine.host_watt if machine.device_watt else 0
    numbers = [*rates, *memory, machine.devices_per_node, *links, watt, machine.usd_per_device_hour]
    return [machine.name, device.name, *map(short, numbers)]
