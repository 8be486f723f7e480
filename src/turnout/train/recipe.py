"""A recipe: everything that defines a run, as frozen dataclasses; TOML on disk, dotted overrides on the way."""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from turnout.config import Settings
from turnout.data.prepare import DataConfig
from turnout.errors import ConfigError
from turnout.models import Decoder, ModelConfig
from turnout.parallel import (
    check_dense,
    check_micro_batches,
    check_sequences,
    check_shards,
    check_supported,
    cutting,
)
from turnout.strategy import Strategy, nearest_divisor
from turnout.train.guards import NonFinitePolicy

MOST_MINUTES = 5_256_000
MOST_TIMEOUT_S = 86_400
PROBE = '''def mean(values):
    """Average of a list of numbers."""
    if not values:
        raise ValueError("mean of nothing")
    return sum(values) / len(values)
'''


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Settings):
    """AdamW, with learning rates of their own for experts and routers."""

    lr: float = 2e-3  # peak learning rate
    expert_lr_scale: float = 1.0  # routed experts learn at lr times this: each sees only its share of the tokens
    router_lr_scale: float = 1.0  # routers learn at lr times this, undecayed; low: tokens keep their experts
    beta1: float = 0.9  # decay of the gradient's mean
    beta2: float = 0.95  # decay of the gradient's square
    eps: float = 1e-8  # added to the root of the square
    weight_decay: float = 0.1  # decoupled decay of matrices and experts; norms and routers have none
    clip: float = 1.0  # largest gradient norm; 0: no clipping

    def __post_init__(self) -> None:
        for name in ("lr", "expert_lr_scale", "router_lr_scale", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)} must be above 0 and finite")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)} must be in [0, 1)")
        for name in ("weight_decay", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)} must be at least 0 and finite")

    @property
    def max_norm(self) -> float:
        """Largest gradient norm, infinite where `clip` is 0."""
        return self.clip or math.inf


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Settings):
    """Linear warm-up, then a cosine down to a share of the peak."""

    warmup: float = 0.03  # share of the run in which the learning rate rises
    final: float = 0.05  # learning rate at the end, as a share of the peak

    def __post_init__(self) -> None:
        for name in ("warmup", "final"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"schedule.{name}={getattr(self, name)} must be in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class LoopConfig(Settings):
    """How long, how often, how careful."""

    steps: int = 0  # optimizer steps of the run; 0: as many as fit in `minutes`
    minutes: float = 10.0  # length of the run on its own clock, evaluation and saving not counted; used when steps = 0
    batch_size: int = 8  # sequences in a micro-batch, of all ranks together
    seq_len: int = 256  # tokens in a sequence
    accumulate: int = 1  # micro-batches in an optimizer step
    eval_every: int = 100  # steps between evaluations; 0: only at the end
    eval_tokens: int = 65_536  # validation tokens of one evaluation, the same ones each time
    save_every: int = 500  # steps between checkpoints; 0: only at the end
    keep_last: int = 2  # checkpoints kept
    # single: rank 0 gathers whole tensors and writes a file for each part, good for any disk and any reader.
    # sharded: each rank writes what it has, for models that rank 0 cannot hold or that take long to gather; the run's
    # folder must be on a disk that all ranks see. Either loads at any layout, and into runs of the other kind
    checkpoint: Literal["single", "sharded"] = "single"  # who writes a checkpoint: rank 0, or each rank its part
    async_save: bool = False  # steps go on while a checkpoint is written; costs the host a copy of what is saved
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # bfloat16 autocast; auto: where it is faster
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda when there is one
    compile: bool = False  # torch.compile the model
    nonfinite: NonFinitePolicy = "stop"  # on NaN or infinity in loss or gradients
    max_skipped: int = 10  # steps skipped in a row before the run stops all the same
    save_failure: Literal["continue", "stop"] = "continue"  # when a checkpoint cannot be written (full disk)
    timeout_s: float = 600.0  # a rank that keeps the others waiting longer ends a distributed run
    tune: str = ""  # chooses r, chunks and program of each step by what it measures: "auto", or a JSON file; "": off
    # experts move to ranks where a step is predicted to cost less, if that pays for the move until the next question
    rebalance_every: int = 0  # steps between the questions which ranks the experts should lie on; 0: they stay
    rebalance_spare: int = 0  # experts a rank may then hold beyond its even share; each costs it memory
    rebalance_on: str = ""  # machine whose rates price rows and moves: a name or .toml file; "": this one, measured
    sinks: tuple[str, ...] = ()  # further places for metrics: tensorboard, wandb, trackio
    probe: str = PROBE  # text whose way through the experts the report shows

    def __post_init__(self) -> None:
        for name in ("steps", "eval_every", "save_every", "max_skipped", "rebalance_every", "rebalance_spare"):
            if getattr(self, name) < 0:
                raise ConfigError(f"loop.{name}={getattr(self, name)} must be at least 0")
        for name in ("batch_size", "seq_len", "accumulate", "eval_tokens", "keep_last"):
            if getattr(self, name) < 1:
                raise ConfigError(f"loop.{name}={getattr(self, name)} must be at least 1")
        if not 1 <= self.timeout_s <= MOST_TIMEOUT_S:
            raise ConfigError(f"loop.timeout_s={self.timeout_s} must be from 1 to {MOST_TIMEOUT_S} seconds")
        if self.eval_tokens < self.seq_len:
            raise ConfigError(f"loop.eval_tokens={self.eval_tokens} must be at least loop.seq_len={self.seq_len}")
        if not self.probe.strip():
            raise ConfigError("loop.probe is empty; give a text to be routed for the report")
        if self.steps == 0 and not 0 < self.minutes <= MOST_MINUTES:
            legal = f"must be above 0 and at most {MOST_MINUTES:,} (ten years)"
            raise ConfigError(f"loop.minutes={self.minutes} {legal} when loop.steps = 0")


@dataclass(frozen=True, kw_only=True)
class Recipe(Settings):
    """All of a run: the same recipe, seed and data give the same weights."""

    name: str = "custom"  # name of the recipe, for reports and run folders
    seed: int = 0  # seed of initial weights, data order and router noise
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    loop: LoopConfig = LoopConfig()
    strategy: Strategy = Strategy()  # how the model lies on ranks; precision and micro-batch are the loop's

    def __post_init__(self) -> None:
        if not self.name.isprintable() or self.name in ("", ".", "..") or "/" in self.name:
            raise ConfigError(f"name={self.name!r} must be good as the name of a folder: printable, without /")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed} must be at least 0 and below 2**32")
        if self.loop.seq_len > self.model.max_seq_len:
            raise ConfigError(
                f"loop.seq_len={self.loop.seq_len} is more than model.max_seq_len={self.model.max_seq_len}; "
                f"legal: 1 to {self.model.max_seq_len}"
            )
        if self.data.tokenizer == "bpe" and self.data.vocab_size != self.model.vocab_size:
            raise ConfigError(
                f"data.vocab_size={self.data.vocab_size} and model.vocab_size={self.model.vocab_size} must be equal"
            )
        self._check_strategy()

    def _check_strategy(self) -> None:
        strategy, usual = self.strategy, Strategy()
        for name, owner in (("precision", "loop.precision"), ("micro_batch", "loop.batch_size over the ranks")):
            if getattr(strategy, name) != getattr(usual, name):
                raise ConfigError(
                    f"strategy.{name}={getattr(strategy, name)!r}: a recipe says that by {owner}; leave it out "
                    f"({getattr(usual, name)!r})"
                )
        check_supported(strategy)
        check_micro_batches(strategy, self.loop.accumulate)
        if self.loop.compile and strategy.zero:
            raise ConfigError(
                f"loop.compile=true with strategy.zero={strategy.zero}: gathering shards is not compiled in this "
                "version; nearest legal: loop.compile=false"
            )
        if self.loop.compile and self.loop.tune:
            raise ConfigError(
                f"loop.compile=true with loop.tune={self.loop.tune!r}: an exchange between ranks is not compiled in "
                "this version; nearest legal: loop.compile=false"
            )
        many = [f"{name}={getattr(strategy, name)}" for name in ("pp", "tp", "ep", "etp")]
        shared = [words for words in many if not words.endswith("=1")]
        if self.loop.tune and (strategy.tp > 1 or strategy.pp > 1):
            raise ConfigError(
                f"loop.tune={self.loop.tune!r} with strategy.{shared[0]}: the tuner knows no such ranks in "
                'this version; nearest legal: loop.tune=""'
            )
        self._check_rebalancing()
        if self.loop.compile and shared:
            raise ConfigError(
                f"loop.compile=true with strategy.{shared[0]}: an exchange between ranks is not compiled in this "
                "version; nearest legal: loop.compile=false"
            )

    def _check_rebalancing(self) -> None:
        loop = self.loop
        if loop.rebalance_every and self.strategy.pp > 1:
            raise ConfigError(
                f"loop.rebalance_every={loop.rebalance_every} with strategy.pp={self.strategy.pp}: experts of pipeline "
                "stages do not move in this version; nearest legal: loop.rebalance_every=0"
            )
        if loop.rebalance_every and self.strategy.ep == 1 and not loop.tune:
            raise ConfigError(
                f"loop.rebalance_every={loop.rebalance_every} with strategy.ep=1: every rank has all experts, and none "
                "can move; nearest legal: loop.rebalance_every=0, or strategy.ep=2"
            )
        copies = self.strategy.expert_copies
        if copies and not loop.rebalance_every:
            raise ConfigError(
                f"strategy.expert_copies={copies} are given to the experts that turn out to be the most loaded, every "
                "loop.rebalance_every steps: set loop.rebalance_every=100 too, or expert_copies=0"
            )
        if copies and loop.rebalance_spare:
            raise ConfigError(
                f"loop.rebalance_spare={loop.rebalance_spare} with strategy.expert_copies={copies}: ranks that hold "
                "copies all have as many places; nearest legal: loop.rebalance_spare=0, and more copies"
            )
        for name in ("rebalance_spare", "rebalance_on"):
            if getattr(loop, name) and not loop.rebalance_every:
                raise ConfigError(
                    f"loop.{name}={getattr(loop, name)!r} says how experts move; set loop.rebalance_every=100 too, or "
                    "leave it out"
                )


