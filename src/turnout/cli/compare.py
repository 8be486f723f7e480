"""`turnout compare`: recipes on the same text with the same wall-clock budget."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from turnout.cli import options
from turnout.cli.compare_print import print_comparison, print_setups, rows_of
from turnout.cli.console import patient_console, print_json


def add_to(app: typer.Typer) -> None:
    app.command(epilog="Example: turnout compare tiny tiny-dense --minutes 20 --seeds 2")(compare)


def compare(
    recipes: Annotated[list[str], typer.Argument(help="Recipes; the last one is the baseline.", show_default=False)],
    minutes: Annotated[float, typer.Option(help="Training minutes each recipe gets, evaluation not counted.")] = 20.0,
    steps: Annotated[int, typer.Option(help="Steps each recipe gets instead of minutes; 0: minutes.", min=0)] = 0,
    routers: Annotated[
        str,
        typer.Option(
            help="Each recipe with experts once with each of these routers (comma-separated, or all), with its paper's "
            "losses unless --set model.moe.losses names others, or the recipe does."
        ),
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
    from turnout.train.compare import check_comparable
    from turnout.train.compare import compare as run_comparison
    from turnout.train.compare_plot import write_comparison
    from turnout.train.recipe import MOST_MINUTES
    from turnout.train.signals import StopRequest
    from turnout.train.verdicts import verdicts

    if not 0 < minutes <= MOST_MINUTES:
        raise ConfigError(f"--minutes {minutes} must be above 0 and at most {MOST_MINUTES:,} (ten years)")
    overrides = options.recipe_overrides(settings, data)
    screen = patient_console(as_json=as_json)
    variants = [variant for name in recipes for variant in _variants(name, overrides, routers, screen)]
    chosen = [variant.recipe for variant in variants]
    check_comparable(chosen)
    baseline = chosen[-1].name
    folder = choose_run("compare", out, None)
    screen.print(
        f"  {own_process(threads)}; {_budget(minutes, steps)} each, seeds {first_seed}..{first_seed + seeds - 1}"
    )
    print_setups(screen, variants)
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
    print_comparison(screen, curves, path, baseline, "number of steps" if steps else "wall clock")
    if as_json:
        judged = [asdict(v) for v in verdicts(curves, baseline)]
        notes = {variant.recipe.name: variant.notes for variant in variants if variant.notes}
        ends = {"verdicts": judged, "baseline": baseline, "notes": notes, "out": str(path)}
        print_json({"rows": rows_of(curves), **ends})
    if stop.received:
        raise typer.Exit(128 + int(stop.received))


def _budget(minutes: float, steps: int) -> str:
    return f"{steps} steps" if steps else f"{minutes:g} minutes"


def _variants(name: str, overrides: list[str], routers: str, screen: Console) -> list[Any]:
    """The recipe, or, if it has experts, the recipe with each of the routers; of all those that fit its sizes."""
    from turnout.contracts import RouterConfig
    from turnout.train.compared_losses import asked_losses
    from turnout.train.recipes import load_recipe
    from turnout.train.variants import Variant, why_not, with_routers

    recipe = load_recipe(name, overrides)
    if not routers or recipe.model.moe is None:
        return [Variant(recipe=recipe, notes=())]
    if routers != "all":
        names = [router.strip() for router in routers.split(",")]
        return with_routers(recipe, names, asked_losses(name, overrides))
    variants = with_routers(recipe, RouterConfig.TABLE.names(), asked_losses(name, overrides))
    reasons = [why_not(variant.recipe) for variant in variants]
    for variant, reason in zip(variants, reasons, strict=True):
        if reason:
            screen.print(f"  left out: {variant.recipe.name}: {reason}", style="yellow")
    return [variant for variant, reason in zip(variants, reasons, strict=True) if not reason]
