"""`turnout bench CASE`: gated measurements against named peers."""

from collections.abc import Iterable
from typing import Annotated, Any

import typer

from turnout.cli import (
    bench_alltoall,
    bench_copies,
    bench_dispatch,
    bench_generate,
    bench_overlap,
    bench_train_ranks,
    bench_tuner,
    options,
)
from turnout.cli.bench_base import Base, Turns, compare_with, own_of
from turnout.cli.console import console, measured_on, number, print_json, table

bench = typer.Typer(
    help="Gated benchmarks against named peers: ratios from one run.",
    no_args_is_help=True,
    epilog="Example: turnout bench train-step --rounds 5",
)

Rounds = Annotated[int, typer.Option(help="Timed rounds.", min=1)]
Warmup = Annotated[int, typer.Option(help="Rounds before them, which are not counted.", min=0)]


def add_to(app: typer.Typer) -> None:
    app.add_typer(bench, name="bench")


bench.command("alltoall", epilog=bench_alltoall.EXAMPLES)(bench_alltoall.alltoall)
bench.command("copies", epilog=bench_copies.EXAMPLES)(bench_copies.copies)
bench.command("dispatch", epilog=bench_dispatch.EXAMPLES)(bench_dispatch.dispatch)
bench.command("generate", epilog=bench_generate.EXAMPLES)(bench_generate.generate)
bench.command("overlap", epilog=bench_overlap.EXAMPLES)(bench_overlap.overlap)
bench.command("tuner", epilog=bench_tuner.EXAMPLES)(bench_tuner.tuner)
bench.command("train-ranks", epilog=bench_train_ranks.EXAMPLES)(bench_train_ranks.train_ranks)


@bench.command("train-step", epilog="Example: turnout bench train-step --json")
def train_step(
    context: typer.Context,
    recipe: Annotated[str, typer.Option(help="Recipe whose model is measured.")] = "tiny",
    dense: Annotated[str, typer.Option(help="Its dense twin.")] = "tiny-dense",
    rounds: Rounds = 20,
    warmup: Warmup = 3,
    peers: Annotated[str, typer.Option(help="Comma-separated peers; empty: all.")] = "",
    memory: Annotated[bool, typer.Option(help="Also measure peak memory, in processes of their own.")] = True,
    split: Annotated[bool, typer.Option(help="Also say where the time of a step goes.")] = True,
    base: Base = "",
    turns: Turns = 3,
    threads: options.Threads = 0,
    as_json: options.Json = False,
) -> None:
    """A training step against transformers' Mixtral of the same shape, the dense twin and the bare products."""
    from turnout.bench.train_step import LIKE, OURS, run
    from turnout.cli.process import own_process
    from turnout.train.recipes import load_recipe

    if base:
        own = own_of(options.words(peers), (OURS, LIKE))
        compare_with(context, instead=[{"--peers": own}], also=["--no-memory", "--no-split"])
        return
    process = own_process(threads)
    chosen = load_recipe(recipe)
    result = run(
        chosen, load_recipe(dense), peers=options.words(peers), rounds=rounds, warmup=warmup, memory=memory, split=split
    )
    screen = console(as_json=as_json)
    screen.print(measured_on(process, result))
    screen.print(_times(f"Training step of {chosen.name}: everybody in turns in one process", result["rows"]))
    screen.print(_ratios(result["rows"]))
    if split:
        screen.print(_splits(result["rows"]))
    for line in _remarks(result):
        screen.print(f"  {line}")
    if as_json:
        print_json(result)