def check_ranks(recipe: Recipe, ranks: int) -> None:
    """Raises: ConfigError if the recipe cannot run on so many ranks, naming the nearest that can be."""
    strategy = recipe.strategy
    sizes = {name: getattr(strategy, name) for name in ("tp", "pp", "ep", "etp")}
    several = [name for name, size in sizes.items() if size > 1]
    if ranks == 1 and several:
        # folded, experts take the very ranks that attention has
        experts = strategy.ep * strategy.etp
        needed = math.lcm(strategy.tp, experts) if strategy.folded or strategy.etp > 1 else strategy.tp * experts
        needed *= strategy.pp
        given = " * ".join(f"{name}={sizes[name]}" for name in several)
        raise ConfigError(
            f"strategy.{given} needs at least {needed} processes: torchrun --nproc-per-node {needed} -m turnout train "
            "...; nearest legal in one: 1"
        )
    moe = recipe.model.moe
    num_experts = moe.num_experts if moe is not None and recipe.model.moe_layers() else 0
    layers = recipe.model.num_layers if strategy.pp > 1 else 0
    # the tuner predicts by the planner's closed forms
    uneven = not recipe.loop.tune
    resolved = strategy.check(ranks, num_experts=num_experts, num_layers=layers, uneven=uneven)
    check_shards(resolved, has_experts=num_experts > 0)
    if moe is not None and moe.hidden % recipe.strategy.etp:
        near = nearest_divisor(recipe.strategy.etp, moe.hidden)
        raise ConfigError(
            f"strategy.etp={recipe.strategy.etp} must divide moe.hidden={moe.hidden}; nearest legal: {near}"
        )
    each = sequences_per_rank(recipe, ranks)
    if strategy.tp > 1:
        with torch.device("meta"):
            model = Decoder(recipe.model)
        check_dense(model, strategy.tp, sequence_parallel=strategy.sequence_parallel)
    if strategy.sequence_parallel and moe is not None:
        check_sequences(moe.losses, cutting((each, recipe.loop.seq_len), strategy.tp))


def sequences_per_rank(recipe: Recipe, ranks: int) -> int:
    """Sequences in a micro-batch of one of `ranks`: a run is the same run on any number of them.

    Those that are tensor-parallel have the same sequences, and so have pipeline stages.
    Raises: ConfigError if the ranks do not divide loop.batch_size.
    """
    strategy = recipe.strategy
    shared = {name: size for name, size in (("tp", strategy.tp), ("pp", strategy.pp)) if size > 1}
    size, ranks = recipe.loop.batch_size, max(1, ranks // math.prod(shared.values()))
    if size % ranks:
        near = max(1, round(size / ranks)) * ranks
        given = " * ".join(f"{name}={each}" for name, each in shared.items())
        whose = f"groups of {given} ranks" if shared else "ranks"
        raise ConfigError(
            f"loop.batch_size={size} is that of all {ranks} {whose} together: they must divide it; "
            f"nearest legal: {near}"
        )
    return size // ranks
