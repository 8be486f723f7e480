"""The training loop: setup, steps, evaluation, checkpoints; it stops at a step boundary and resumes bit for bit."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from turnout.config import dump_toml, to_dict
from turnout.contracts import Router
from turnout.data.prepare import Dataset
from turnout.data.sampler import Sampler, count_windows, validation_batches
from turnout.errors import CheckpointError, ConfigError, NonFiniteError
from turnout.models import Decoder
from turnout.models.size import sizes
from turnout.observe.metrics import METRICS_NAME
from turnout.observe.recorder import Recorder
from turnout.observe.spikes import SpikeRule, is_spike
from turnout.observe.token_view import token_choices
from turnout.train import checkpoint
from turnout.train.device import autocast_for, compute_dtype, pick_device
from turnout.train.durable import replace_text
from turnout.train.optimizer import build_optimizer, lr_factor, set_lr
from turnout.train.recipe import Recipe
from turnout.train.recipes import recipe_of
from turnout.train.resume import changed_settings
from turnout.train.run_lock import RunLock
from turnout.train.signals import StopRequest
from turnout.train.state import RunState
from turnout.train.step import StepResult, train_step

Outcome = Literal["done", "stopped", "paused"]
SPIKE = SpikeRule()


@dataclass(kw_only=True)
class Counters:
    """Where a run stands; plain values, saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # training clock: steps alone, without evaluation and saving
    train_loss: float | None = None  # main loss, smoothed over about 20 steps
    val_loss: float | None = None
    evaluated_at: int = -1  # step of the last evaluation
    skipped_in_a_row: int = 0
    losses: list[float] = field(default_factory=list)  # what the spike rule looks back on


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a display needs after each step."""

    step: int
    done: float  # share of the run, 0 to 1
    seconds: float  # training clock
    tokens_per_s: float
    val_loss: float | None
    line: dict[str, Any]  # the step's record: loss, balance, drops
    news: tuple[str, ...]  # spikes, steps left out, checkpoints that failed, since the step before


class Trainer:
    """One run. Owns the model, the optimizer, the sampler and the clock; the run's folder holds all of it."""

    def __init__(self, recipe: Recipe, dataset: Dataset, run: Path, *, resume: bool = False) -> None:
        """Raises: ConfigError if the folder holds another run, or a writer, or the resumed one cannot change so;
        DataError if the data does not fit; CheckpointError.
        """
        dataset.tokenizer.require_fits(recipe.model.vocab_size)
        self.recipe, self.dataset, self.run = recipe, dataset, run
        loop = recipe.loop
        self.device = pick_device(loop.device)
        torch.manual_seed(recipe.seed)
        self.model = Decoder(recipe.model).to(self.device)
        self.optimizer = build_optimizer(self.model, recipe.optimizer)
        count_windows(dataset.val, loop.seq_len)  # refuses too short a validation text before anything is trained
        self.sampler = Sampler(dataset.train, loop.batch_size, loop.seq_len, recipe.seed)
        self.autocast = autocast_for(self.device, compute_dtype(self.device, loop.precision))
        self.counters = Counters()
        self.notes: tuple[str, ...] = ()  # what a person should know of a resume
        self.unsaved: str | None = None  # why the last checkpoint could not be written
        self.line: dict[str, Any] = {}  # record of the last step
        self._news: list[str] = []
        if not resume:
            _require_free(run)
        self._lock = RunLock(run)
        begins = not (resume and checkpoint.exists(run))
        changes: tuple[str, ...] = ()
        if begins:
            self._show_text_to_routers()
            self.notes += (f"{run} ended before its first checkpoint: it starts again",) if resume else ()
        else:
            changes = self._resume()
        self.recorder = self._open_recorder(resume=resume, begins=begins)
        for change in changes:
            self._tell(f"resumed with {change}")
        self._loss = torch.compile(self.model.loss) if loop.compile else self.model.loss

    @property
    def done(self) -> float:
        """Share of the run, by steps or by the training clock."""
        loop = self.recipe.loop
        share = self.counters.step / loop.steps if loop.steps else self.counters.seconds / (60 * loop.minutes)
        return min(1.0, share)

    def train(
        self,
        stop: StopRequest,
        *,
        on_step: Callable[[Progress], None] = lambda _: None,
        pause_at: float = math.inf,
    ) -> Outcome:
        """Steps until the run is done, a signal asks to stop, or the share `pause_at` of the run is done.

        A stop saves first.
        Raises: NonFiniteError by policy, after saving what is still good.
        """
        while True:
            if stop.requested:
                self.save()
                return "stopped"
            if self.done >= 1:
                return "done"
            if self.done >= pause_at:
                return "paused"
            if self._owes_evaluation():
                self.evaluate_and_record(stop)
                continue
            on_step(self._one_step())
            if stop.save_requested() or self._owes_checkpoint():
                self.save()

    def evaluate(self, stop: StopRequest | None = None) -> float | None:
        """Mean validation loss over the recipe's eval_tokens: the same text for every model.

        A stop request ends it early; there is no result then.
        """
        loop = self.recipe.loop
        total, count = 0.0, 0
        self.model.eval()
        with torch.inference_mode(), self.autocast:
            for batch in validation_batches(self.dataset.val, loop.batch_size, loop.seq_len, loop.eval_tokens):
                if stop is not None and stop.requested:
                    count = 0
                    break
                batch = batch.to(self.device)
                total += self.model.loss(batch.tokens_BS, batch.targets_BS).main.item() * batch.targets_BS.numel()
                count += batch.targets_BS.numel()
        self.model.train()
        return total / count if count else None

    def evaluate_and_record(self, stop: StopRequest | None) -> float | None:
        """Evaluate now and write it down; None, and nothing is written, when a stop request cut it short."""
        value, c = self.evaluate(stop), self.counters
        if value is not None:
            # a checkpoint holds no NaN, and a run that evaluates to it must be saved all the same
            c.val_loss, c.evaluated_at = (value if math.isfinite(value) else None), c.step
            if c.val_loss is None:
                self._tell(f"the validation loss is {value}")
            self.recorder.eval(c.step, seconds=c.seconds, tokens=c.tokens, val_loss=value)
        return value

    def save(self) -> Path | None:
        """A checkpoint of everything; None if it could not be written and the policy is to go on."""
        # a run that resumes here must find every line up to here
        self.recorder.flush()
        files, meta = self._state().capture()
        loop = self.recipe.loop
        try:
            saved = checkpoint.save(self.run, self.counters.step, files, meta, keep_last=loop.keep_last)
        except CheckpointError as error:
            if loop.save_failure == "stop":
                raise
            self._tell(f"checkpoint failed, the run goes on: {error}")
            self.unsaved = str(error)
            return None
        self.unsaved = None
        return saved

    def finish(self) -> dict[str, Any]:
        """Last evaluation, checkpoint and token view; returns the summary, also written to summary.json."""
        # first what cannot be had again
        self.save()
        if self.counters.evaluated_at != self.counters.step:
            self.evaluate_and_record(None)
            self.save()
        if self.recorder.header.layers:
            self._write_token_view()
        summary = self.summary()
        (self.run / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
        self.close()
        return summary

    def close(self) -> None:
        """End the record and let others write the run; closing twice does nothing."""
        self.recorder.close()
        self._lock.release()

    def summary(self) -> dict[str, Any]:
        """The numbers of the run so far."""
        c, model_size = self.counters, sizes(self.recipe.model)
        return {
            "run": str(self.run),
            "recipe": self.recipe.name,
            "seed": self.recipe.seed,
            "steps": c.step,
            "seconds": round(c.seconds, 2),
            "tokens": c.tokens,
            "tokens_per_s": round(c.tokens / max(c.seconds, 1e-9), 1),
            "train_loss": c.train_loss,
            "val_loss": c.val_loss,
            "params_total": model_size.total,
            "params_active": model_size.active,
            "dropped_share": self.line.get("dropped_share", 0.0),
            "max_violation": self.line.get("max_violation", 0.0),
        }

    def _one_step(self) -> Progress:
        c, recipe = self.counters, self.recipe
        started = time.perf_counter()
        lr = set_lr(self.optimizer, lr_factor(self.done, recipe.schedule))
        batches = [self.sampler.next_batch().to(self.device) for _ in range(recipe.loop.accumulate)]
        result = train_step(
            self.model,
            self._loss,
            self.optimizer,
            batches,
            max_norm=recipe.optimizer.max_norm,
            autocast=self.autocast,
        )
        num_tokens = sum(batch.targets_BS.numel() for batch in batches)
        elapsed = time.perf_counter() - started
        c.step, c.tokens, c.seconds = c.step + 1, c.tokens + num_tokens, c.seconds + elapsed
        line = self.recorder.step(
            c.step,
            seconds=c.seconds,
            tokens=c.tokens,
            loss=result.loss,
            total_loss=result.total_loss,
            aux=result.aux,
            lr=lr,
            grad_norm=result.grad_norm,
            tokens_per_s=num_tokens / elapsed,
            stats=result.stats,
        )
        # what is recorded is part of training's price: only a mixture pays it in full
        c.seconds += time.perf_counter() - started - elapsed
        self.line = line or self.line
        self._judge(result)
        news, self._news = tuple(self._news), []
        return Progress(
            step=c.step,
            done=self.done,
            seconds=c.seconds,
            tokens_per_s=num_tokens / elapsed,
            val_loss=c.val_loss,
            line=self.line,
            news=news,
        )

    def _judge(self, result: StepResult) -> None:
        """Note spikes, count skipped steps, and stop where the policy says so."""
        c, loop = self.counters, self.recipe.loop
        if result.problem is None:
            c.skipped_in_a_row = 0
            c.train_loss = result.loss if c.train_loss is None else 0.95 * c.train_loss + 0.05 * result.loss
            spiked, c.losses = is_spike(SPIKE, c.losses, result.loss)
            if spiked:
                self._tell(f"loss spike: {result.loss:.4f}")
            return
        c.skipped_in_a_row += 1
        self._tell(f"not finite, update left out: {result.problem}")
        weights_are_good = not result.problem.startswith("weight")
        if loop.nonfinite == "skip" and weights_are_good and c.skipped_in_a_row <= loop.max_skipped:
            return
        saved = self.save() if weights_are_good else None
        self.close()
        raise NonFiniteError(
            f"step {c.step}: {result.problem}. The update was not made"
            f"{f' and {saved} holds the weights before it' if saved else ''}. "
            f"Go on more slowly with --resume {self.run} --set optimizer.lr=..., or leave such steps out with "
            "--set loop.nonfinite=skip"
        )

    def _tell(self, text: str) -> None:
        """An event for the record, and for whoever watches."""
        self.recorder.event(self.counters.step, text)
        self._news.append(text)

    def _owes_evaluation(self) -> bool:
        """True also after a resume, when the stop came before or during the evaluation of this step."""
        every, c = self.recipe.loop.eval_every, self.counters
        return bool(every and c.step and c.step % every == 0 and c.evaluated_at != c.step)

    def _owes_checkpoint(self) -> bool:
        every = self.recipe.loop.save_every
        return bool(every and self.counters.step % every == 0 and self.done < 1)

    def _write_token_view(self) -> None:
        tokenizer = self.dataset.tokenizer
        ids = tokenizer.encode(self.recipe.loop.probe)[: self.recipe.model.max_seq_len]
        self.model.eval()
        with torch.inference_mode():
            out = self.model(torch.tensor([ids], device=self.device))
        self.model.train()
        choices = [token_choices(assignment) for assignment in out.assignments]
        pieces = [tokenizer.decode([token]) for token in ids]
        self.recorder.token_view(self.counters.step, pieces, [e for e, _ in choices], [w for _, w in choices])

    def _show_text_to_routers(self) -> None:
        layers = self.model.moe_blocks()
        if not layers:
            return
        token_counts_V = torch.from_numpy(self.dataset.train.token_counts())
        for _, layer in layers:
            if isinstance(layer.router, Router):
                layer.router.before_training(token_counts_V)

    def _open_recorder(self, *, resume: bool, begins: bool) -> Recorder:
        layers = self.model.moe_blocks()
        names, counts = [name for name, _ in layers], [layer.config.num_experts for _, layer in layers]
        sinks = self.recipe.loop.sinks
        # before the record: a folder that has one can be resumed, whenever its run was killed
        if not resume or recipe_of(self.run) != self.recipe:
            replace_text(self.run / "recipe.toml", dump_toml(self.recipe))
        if begins:
            self.dataset.tokenizer.save(self.run / "tokenizer.json")
        if resume:
            return Recorder.resume(self.run, self.counters.step, names, counts, sinks=sinks)
        return Recorder(self.run, names, counts, sinks=sinks)

    def _state(self) -> RunState:
        return RunState(
            model=self.model,
            optimizer=self.optimizer,
            sampler=self.sampler,
            counters=asdict(self.counters),
            recipe=to_dict(self.recipe),
        )

    def _resume(self) -> tuple[str, ...]:
        """Take up the last checkpoint; returns which settings changed since."""
        loaded = checkpoint.load(self.run, self.device)
        # a checkpoint from before recipes were kept in it has none
        changes = changed_settings(loaded.meta.get("recipe", to_dict(self.recipe)), self.recipe)
        counters, notes = self._state().restore(loaded)
        self.counters = Counters(**counters)
        self.notes += loaded.notes + notes
        return changes


def _require_free(run: Path) -> None:
    """Raises: ConfigError if the folder holds what a new run would write over, be it only somebody's recipe."""
    for name in (METRICS_NAME, "recipe.toml"):
        if (run / name).exists():
            raise ConfigError(
                f"{run} already holds a run or its recipe ({name}); go on in it with --resume {run}, or choose "
                "another --out"
            )
