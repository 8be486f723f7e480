"""`turnout compare`: recipes on the same text with the same wall-clock budget."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from turnout.cli import options
from turnout.cli.console import patient_console, print_json, table


def add_to(app: typer.Typer) -> None:
    app.command(epilog="Example: turnout compare tiny tiny-dense --minutes 20 --seeds 2")(compare)


def compare(
    recipes: Annotated[list[str], typer.Argument(help="Recipes; the last one is the baseline.", show_default=False)],
    minutes: Annotated[float, typer.Option(help="Training minutes each recipe gets, evaluation not counted.")] = 20.0,
    steps: Annotated[int, typer.Option(help="Steps each recipe gets instead of minutes; 0: minutes.", min=0)] = 0,
    routers: Annotated[
        str, typer.Option(help="Each recipe with experts once with each of these routers (comma-separated, or all).")
    ] = "",
    seeds: Annotated[int, typer.Option(help="Number of seeds: 0, 1, ...", min=1)] = 1,
    first_seed: Annotated[int, typer.Option(help="The first seed.", min=0)] = 0,
    settings: options.Set = None,
    data: options.Data = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the runs; default runs/compare-N.")] = None,
    threads: options.Threads = 0,
    as_json: options.Json = False,
) -> None:
    """Train recipes in turns on one machine; table and plot by wall clock and by tokens."""
    from turnout.cache import default_cache
    from turnout.cli.process import own_process
    from turnout.cli.training import choose_run
    from turnout.data.prepare import prepare
    from turnout.errors import ConfigError
    from turnout.train.compare import check_comparable, verdicts
    from turnout.train.compare import compare as run_comparison
    from turnout.train.compare_plot import write_comparison
    from turnout.train.recipe import MOST_MINUTES
    from turnout.train.recipes import load_recipe
    from turnout.train.signals import StopRequest

    if not 0 < minutes <= MOST_MINUTES:
        raise ConfigError(f"--minutes {minutes} must be above 0 and at most {MOST_MINUTES:,} (ten years)")
    overrides = options.recipe_overrides(settings, data)
    chosen = _with_routers([load_recipe(name, overrides) for name in recipes], routers)
    check_comparable(chosen)
    baseline = chosen[-1].name
    folder = choose_run("compare", out, None)
    screen = patient_console(as_json=as_json)
    screen.print(
        f"  {own_process(threads)}; {_budget(minutes, steps)} each, seeds {first_seed}..{first_seed + seeds - 1}"
    )
    with StopRequest() as stop:
        dataset = prepare(chosen[0].data, default_cache(), say=lambda line: screen.print(f"  {line}", style="dim"))
        curves = run_comparison(
            chosen,
            dataset,
            folder,
            minutes=minutes,
            steps=steps,
            seeds=range(first_seed, first_seed + seeds),
            stop=stop,
            say=lambda line: screen.print(f"  {line}"),
            on_seed=lambda so_far: write_comparison(so_far, folder, baseline) if so_far else None,
        )
    if not curves:
        screen.print(f"stopped before every recipe had its first turn; the runs in {folder} are saved")
        if as_json:
            print_json({"rows": [], "verdicts": [], "out": str(folder)})
        raise typer.Exit(128 + int(stop.received or 0))
    path = write_comparison(curves, folder, baseline)
    _print(screen, curves, path, baseline, "number of steps" if steps else "wall clock")
    if as_json:
        judged = [asdict(v) for v in verdicts(curves, baseline)]
        print_json({"rows": _rows(curves), "verdicts": judged, "baseline": baseline, "out": str(path)})
    if stop.received:
        raise typer.Exit(128 + int(stop.received))


def _budget(minutes: float, steps: int) -> str:
    return f"{steps} steps" if steps else f"{minutes:g} minutes"


def _with_routers(recipes: list[Any], routers: str) -> list[Any]:
    from turnout.contracts import RouterConfig
    from turnout.train.variants import with_routers

    if not routers:
        return recipes
    names = RouterConfig.TABLE.names() if routers == "all" else [name.strip() for name in routers.split(",")]
    return [
        variant
        for recipe in recipes
        for variant in ([recipe] if recipe.model.moe is None else with_routers(recipe, names))
    ]


def _print(screen: Any, curves: list[Any], path: Path, baseline: str, budget: str) -> None:
    from turnout.train.compare import verdicts

    columns = {"recipe": "left", "seed": "right", "minutes": "right", "tokens": "right", "tokens/s": "right"}
    columns |= {"CPU": "right"}
    columns |= {"val loss": "right", "params": "right", "active": "right", "MFLOP": "right"}
    cells = [
        [
            c.recipe,
            str(c.seed),
            f"{c.seconds[-1] / 60:.1f}{'' if c.complete else ' cut'}",
            f"{c.tokens[-1] / 1e6:.2f} M",
            f"{c.tokens_per_s:,.0f}",
            "" if c.cpu_share is None else f"{c.cpu_share:.0%}",
            f"{c.val_loss[-1]:.4f}",
            f"{c.params_total / 1e6:.2f} M",
            f"{c.params_active / 1e6:.2f} M",
            f"{c.train_flops_per_token / 1e6:.2f}",
        ]
        for c in curves
    ]
    title = f"Same text, same {budget}; CPU: time it got of what its threads asked for; MFLOP of training a token"
    screen.print(table(title if all(c.complete for c in curves) else f"{title}; cut: stopped early", columns, cells))
    _print_routing(screen, curves)
    if not any(c.recipe == baseline for c in curves):
        screen.print(f"no verdict: the baseline {baseline} ended before its first evaluation")
    for v in verdicts(curves, baseline):
        reached = "does not reach its final loss" if v.time_ratio is None else f"needs {v.time_ratio:.2f} of its time"
        ahead = (
            "never ahead for good in this run"
            if v.ahead_from_s is None
            else f"ahead for good from minute {v.ahead_from_s / 60:.1f} of this run"
        )
        better = "worse" if v.margin < 0 else "better"
        screen.print(f"{v.recipe} against {v.baseline}: {abs(v.margin):.4f} nats {better}, {reached}, {ahead}")
    screen.print(f"wrote {path}")


def _print_routing(screen: Any, curves: list[Any]) -> None:
    routed = [c for c in curves if c.routing is not None]
    if not routed:
        return
    columns = {"recipe": "left", "seed": "right", "experts a token": "right", "dropped": "right", "left out": "right"}
    columns |= {"worst load": "right", "undecided": "right", "told by id": "right", "bytes a token": "right"}
    cells = [
        [
            c.recipe,
            str(c.seed),
            f"{c.routing.experts_per_token:.2f}",
            f"{c.dropped_share:.1%}",
            f"{c.declined_share:.1%}",
            f"{c.routing.max_violation:+.0%}",
            f"{c.router_entropy:.2f}",
            f"{c.routing.specialisation:.2f}",
            f"{c.routing.sent_bytes_per_token:,.0f}",
        ]
        for c in routed
    ]
    screen.print(table("Routing; bytes a layer would send between 8 ranks, there and back", columns, cells))


def _rows(curves: list[Any]) -> list[dict[str, Any]]:
    from turnout.train.compare import seconds_to

    final = {(c.recipe, c.seed): c.val_loss[-1] for c in curves}
    names = list(dict.fromkeys(c.recipe for c in curves))
    return [
        {
            "recipe": c.recipe,
            "seed": c.seed,
            "minutes": c.seconds[-1] / 60,
            "tokens": c.tokens[-1],
            "val_loss": c.val_loss[-1],
            "complete": c.complete,
            "tokens_per_s": c.tokens_per_s,
            "cpu_share": c.cpu_share,
            "train_flops_per_token": c.train_flops_per_token,
            "dropped_share": c.dropped_share,
            "declined_share": c.declined_share,
            "max_violation": c.max_violation,
            "router_entropy": c.router_entropy,
            "routing": None if c.routing is None else vars(c.routing),
            "seconds_to_loss_of": {
                name: seconds_to(c, final[name, c.seed])
                for name in names
                if name != c.recipe and (name, c.seed) in final
            },
            "curve": {"seconds": c.seconds, "tokens": c.tokens, "val_loss": c.val_loss},
        }
        for c in curves
    ]
