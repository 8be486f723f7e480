"""The training loop: setup, steps, evaluation, checkpoints; it stops at a step boundary and resumes bit for bit.

Every rank of a distributed run has a Trainer. They decide together, by the same numbers; the first one writes.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

from turnout.comm import World
from turnout.config import to_dict
from turnout.data.prepare import Dataset
from turnout.data.sampler import Sampler, count_windows
from turnout.errors import CheckpointError, NonFiniteError
from turnout.observe.recorder import Recorder
from turnout.observe.silent import SilentRecorder
from turnout.parallel import build, check_replicas
from turnout.parallel.moves import moved
from turnout.parallel.rebalancer import Rebalancer
from turnout.parallel.tuner import Tuner
from turnout.train import checkpoint
from turnout.train.agreement import claim, last_checkpoint, require_alike
from turnout.train.checkpoint import Checkpoint
from turnout.train.device import autocast_for, compute_dtype, pick_device
from turnout.train.evaluate import mean_loss
from turnout.train.judgement import judged
from turnout.train.optimizer import build_optimizer, lr_factor, set_lr
from turnout.train.progress import Counters, Progress
from turnout.train.rebalanced import open_rebalancer
from turnout.train.recipe import Recipe, sequences_per_rank
from turnout.train.record import open_record, record_token_view
from turnout.train.resume import changed_settings
from turnout.train.saving import Saver
from turnout.train.shown_text import show_text_to_routers
from turnout.train.signals import StopRequest
from turnout.train.state import RunState
from turnout.train.step import StepResult, train_step
from turnout.train.summary import summary_of
from turnout.train.tuned import dictionary_path, open_tuner, save_dictionary

Outcome = Literal["done", "stopped", "paused"]
_GOLDEN = 0x9E3779B9  # seeds of neighbouring ranks lie far apart; only 32 bits of a seed count on the CPU


class Trainer:
    """One run. Owns the model, the optimizer, the sampler and the clock; the run's folder holds all of it."""

    def __init__(
        self, recipe: Recipe, dataset: Dataset, run: Path, *, resume: bool = False, world: World | None = None
    ) -> None:
        """Every rank of a job makes one.

        Raises: ConfigError if the folder holds another run, or a writer, or the resumed one cannot change so;
        DataError if the data does not fit; CheckpointError.
        """
        dataset.tokenizer.require_fits(recipe.model.vocab_size)
        self.recipe, self.dataset, self.run = recipe, dataset, run
        self.world = World() if world is None else world
        require_alike(recipe, dataset, self.world)
        loop = recipe.loop
        self._rank_batch = sequences_per_rank(recipe, self.world.size)
        self.device = pick_device(loop.device)
        torch.manual_seed(recipe.seed)
        self.model, self.parallel = build(
            recipe.model, recipe.strategy, world=self.world, timeout_s=loop.timeout_s, device=self.device.type
        )
        self.tuner = open_tuner(recipe, self.model, self.parallel, run, self.device)
        self.rebalancer = open_rebalancer(recipe, self.model, self.parallel, self.device)
        has_copies = self.parallel.strategy.expert_copies > 0
        self.optimizer = build_optimizer(self.model, recipe.optimizer, has_copies=has_copies)
        count_windows(dataset.val, loop.seq_len)  # refuses too short a validation text before anything is trained
        place, texts = self.parallel.text_place
        self.sampler = Sampler(dataset.train, self._rank_batch, loop.seq_len, recipe.seed, rank=place, world_size=texts)
        self.autocast = autocast_for(self.device, compute_dtype(self.device, recipe))
        self.counters = Counters()
        self.notes: tuple[str, ...] = ()  # what a person should know of a resume
        self.stopped_by = 0  # number of the signal that ended it, whichever rank got it
        self.unsaved: str | None = None  # why the last checkpoint could not be written
        self.line: dict[str, Any] = {}  # record of the last step
        self._news: list[str] = []
        self._loss = torch.compile(self.model.loss) if loop.compile else self.model.loss
        self._saver = Saver(run, loop, self.world)
        self._lock = claim(run, self.world, resume=resume)
        try:
            self.recorder, changes = self._begin(resume=resume)
        except BaseException:
            # whoever handles it may hold on to this half of a trainer, but not to the run
            self._release()
            raise
        for change in changes:
            self._tell(f"resumed with {change}")
        if reason := self.parallel.groups.lines.reason:
            self._tell(f"gloo carries what memory would: {reason}")

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
        try:
            return self._steps(stop, on_step, pause_at)
        except Exception:
            # what failed is no reason to lose a save that is nearly there
            self._saver.wait()
            raise

    def _steps(self, stop: StopRequest, on_step: Callable[[Progress], None], pause_at: float) -> Outcome:
        while True:
            self.stopped_by, asked_to_save, is_writing = self._agree(stop)
            if self._saver.is_pending and not is_writing:
                self._settle_save()
            if self.stopped_by:
                self.save()
                return "stopped"
            if asked_to_save:
                self._save_beside()
            if self.done >= 1:
                return "done"
            if self.done >= pause_at:
                return "paused"
            if self._owes_evaluation():
                self.evaluate_and_record(stop)
                continue
            on_step(self._one_step())
            if self._owes_checkpoint():
                self._save_beside()

    def evaluate(self, stop: StopRequest | None = None) -> float | None:
        """Mean validation loss over the recipe's eval_tokens: the same text for every model.

        A stop request ends it early; there is no result then.
        """
        loop = self.recipe.loop
        value = mean_loss(
            self.model,
            self.dataset.val,
            batch_size=self._rank_batch,
            seq_len=loop.seq_len,
            max_tokens=loop.eval_tokens,
            parallel=self.parallel,
            autocast=self.autocast,
            stop=stop,
        )
        self.parallel.reshard(self.model)
        return value

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
        """A checkpoint of everything, on disk when this returns; None if it could not be and the policy is to go on."""
        self._begin_save()
        return self._settle_save()

    def _save_beside(self) -> None:
        """The same; with `loop.async_save` it is written while steps go on."""
        self._begin_save()
        if not self.recipe.loop.async_save:
            self._settle_save()

    def _begin_save(self) -> None:
        if self._saver.is_pending:
            self._settle_save()
        # a run that resumes here must find every line up to here
        self.recorder.flush()
        check_replicas(self.model, self.parallel)
        self._saver.begin(self.counters.step, self._state())

    def _settle_save(self) -> Path | None:
        saved, failure = self._saver.settle(self._keep_learned)
        if failure is not None and self.recipe.loop.save_failure == "stop":
            raise CheckpointError(failure)
        if failure is not None:
            self._tell(f"checkpoint failed, the run goes on: {failure}")
        self.unsaved = failure
        return saved

    def _keep_learned(self) -> str | None:
        try:
            if self.tuner is not None:
                save_dictionary(self.tuner.dictionary, dictionary_path(self.recipe, self.run))
        except OSError as error:
            return f"what the tuner learned was not written: {error}"
        return None

    def finish(self) -> dict[str, Any]:
        """Last evaluation, checkpoint and token view; returns the summary, also written to summary.json."""
        # first what cannot be had again
        self.save()
        if self.counters.evaluated_at != self.counters.step:
            self.evaluate_and_record(None)
            self.save()
        record_token_view(
            self.recorder, self.recipe, self.dataset, self.model, parallel=self.parallel, step=self.counters.step
        )
        summary = self.summary()
        if self.world.is_first:
            (self.run / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
        self.close()
        return summary

    def close(self) -> None:
        """End the record and let others write the run, once what is being saved is; closing twice does nothing."""
        failure = self._saver.wait()
        if failure is not None:
            self.unsaved = failure
            self._tell(f"checkpoint failed: {failure}")
        self.recorder.close()
        self._release()

    def summary(self) -> dict[str, Any]:
        """The numbers of the run so far."""
        return summary_of(self.run, self.recipe, self.counters, self.line)

    def _one_step(self) -> Progress:
        c = self.counters
        # evaluation sends too, and is no part of a step
        self.parallel.ledger.clear()
        if self.tuner is not None:
            self.parallel = self.tuner.before_step(self.model, self.parallel)
        started = time.perf_counter()
        lr, result, num_tokens = self._train_step()
        elapsed = time.perf_counter() - started
        c.step, c.tokens, c.seconds = c.step + 1, c.tokens + num_tokens, c.seconds + elapsed
        if self.tuner is not None:
            self._tune(self.tuner, elapsed, result)
        self._record(result, lr, num_tokens / elapsed)
        self._judge(result)
        if self.rebalancer is not None:
            self._rebalance(self.rebalancer, result)
        # what is recorded is part of training's price: only a mixture pays it in full
        c.seconds += time.perf_counter() - started - elapsed
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

    def _train_step(self) -> tuple[float, StepResult, int]:
        """An update: its learning rate, what came of it, and the tokens of all ranks that went into it."""
        recipe = self.recipe
        lr = set_lr(self.optimizer, lr_factor(self.done, recipe.schedule))
        batches = [self.sampler.next_batch().to(self.device) for _ in range(recipe.loop.accumulate)]
        result = train_step(
            self.model,
            self._loss,
            self.optimizer,
            batches,
            max_norm=recipe.optimizer.max_norm,
            autocast=self.autocast,
            parallel=self.parallel,
        )
        return lr, result, self.parallel.text_place[1] * sum(batch.targets_BS.numel() for batch in batches)

    def _tune(self, tuner: Tuner, elapsed: float, result: StepResult) -> None:
        with self.parallel.ledger.inside("agreement on the time of a step"):
            decided = tuner.after_step(elapsed, result.stats, self.recipe.loop.accumulate)
        if decided:
            self._tell(f"tuner: {decided}")

    def _record(self, result: StepResult, lr: float, tokens_per_s: float) -> None:
        c = self.counters
        line = self.recorder.step(
            c.step,
            seconds=c.seconds,
            tokens=c.tokens,
            loss=result.loss,
            total_loss=result.total_loss,
            aux=result.aux,
            lr=lr,
            grad_norm=result.grad_norm,
            tokens_per_s=tokens_per_s,
            stats=result.stats,
            sent=self.parallel.take_sent(),
        )
        self.line = line or self.line

    def _rebalance(self, rebalancer: Rebalancer, result: StepResult) -> None:
        """Count what was routed; at its time ask whether experts should move, and move them."""
        rebalancer.note(result.own)
        step = self.counters.step
        if not rebalancer.is_due(step):
            return
        with self.parallel.ledger.inside("moves of experts"):
            self.parallel, moves, rows = rebalancer.rebalanced(self.model, self.parallel, self.optimizer)
        self.recorder.sources(step, rows)
        for move in moves:
            self._tell(f"placement: {move}")

    def _judge(self, result: StepResult) -> None:
        """Note spikes, count skipped steps, and stop where the policy says so."""
        found = judged(self.counters, result, self.recipe.loop)
        if found.news:
            self._tell(found.news)
        if found.goes_on:
            return
        saved = self.save() if found.weights_are_good else None
        self.close()
        raise NonFiniteError(
            f"step {self.counters.step}: {result.problem}. The update was not made"
            f"{f' and {saved} holds the weights before it' if saved else ''}. "
            f"Go on more slowly with --resume {self.run} --set optimizer.lr=..., or leave such steps out with "
            "--set loop.nonfinite=skip"
        )

    def _agree(self, stop: StopRequest) -> tuple[int, bool, bool]:
        """The signal that asked any rank to stop, 0 for none; whether one was asked to save; whether one still writes.

        All then have the clock of the slowest.
        """
        asked = [float(stop.received or 0), float(stop.save_requested()), float(self._saver.is_writing)]
        with self.parallel.ledger.inside("agreement on going on", step=self.counters.step + 1):
            signal, save, is_writing, self.counters.seconds = self.world.largest([*asked, self.counters.seconds])
        return int(signal), bool(save), bool(is_writing)

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

    def _begin(self, *, resume: bool) -> tuple[Recorder | SilentRecorder, tuple[str, ...]]:
        """The open record, and which settings changed since the checkpoint that was taken up, if there was one."""
        begins = self.world.first(not (resume and checkpoint.exists(self.run)))
        changes: tuple[str, ...] = ()
        if begins:
            show_text_to_routers(self.model, self.dataset)
            self.notes += (f"{self.run} ended before its first checkpoint: it starts again",) if resume else ()
        # what a run begins with is everybody's, what routers draw at random from here on is not
        if stream := self.parallel.random_stream[0]:
            torch.manual_seed((self.recipe.seed + _GOLDEN * stream) % 2**32)
        if not begins:
            changes = self._resume()
        check_replicas(self.model, self.parallel)
        resumed_at = self.counters.step if resume else None
        record = open_record(self.run, self.recipe, self.dataset, self.world, resumed_at=resumed_at, begins=begins)
        return record, changes

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _state(self) -> RunState:
        return RunState(
            model=self.model,
            optimizer=self.optimizer,
            sampler=self.sampler,
            counters=asdict(self.counters),
            parallel=self.parallel,
            recipe=to_dict(self.recipe),
            tokenizer=self.dataset.tokenizer.fingerprint,
            rebalancer=self.rebalancer,
        )

    def _resume(self) -> tuple[str, ...]:
        """Take up the last checkpoint; returns which settings changed since."""
        loaded = last_checkpoint(self.run, self.world, self.device, self._state().wants)
        changes = self.world.together(lambda: self._restore(loaded))
        if self.rebalancer is not None:
            lay = self.rebalancer.restore(loaded.meta.get("placement"), self.model, self.parallel)
            self.parallel = moved(self.model, self.parallel, self.optimizer, lay)
        return changes

    def _restore(self, loaded: Checkpoint) -> tuple[str, ...]:
        # a checkpoint from before recipes were kept in it has none
        changes = changed_settings(loaded.meta.get("recipe", to_dict(self.recipe)), self.recipe)
        counters, notes = self._state().restore(loaded)
        self.counters = Counters(**counters)
        self.notes += loaded.notes + notes
        return changes
