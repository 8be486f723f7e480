"""What `train` shows and does around the loop: banner, progress, final words."""

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from turnout.cache import default_cache
from turnout.comm import Watch, World, is_launched
from turnout.comm.elastic import begun_run, remember_run
from turnout.config import to_dict
from turnout.data.prepare import Dataset, is_prepared, prepare
from turnout.errors import CheckpointError, ConfigError
from turnout.observe.report import write_report
from turnout.observe.sinks import require_sinks
from turnout.train.agreement import require_free
from turnout.train.banner import Fact, banner
from turnout.train.device import pick_device
from turnout.train.estimate import estimate_time, require_fits
from turnout.train.loop import Trainer
from turnout.train.progress import Progress as StepProgress
from turnout.train.recipe import Recipe, check_ranks
from turnout.train.recipes import load_recipe, recipe_of
from turnout.train.resume import changed_settings
from turnout.train.signals import StopRequest


@dataclass(frozen=True, kw_only=True)
class Training:
    """One `turnout train`."""

    recipe: Recipe
    run: Path
    screen: Console
    process: str  # what the process was told about threads and memory
    world: World = World()  # the processes that train together

    @cached_property
    def _banner(self) -> list[Fact]:
        # counts a model on the meta device: once is enough
        return banner(self.recipe, self.world)

    def check(self) -> None:
        """Raises: ConfigError if the recipe cannot run on these ranks."""
        try:
            check_ranks(self.recipe, self.world.size)
        except ConfigError as error:
            if not str(error).startswith("strategy."):
                raise
            there = "this one process" if self.world.size == 1 else f"the {self.world.size} ranks there are"
            raise ConfigError(f"{error}; or --set strategy=auto, a layout for {there}") from error

    def facts(self) -> dict[str, Any]:
        """The banner as data."""
        return {fact.name: fact.value for fact in self._banner}

    def print_banner(self) -> None:
        for fact in self._banner:
            self._line(fact.name, fact.text, alarming=fact.alarming)
        self._line("process", self.process)

    def print_outlook(self) -> dict[str, Any]:
        """For a dry run: is the text at hand, does the model fit, how long will it take; the same as data.

        Raises: ConfigError or DataError, as the run would, if the text or the tokenizer cannot be used.
        """
        ready = is_prepared(self.recipe.data, default_cache())
        self._line("text", "prepared" if ready else "not prepared yet: fetched, read and encoded when the run starts")
        time = estimate_time(self.recipe, pick_device(self.recipe.loop.device))
        self._line("time", time.reason, alarming=not time.fits)
        return {"data_prepared": ready, **vars(time)}

    def _line(self, name: str, text: str, *, alarming: bool = False) -> None:
        width = max(len(fact.name) for fact in self._banner)
        line = Text.assemble((f"  {name:>{width}}  ", "dim"), (text, "bold yellow" if alarming else ""))
        self.screen.print(line, soft_wrap=True)

    def _note(self, text: str) -> None:
        self.screen.print(Text.assemble("  ", ("note: ", "yellow"), text), soft_wrap=True)

    def run_to_end(self, *, resume: bool) -> dict[str, Any]:
        """Prepare, train, finish, report; the summary. A signal at any point leaves a checkpoint.

        Raises: ConfigError, before anything is read or made, if the model does not fit in memory.
        """
        self.world.together(self._require_room)
        with StopRequest() as stop:
            dataset = self._dataset()
            for note in dataset.notes:
                self._note(note)
            trainer = Trainer(self.recipe, dataset, self.run, resume=resume, world=self.world)
            for note in trainer.notes:
                self._note(note)
            watch = Watch(self.world, trainer.parallel.ledger, _say_at_once)
            with watch, _Display(self.screen) as display:
                outcome = trainer.train(stop, on_step=display.show)
            if outcome == "stopped":
                trainer.close()
                self._require_saved(trainer)
                self.screen.print(f"stopped and saved; go on with: turnout train --resume {self.run}")
                return {**trainer.summary(), "stopped_by": trainer.stopped_by}
            summary = trainer.finish()
            self._require_saved(trainer)
        if not self.world.is_first:
            return summary
        report = write_report(self.run, self.run / "report.html")
        self.screen.print(_last_words(summary, report), soft_wrap=True)
        return summary

    def _require_room(self) -> None:
        require_fits(self.recipe, pick_device(self.recipe.loop.device), self.world)
        require_sinks(self.recipe.loop.sinks)

    def _dataset(self) -> Dataset:
        """The text; one rank of a node reads and encodes it, the others find it done."""
        goes_first = self.world.rank % self.world.local_size == 0
        early = self.world.together(lambda: self._prepared() if goes_first else None)
        return self.world.together(lambda: early or self._prepared())

    def _prepared(self) -> Dataset:
        return prepare(self.recipe.data, default_cache(), say=self._say)

    def _say(self, line: str) -> None:
        self.screen.print(f"  {line}", style="dim")

    def _require_saved(self, trainer: Trainer) -> None:
        """Raises: CheckpointError if the last save failed: what is not on disk is not called saved."""
        if trainer.unsaved is not None:
            raise CheckpointError(f"the end of the run is not saved: {trainer.unsaved}")


