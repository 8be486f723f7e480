"""`turnout plan time`: a step's seconds by cause, the bill, and whether experts pay at all."""

from typing import Annotated, Any

import typer

from turnout.cli import options, plan_options

EXAMPLE = (
    'Example: turnout plan time deepseek-v3 --cluster h800 --nodes 256 --batch 15360 --run-tokens 14.8e12 --what-if '
    '--layout "tp=1,pp=16,ep=64,folded=true,alltoall=node_dedup,overlap=2,zero=1"'
)  # fmt: skip
RunTokens = Annotated[float, typer.Option("--run-tokens", help="Tokens of a whole run, for its bill; 0: none.")]
WhatIfs = Annotated[bool, typer.Option("--what-if", help="Also change one thing at a time and say what it saves.")]


def add_to(app: typer.Typer) -> None:
    app.command(epilog=EXAMPLE)(time)


def time(
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
    run_tokens: RunTokens = 0.0,
    usd_per_device_hour: plan_options.Price = 0.0,
    what_if: WhatIfs = False,
    csv: plan_options.Csv = None,
    plot: plan_options.Plot = None,
    page: plan_options.Page = None,
    as_json: options.Json = False,
) -> None:
    """Seconds of a step by cause, tokens a second, MFU, dollars and energy; and dense models of as many parameters."""
    from dataclasses import replace

    from turnout.cli import plan_page, plan_print
    from turnout.cli.console import print_json
    from turnout.cli.plan_pick import with_layout, with_skew_of
    from turnout.plan.bill import priced
    from turnout.plan.whatif import what_ifs

    screen = plan_page.console(as_json=as_json)
    query = plan_options.query_of(
        model, cluster=cluster, nodes=nodes, devices=devices, seq_len=seq, global_batch=batch, layout=layout,
        framework=framework, skew=skew, capacity_factor=capacity_factor, mtp_layers=mtp_layers,
    )  # fmt: skip
    query = replace(query, cluster=priced(query.machine, usd_per_device_hour))
    query, _ = with_skew_of(with_layout(query, layout, screen), trace, layer)
    document, step = _document(query, run_tokens)
    screen.print(f"  {plan_options.headline(query)}", soft_wrap=True)
    _print_step(screen, document, step)
    _print_bill(screen, document)
    _print_twins(screen, document)
    if what_if:
        rows = what_ifs(query)
        document["what_if"] = [row.to_json() for row in rows]
        screen.print()
        screen.print(_what_if_table(rows, document["step_s"]))
    plan_print.write_csv(csv, _parts(step), screen)
    if plot or page:
        from turnout.plan.figures import time_figure

        title, headline = "Seconds of a training step", plan_options.headline(query)
        plan_page.write_pictures(screen, time_figure(step), title=title, headline=headline, plot=plot, page=page)
    if as_json:
        print_json(document | plan_options.asked(query))


def _document(query: Any, run_tokens: float) -> tuple[dict[str, Any], Any]:
    """What the verb answers, and the step itself."""
    from turnout.errors import ConfigError
    from turnout.plan.bill import bill
    from turnout.plan.memory import memory
    from turnout.plan.remedies import over_bytes
    from turnout.plan.time import step_time
    from turnout.plan.twin import tokens_to_save, twins
    from turnout.plan.waterfall import mfu, waterfall

    job, machine = query.job(), query.machine
    step = step_time(job, machine)
    tokens = job.global_batch * job.seq_len
    cost = bill(machine, devices=job.world, step_s=step.step_s, step_tokens=tokens, run_tokens=run_tokens)
    try:
        beside = twins(query)
    except ConfigError:
        # a layout for experts alone, such as one of folded axes, may suit no dense model
        beside = ()
    return {
        "step_s": step.step_s,
        "parts": {part.name: part.seconds for part in waterfall(step)},
        "tokens_per_s": step.tokens_per_s(job),
        "tokens_per_s_per_device": step.tokens_per_s(job) / job.world,
        "tflops_per_device": step.model_flops_per_s(job) / 1e12,
        "mfu": mfu(step, job, machine),
        "peak_bytes": memory(job).allocated_bytes,
        "fits": over_bytes(job, machine.device.memory_bytes) <= 0,
        "bill": cost.to_json(),
        "twins": [each.to_json() for each in beside],
        "tokens_to_save": tokens_to_save(beside) if beside else None,
    }, step


def _parts(step: Any) -> list[dict[str, Any]]:
    """The rows of the table of parts."""
    from dataclasses import asdict

    from turnout.plan.waterfall import waterfall

    return [asdict(part) for part in waterfall(step)]


# --- for people ---


