"""Case train-step: a whole optimizer step of a recipe's model against transformers' Mixtral of the same shape.

Everybody gets the same tokens, fused AdamW and clipping, in float32 on the CPU. Ours is the training loop's own step,
with its checks for NaN and its statistics; Mixtral's is the bare one. The recipe's router and losses may be others than
Mixtral's, and then rows say so; `turnout-mixtral-routing` is our model with Mixtral's, to compare like with like.
Values that cost no time (initial weights, learning rates of groups, rotary base) are each model's own.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from turnout.bench.gemms import gemms
from turnout.bench.memory import peak_mib
from turnout.bench.mixtral import check_shape, differences, mixtral, routed_like_mixtral, routing_words
from turnout.bench.race import Timing, race, ratio
from turnout.bench.run import check_gate, ratio_keys, result, row
from turnout.bench.split import time_split
from turnout.data.sampler import Batch
from turnout.errors import ConfigError
from turnout.models import Decoder, ModelConfig
from turnout.models.size import sizes
from turnout.train.device import compute_dtype
from turnout.train.estimate import step_on
from turnout.train.recipe import Recipe

OURS, LIKE, DENSE, LIMIT = "turnout", "turnout-mixtral-routing", "dense-twin", "gemm-limit"
THEIRS = "transformers-"
PEERS = (OURS, LIKE, f"{THEIRS}grouped_mm", f"{THEIRS}eager", DENSE, LIMIT)
# by torch.compile, which takes minutes: measured when asked for by name
COMPILED = THEIRS + "grouped_mm-compiled"
# of FLOPs a token: a twin within it is one of the same work
TWIN_TOLERANCE = 0.02


def run(
    recipe: Recipe,
    dense: Recipe,
    *,
    peers: tuple[str, ...] = (),
    rounds: int,
    warmup: int,
    memory: bool,
    split: bool = False,
) -> dict[str, Any]:
    """A row for each of `peers` (none: all of PEERS), and `notes` on what is not measured as the recipe has it.

    With `split`, rows say where the time goes, but of bare products and of what torch.compile has fused.

    Raises: ConfigError if a peer is unknown, not installed or cannot be compared with the recipe; TurnoutError, before
    anything is timed, if a backend does not compute what the oracle computes.
    """
    names = peers or PEERS
    check_peers(recipe, dense, names)
    check_gate()
    steps = {name: contestant(name, recipe, dense) for name in names}
    timings = race(steps, rounds=rounds, warmup=warmup)
    whole = (LIMIT, COMPILED)
    splits = {name: time_split(step) for name, step in steps.items() if split and name not in whole}
    steps.clear()
    rows = []
    for name in names:
        peak = functools.partial(few_steps, name, recipe, dense)
        peak_mib_of_it = peak_mib(peak) if memory and name != LIMIT else None
        rows.append(_row(name, timings, recipe) | {"peak_mib": peak_mib_of_it, "split": splits.get(name)})
    return result(rows, "transformers", notes=notes(recipe, dense, names))


def contestant(name: str, recipe: Recipe, dense: Recipe) -> Callable[[], object]:
    """One of PEERS, or COMPILED: a training step on a fixed batch."""
    loop = recipe.loop
    torch.manual_seed(0)
    tokens_BS = torch.randint(recipe.model.vocab_size, (loop.batch_size, loop.seq_len + 1))
    if name == LIMIT:
        return gemms(recipe.model, loop.batch_size * loop.seq_len)
    if name.startswith(THEIRS):
        return _mixtral_step(recipe, tokens_BS, name.removeprefix(THEIRS))
    batch = Batch(tokens_BS=tokens_BS[:, :-1], targets_BS=tokens_BS[:, 1:])
    return step_on(Decoder(_our_model(name, recipe, dense)), [batch], recipe, torch.float32)


def few_steps(name: str, recipe: Recipe, dense: Recipe) -> None:
    """Three steps of one peer: what the memory measurement runs in a process of its own."""
    # in everybody's process, where it is installed: its code is no part of a step's memory
    with contextlib.suppress(ImportError):
        importlib.import_module("transformers.models.mixtral.modeling_mixtral")
    step = contestant(name, recipe, dense)
    for _ in range(3):
        step()


def check_peers(recipe: Recipe, dense: Recipe, peers: tuple[str, ...]) -> None:
    """Raises: ConfigError naming the peer that is unknown, or what keeps it from being compared with the recipe."""
    for name in peers:
        if name not in (*PEERS, COMPILED):
            raise ConfigError(f"unknown peer {name!r}; available: {', '.join((*PEERS, COMPILED))}")
    if not recipe.model.moe_layers():
        raise ConfigError(f"the recipe {recipe.name!r} has no experts; train-step measures one that has")
    if any(name.startswith(THEIRS) for name in peers):
        check_shape(recipe)
    if DENSE in peers:
        _check_twin(recipe, dense)


def notes(recipe: Recipe, dense: Recipe, peers: tuple[str, ...]) -> list[str]:
    """What the recipe has and this measurement leaves out, a sentence each."""
    loop, said = recipe.loop, []
    if loop.accumulate > 1:
        said.append(f"loop.accumulate={loop.accumulate}: everybody takes one micro-batch a step")
    if loop.device == "cuda":
        said.append("loop.device='cuda': everybody computes on the CPU")
    if compute_dtype(torch.device("cpu"), recipe) != torch.float32:
        said.append(f"loop.precision={loop.precision!r}, here bfloat16: everybody computes in float32")
    if loop.compile:
        said.append("loop.compile=true: nobody is compiled")
    work = _twin_work(recipe, dense) if DENSE in peers else 1.0
    if abs(work - 1) > TWIN_TOLERANCE:
        said.append(f"{DENSE}: a token of {dense.name!r} takes {work:.2f} times the FLOPs of one of {recipe.name!r}")
    return said


def _row(name: str, timings: dict[str, Timing], recipe: Recipe) -> dict[str, Any]:
    def over(numerator: str, denominator: str) -> Any:
        both = numerator in timings and denominator in timings
        return ratio(timings[numerator], timings[denominator]) if both else None

    timing = timings[name]
    tokens = recipe.loop.batch_size * recipe.loop.seq_len
    return {
        **row("train-step", name, timing),
        "routing": _routing(name, recipe),
        "differences": differences(recipe) if name.startswith(THEIRS) else [],
        "tokens_per_s": 1e3 * tokens / timing.median,
        **ratio_keys("speedup_of_turnout", over(name, OURS)),
        **ratio_keys("speedup_of_turnout_mixtral_routing", over(name, LIKE)),
        **ratio_keys("ratio_to_dense", over(DENSE, name)),
        **ratio_keys("ratio_to_limit", over(LIMIT, name)),
    }


def _routing(name: str, recipe: Recipe) -> str | None:
    if name in (DENSE, LIMIT):
        return None
    model = recipe.model if name == OURS else routed_like_mixtral(recipe.model)
    assert model.moe is not None
    return routing_words(model.moe)


def _our_model(name: str, recipe: Recipe, dense: Recipe) -> ModelConfig:
    return {OURS: recipe.model, LIKE: routed_like_mixtral(recipe.model), DENSE: dense.model}[name]


def _mixtral_step(recipe: Recipe, tokens_BS: Tensor, implementation: str) -> Callable[[], object]:
    plain = implementation.removesuffix("-compiled")
    model, settings = mixtral(recipe.model, plain), recipe.optimizer
    forward = model if implementation == plain else torch.compile(model)
    inputs_BS = tokens_BS[:, :-1].contiguous()
    betas = (settings.beta1, settings.beta2)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.lr,
        betas=betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )

    def step() -> None:
        forward(input_ids=inputs_BS, labels=inputs_BS).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.max_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _check_twin(recipe: Recipe, dense: Recipe) -> None:
    if dense.model.moe_layers():
        raise ConfigError(f"--dense {dense.name!r} has experts; the twin of {recipe.name!r} must have none")
    for name, least in (("vocab_size", recipe.model.vocab_size), ("max_seq_len", recipe.loop.seq_len)):
        if getattr(dense.model, name) < least:
            raise ConfigError(
                f"--dense {dense.name!r} has model.{name}={getattr(dense.model, name)}; the batch of {recipe.name!r} "
                f"needs at least {least}"
            )


def _twin_work(recipe: Recipe, dense: Recipe) -> float:
    seq_len = recipe.loop.seq_len
    return sizes(dense.model, seq_len).flops_per_token / sizes(recipe.model, seq_len).flops_per_token