class _Display:
    """A live bar on a terminal; elsewhere one line every `EVERY_S` seconds of training."""

    EVERY_S = 20.0

    def __init__(self, screen: Console) -> None:
        self._screen = screen
        self._printed_s = 0.0
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=screen, transient=True) if screen.is_terminal else None
        self._task = self._bar.add_task("training", total=1.0) if self._bar else None

    def __enter__(self) -> "_Display":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, progress: StepProgress) -> None:
        for text in progress.news:
            self._screen.print(Text.assemble("  ", (f"step {progress.step}: ", "yellow"), text), soft_wrap=True)
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=progress.done, description=_words(progress))
        elif progress.seconds - self._printed_s >= self.EVERY_S or progress.step == 1:
            self._printed_s = progress.seconds
            self._screen.print(f"  {progress.done:4.0%}  {_words(progress)}", soft_wrap=True)


def _say_at_once(text: str) -> None:
    """From any rank: who waits is not always the one whose screen is shown, and nobody has to read it."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _words(progress: StepProgress) -> str:
    line = progress.line
    parts = [f"step {progress.step}", f"loss {line.get('loss', float('nan')):.3f}"]
    parts += [f"val {progress.val_loss:.3f}"] if progress.val_loss is not None else []
    parts += [f"{progress.tokens_per_s:,.0f} tokens/s"]
    if "max_violation" in line:
        parts += [f"worst load +{line['max_violation']:.0%}", f"dropped {line['dropped_share']:.1%}"]
    return "  ".join(parts)


def _last_words(summary: dict[str, Any], report: Path) -> str:
    val_loss = "not finite" if summary["val_loss"] is None else f"{summary['val_loss']:.4f}"
    return (
        f"  trained {summary['steps']} steps, {summary['tokens']:,} tokens in {summary['seconds'] / 60:.1f} minutes "
        f"({summary['tokens_per_s']:,.0f} tokens/s); validation loss {val_loss}\n"
        f"  run     {summary['run']}\n  report  {report}\n  talk    turnout chat {summary['run']}"
    )


def recipe_for(name: str | None, resume: Path | None, overrides: Sequence[str]) -> Recipe:
    """The recipe by name or file, or the one of the run to resume.

    Raises: ConfigError if neither or both are given, or a resumed run is to change in what it keeps to its end.
    """
    if resume is None:
        if name is None:
            raise ConfigError("give a recipe: a built-in name such as tiny, or a TOML file; or --resume RUN")
        return load_recipe(name, overrides)
    if name is not None:
        raise ConfigError(f"--resume {resume} goes on with the run's own recipe; leave out {name}, or start a new run")
    own = recipe_of(resume)
    recipe = load_recipe(str(resume / "recipe.toml"), overrides)
    # the run's checkpoint is asked again; here nothing has been read yet
    changed_settings(to_dict(own), recipe)
    return recipe


def place(name: str, out: Path | None, resume: Path | None) -> tuple[Path, bool]:
    """The folder of the run, and whether it goes on there: also where torchrun restarted a job that began it.

    Raises: ConfigError as `choose_run` does, or if a new run would write over another.
    """
    begun = begun_run()
    if begun is not None:
        # a run that ended before it had a recipe left nothing to go on from
        return Path(begun), (Path(begun) / "recipe.toml").exists()
    run = choose_run(name, out, resume)
    if is_launched():
        if resume is None:
            require_free(run)
        remember_run(str(run))
    return run, resume is not None


def choose_run(name: str, out: Path | None, resume: Path | None) -> Path:
    """The folder given, or the first free runs/NAME-N.

    Raises: ConfigError if a run is to be resumed in another folder.
    """
    if resume is not None and out is not None:
        raise ConfigError(f"--resume {resume} goes on in that folder; leave out --out {out}, or resume a copy of it")
    if resume is not None:
        return resume
    if out is not None:
        return out
    number = 1
    while (run := Path("runs") / f"{name}-{number}").exists():
        number += 1
    return run