@bench.command("routers", epilog="Example: turnout bench routers --shapes a --routers topk,sinkhorn,soft_moe")
def routers(
    context: typer.Context,
    shapes: Annotated[
        str, typer.Option(help="Comma-separated shapes: a, b, c; the next options change them.")
    ] = "a,b,c",
    tokens: Annotated[int, typer.Option(help="Tokens of a call; 0: the shape's.", min=0)] = 0,
    dim: Annotated[int, typer.Option(help="Width; 0: the shape's.", min=0)] = 0,
    hidden: Annotated[int, typer.Option(help="Hidden width of an expert; 0: the shape's.", min=0)] = 0,
    experts: Annotated[int, typer.Option(help="Experts; 0: the shape's.", min=0)] = 0,
    k: Annotated[int, typer.Option(help="Choices of a token; 0: the shape's.", min=0)] = 0,
    seq_len: Annotated[int, typer.Option(help="Tokens of a sequence; 0: the shape's.", min=0)] = 0,
    only: Annotated[str, typer.Option("--routers", help="Comma-separated routers; empty: all, and soft_moe.")] = "",
    rounds: Rounds = 20,
    warmup: Warmup = 3,
    base: Base = "",
    turns: Turns = 3,
    threads: options.Threads = 0,
    as_json: options.Json = False,
) -> None:
    """A layer with each router, forward and backward in training, against softmax top-k of as many choices."""
    from turnout.bench.routers import run
    from turnout.cli.process import own_process

    changes = {"tokens": tokens, "dim": dim, "hidden": hidden, "experts": experts, "k": k, "seq_len": seq_len}
    chosen = _shapes(options.words(shapes), {name: value for name, value in changes.items() if value})
    if base:
        compare_with(context, is_own=lambda _: True)
        return
    process = own_process(threads)
    result = run(chosen, names=options.words(only), rounds=rounds, warmup=warmup)
    screen = console(as_json=as_json)
    screen.print(measured_on(process, result))
    for shape in chosen:
        rows = _of_shape(result["rows"], shape)
        screen.print(_router_times(f"Layer {shape}, forward and backward; experts: of a token", rows))
        looking_ahead = ", ".join(row["peer"] for row in rows if not row["causal"])
        if looking_ahead:
            screen.print(f"  not for decoders, since they see later tokens: {looking_ahead}")
        for refused in _of_shape(result["not_built"], shape):
            screen.print(f"  {refused['peer']} is not measured: {refused['reason']}")
    if as_json:
        print_json(result)


@bench.command("layer", epilog="Example: turnout bench layer --shapes a,c --modes train --threads 2 --json")
def layer(
    context: typer.Context,
    shapes: Annotated[str, typer.Option(help="Comma-separated shapes: a, b, c, d1, d2, d4, d8, d16.")] = "a,b,c",
    modes: Annotated[str, typer.Option(help="Comma-separated: forward, train (forward and backward).")] = (
        "forward,train"
    ),
    peers: Annotated[str, typer.Option(help="Comma-separated peers; empty: all.")] = "",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16: of weights and tokens.")] = "float32",
    skew: Annotated[float, typer.Option(help="One expert at so many times the mean load; 0: routers decide.")] = 0.0,
    rounds: Rounds = 20,
    warmup: Warmup = 3,
    memory: Annotated[bool, typer.Option(help="Also measure peak memory, in processes of their own.")] = False,
    base: Base = "",
    turns: Turns = 3,
    threads: options.Threads = 0,
    allocator: Annotated[str, typer.Option(help="tuned: freed memory is kept; default: the allocator as it is.")] = (
        "tuned"
    ),
    as_json: options.Json = False,
) -> None:
    """One MoE layer against other systems', a dense network of the same FLOPs and the bare products."""
    from turnout.bench.layer import own_cases, run
    from turnout.cli.process import own_process

    if base:
        own = own_cases(options.words(shapes), modes=options.words(modes), peers=options.words(peers), dtype=dtype)
        compare_with(context, instead=own, also=["--no-memory"])
        return

    process = own_process(threads, allocator)
    result = run(
        options.words(shapes),
        modes=options.words(modes),
        peers=options.words(peers),
        dtype=dtype,
        skew=skew,
        rounds=rounds,
        warmup=warmup,
        memory=memory,
    )
    screen = console(as_json=as_json)
    screen.print(measured_on(process, result))
    for name, mode in dict.fromkeys((row["shape"]["name"], row["mode"]) for row in result["rows"]):
        rows = [row for row in result["rows"] if (row["shape"]["name"], row["mode"]) == (name, mode)]
        screen.print(_layer_times(f"Layer {name}, {mode}, {dtype}: everybody in turns in one process", rows))
    for line in _not_alike(result):
        screen.print(f"  {line}")
    if as_json:
        print_json(result | {"process": process})


def _not_alike(result: dict[str, Any]) -> list[str]:
    """What differs, and who was left out and why, a line for each peer and text."""
    differ = dict.fromkeys((row["peer"], text) for row in result["rows"] for text in row["differences"])
    where: dict[tuple[str, str], dict[str, None]] = {}
    for one in result["left_out"]:
        where.setdefault((one["peer"], one["reason"]), {})[one["shape"]] = None
    left_out = [f"{peer} is not measured in {', '.join(at)}: {why}" for (peer, why), at in where.items()]
    return [*(f"not alike: {peer} {text}" for peer, text in differ), *left_out]


def _shapes(names: tuple[str, ...], changes: dict[str, int]) -> list[Any]:
    from dataclasses import replace

    from turnout.bench.routers import SHAPES
    from turnout.errors import ConfigError

    for name in names or [""]:
        if name not in SHAPES:
            raise ConfigError(f"unknown shape {name!r}; available: {', '.join(SHAPES)}")
    # shapes may become one by what is changed
    return list(dict.fromkeys(replace(SHAPES[name], **changes) for name in names))


