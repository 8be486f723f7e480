"""`turnout train`: recipe in, run folder out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from turnout.cli import options
from turnout.cli.console import patient_console, print_json, table

_LIST = "--set \"model.moe.losses=[{name = 'load_balance', coefficient = 0.02}]\""

if TYPE_CHECKING:
    # at run time the command imports it: --help must not wait for torch
    from turnout.cli.training import Training


class _CommandWithFields(TyperCommand):
    """Help that ends with every field of a recipe: they are read from the dataclasses, so none is forgotten."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        from turnout.config import describe
        from turnout.train.recipe import Recipe

        rows = [[doc.path, doc.kind, doc.default, doc.text] for doc in describe(Recipe)]
        columns = {"type": "left", "default": "left", "meaning": "left"}
        settable, items = [row for row in rows if "[]" not in row[0]], [row for row in rows if "[]" in row[0]]
        Console().print(table("Fields of a recipe", {"field (--set field=value)": "left"} | columns, settable))
        Console().print(table(f"Items of a list, set with the whole of it: {_LIST}", {"item": "left"} | columns, items))


def add_to(app: typer.Typer) -> None:
    app.command(cls=_CommandWithFields, epilog=EPILOG)(train)


EPILOG = """Examples:

turnout train tiny

turnout train tiny --data novels/ --set loop.minutes=30 --out runs/novels

turnout train tiny --dry-run

turnout train --resume runs/novels

turnout train --resume runs/novels --set optimizer.lr=1e-3

torchrun --nproc-per-node 4 -m turnout train tiny --set strategy.ep=4
"""


def train(
    recipe: Annotated[
        str | None, typer.Argument(help="Built-in recipe (tiny, tiny-dense, smoke) or a TOML file.")
    ] = None,
    settings: options.Set = None,
    data: options.Data = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run folder; default runs/NAME-N.")] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="Go on with this run, bit for bit; --set as far as it may change.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Short for --set loop.steps=0 --set loop.minutes=M.")] = None,
    steps: Annotated[int | None, typer.Option(help="Short for --set loop.steps=N; not with --minutes.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would run and how long: sizes, FLOPs, memory, paths.")
    ] = False,
    threads: options.Threads = 0,
    as_json: options.Json = False,
) -> None:
    """Train a model by a recipe; the run folder holds recipe, tokenizer, metrics, trace, checkpoints, report."""
    from turnout.cli.process import own_process
    from turnout.cli.training import Training, place, recipe_for
    from turnout.comm import is_launched, join
    from turnout.errors import ConfigError
    from turnout.train.device import pick_device
    from turnout.train.tuned import with_strategy

    if steps and minutes is not None:
        raise ConfigError(f"--steps {steps} and --minutes {minutes} are two lengths of one run; leave one out")
    if dry_run and is_launched():
        raise ConfigError("--dry-run measures one process; start it without torchrun")
    short = [f"loop.steps={steps}"] if steps is not None else []
    short += [f"loop.minutes={minutes}", "loop.steps=0"] if minutes is not None else []
    overrides = [*options.recipe_overrides(settings, data), *short]
    chosen = recipe_for(recipe, resume, overrides)
    process = own_process(threads)
    on_cuda = pick_device(chosen.loop.device).type == "cuda"
    with join(cuda=on_cuda, timeout_s=chosen.loop.timeout_s) as world:
        placed = world.first(world.together(lambda: place(chosen.name, out, resume) if world.is_first else None))
        assert placed is not None
        run, goes_on = placed
        training = Training(
            recipe=with_strategy(chosen, world),
            run=run,
            screen=patient_console(as_json=as_json, quiet=not world.is_first),
            process=process,
            world=world,
        )
        if goes_on and resume is None:
            training.screen.print(f"  torchrun restarted this job: it goes on in {run}", soft_wrap=True)
        summary = _trained(training, resume=goes_on, dry_run=dry_run)
    if as_json and world.is_first:
        print_json(summary)
    if summary.get("stopped_by"):
        raise typer.Exit(128 + summary["stopped_by"])


def _trained(training: "Training", *, resume: bool, dry_run: bool) -> dict[str, Any]:
    """What is to be printed under --json."""
    training.check()
    training.print_banner()
    if dry_run:
        return training.facts() | training.print_outlook()
    return training.run_to_end(resume=resume)