def _print_step(screen: Any, document: dict[str, Any], step: Any) -> None:
    from turnout.cli import plan_print as show
    from turnout.cli.console import table
    from turnout.plan.waterfall import waterfall

    headings = show.columns(("part", "what it is"), ("seconds", "share")) | {"": "left"}
    parts = waterfall(step)
    widest = max(part.share for part in parts)
    cells = [
        [part.name, part.meaning, show.seconds(part.seconds), show.percent(part.share), show.bar(part.share / widest)]
        for part in parts
    ]
    cells.append(["step", "", show.seconds(document["step_s"]), "", ""])
    screen.print(table("One optimizer step on the slowest pipeline stage", headings, cells))
    rates = f"{document['tokens_per_s']:,.0f} tokens/s, {document['tokens_per_s_per_device']:,.0f} a device"
    flops = f"{document['tflops_per_device']:,.0f} TFLOP/s a device, MFU {show.percent(document['mfu'])}"
    screen.print(f"  {rates}; {flops} (of the bf16 peak, all pairs of a sequence counted)")
    if not document["fits"]:
        screen.print(f"  it does not fit: {show.gib(document['peak_bytes'])} GiB; see `turnout plan memory`")


def _print_bill(screen: Any, document: dict[str, Any]) -> None:
    from turnout.cli import plan_print as show
    from turnout.cli.console import table

    cost = document["bill"]
    price = cost["usd_per_device_hour"]
    rent = f"at ${price:g} a device-hour" if price else "the cluster has no price: --usd-per-device-hour"
    cells = [
        ["a step", show.dollars(cost["usd_per_step"]), rent],
        ["a million tokens", show.dollars(cost["usd_per_million_tokens"]), ""],
        [
            "network, to buy",
            show.dollars(cost["network_usd"]),
            f"{show.dollars(cost['network_usd_per_device'])} a device"
            if cost["network_usd_per_device"]
            else "the cluster has no price: network_usd_per_device",
        ],
    ]
    if cost["kilowatt"]:
        power = f"{show.short(cost['kilowatt'])} kW at the data sheets' power"
        cells.append(["energy of a token", f"{show.short(cost['joules_per_token'])} J", power])
    if cost["run_tokens"]:
        energy = f", {show.short(cost['run_mwh'])} MWh" if cost["run_mwh"] else ""
        run = f"{show.count(cost['run_tokens'])} tokens in {show.long_time(cost['run_s'])}{energy}"
        cells.append(["the run", show.dollars(cost["run_usd"]), run])
    screen.print()
    screen.print(table("The bill", {"of": "left", "cost": "right", "": "left"}, cells))


def _print_twins(screen: Any, document: dict[str, Any]) -> None:
    from turnout.cli import plan_print as show
    from turnout.cli.console import table

    rows = document["twins"]
    if not rows:
        return
    headings = show.columns(
        ("model",), ("parameters", "active", "step", "times", "peak GiB", "fits", "MB a token of a step")
    )
    cells = [
        [
            row["name"], show.count(row["total_params"]), show.count(row["active_params"]), show.seconds(row["step_s"]),
            f"{row['step_s'] / rows[0]['step_s']:.2f}", show.gib(row["peak_bytes"]), "yes" if row["fits"] else "no",
            show.short(row["bytes_per_token"] / 1e6),
        ]
        for row in rows
    ]  # fmt: skip
    screen.print()
    screen.print(table("Experts or not: the same devices, batch and layout", headings, cells))
    screen.print(f"  {_moe_verdict(rows, document['tokens_to_save'])}")


def _moe_verdict(rows: list[dict[str, Any]], tokens_to_save: float) -> str:
    """What experts must be worth; the planner knows no losses."""
    more = rows[0]["total_params"] / rows[1]["total_params"]
    slower = rows[0]["step_s"] / rows[1]["step_s"]
    if slower < 1.01:
        return f"experts cost no time here: {more:.1f} times the parameters at {slower:.2f} times the step"
    return (
        f"experts: {more:.1f} times the parameters for {slower:.2f} times the step; they pay if they reach the dense "
        f"model's loss with {tokens_to_save:.0%} fewer tokens"
    )


def _what_if_table(rows: tuple[Any, ...], base_s: float) -> Any:
    from turnout.cli import plan_print as show
    from turnout.cli.console import table

    headings = {"what if": "left", "step": "right", "saves": "right", "": "left"}
    cells = [["as asked", show.seconds(base_s), "", ""]]
    cells += [
        [row.change, show.seconds(row.step_s), show.percent(row.saved, signed=True), show.bar(max(0.0, row.saved), 20)]
        if row.step_s is not None
        else [row.change, "", "", f"does not apply: {row.why_not}"]
        for row in rows
    ]
    return table("What if one thing were different", headings, cells)