def _of_shape(found: list[dict[str, Any]], shape: Any) -> list[dict[str, Any]]:
    return [one for one in found if one["shape"] == vars(shape)]


def _times(title: str, rows: list[dict[str, Any]]) -> Any:
    columns = {"peer": "left", "median ms": "right", "min": "right", "max": "right"}
    columns |= {"tokens/s": "right", "peak MiB": "right"}
    cells = [[*_ms(row), f"{row['tokens_per_s']:,.0f}", number(row["peak_mib"], ".0f")] for row in rows]
    return table(title, columns, cells)


def _ratios(rows: list[dict[str, Any]]) -> Any:
    columns = {
        "peer": "left",
        "turnout is": "right",
        "so routed it is": "right",
        "of dense": "right",
        "of limit": "right",
    }
    cells = [
        [
            row["peer"],
            _spread(row, "speedup_of_turnout"),
            _spread(row, "speedup_of_turnout_mixtral_routing"),
            number(row["ratio_to_dense"], ".2f"),
            number(row["ratio_to_limit"], ".2f"),
        ]
        for row in rows
    ]
    return table("How many times as fast: median over rounds (quartiles)", columns, cells)


def _remarks(result: dict[str, Any]) -> list[str]:
    """What differs, once for all of transformers' rows, and what was not measured."""
    ours = [row for row in result["rows"] if row["peer"].startswith("turnout")]
    routed = [f"{row['peer']} routes by {row['routing']}" for row in ours]
    differ = dict.fromkeys(text for row in result["rows"] for text in row["differences"])
    so = ["so routed: turnout-mixtral-routing, which does alike what transformers does"] if len(ours) > 1 else []
    return [*routed, *so, *(f"not alike: {text}" for text in differ), *(f"note: {text}" for text in result["notes"])]


def _router_times(title: str, rows: list[dict[str, Any]]) -> Any:
    columns = {"router": "left", "median ms": "right", "min": "right", "max": "right"}
    columns |= {"experts": "right", "time over": "right", "": "left"}
    cells = [
        [*_ms(row), f"{row['experts_per_token']:.2f}", _spread(row, "time_over_topk"), row["compared_with"]]
        for row in rows
    ]
    return table(title, columns, cells)


def _splits(rows: list[dict[str, Any]]) -> Any:
    """A column for each peer, since parts are many."""
    found = [row for row in rows if row["split"] is not None]
    parts = list(found[0]["split"]) if found else []
    cells = [[part, *(f"{100 * row['split'][part]:.0f}" for row in found)] for part in parts]
    # names are long, too
    peers = [row["peer"].replace("-", "-\n", 1) for row in found]
    return table("Where a step's time goes: percent", _columns("part", peers), cells)


def _layer_times(title: str, rows: list[dict[str, Any]]) -> Any:
    """Times, ratios and what memory was measured: side by side they would not fit a terminal."""
    from rich.console import Group

    rows = sorted(rows, key=lambda row: row["ms_median"])
    columns = {"peer": "left", "median ms": "right", "min": "right", "max": "right", "over fused_cpu": "right"}
    tables = [table(title, columns, [[*_ms(row), _over(row["speedup_of"].get("turnout-fused_cpu"))] for row in rows])]
    ratios = {f"of {name}": f"ratio_to_{name}" for name in ("dense", "limit", "reading")}
    ratios = {heading: key for heading, key in ratios.items() if any(row[key] is not None for row in rows)}
    if ratios:
        cells = [[row["peer"], *(_spread(row, key) for key in ratios.values())] for row in rows]
        tables.append(
            table("Time of these over each one's: median over rounds (quartiles)", _columns("peer", ratios), cells)
        )
    memory = {"peak": "peak_mib", "extra": "extra_mib", "again": "extra_again_mib"}
    if any(row["peak_mib"] is not None for row in rows):
        cells = [[row["peer"], *(number(row[key], ".0f") for key in memory.values())] for row in rows]
        tables.append(table("Memory, MiB", _columns("peer", memory), cells))
    return Group(*tables)


def _columns(first: str, others: Iterable[str]) -> dict[str, str]:
    return {first: "left", **dict.fromkeys(others, "right")}


def _ms(row: dict[str, Any]) -> list[str]:
    return [row["peer"], *(f"{row[name]:.1f}" for name in ("ms_median", "ms_min", "ms_max"))]


def _spread(row: dict[str, Any], name: str) -> str:
    if row[name] is None:
        return ""
    return _over((row[name], *row[f"{name}_quartiles"]))


def _over(ratio: tuple[float, float, float] | None) -> str:
    return "" if ratio is None else "{:.2f} ({:.2f}-{:.2f})".format(*ratio)
