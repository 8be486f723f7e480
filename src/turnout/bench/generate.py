"""Case generate: prompts continued by a model of ours and by transformers' Mixtral of the same shape and weights.

All have the same random weights and prompts, take the best token each time and have a KV cache; float32, in turns in
one process. Of a call the first token (reading the prompt) and the later ones are told apart. The peer is the faster of
two: transformers' own `generate`, and a loop of its model and cache with nothing around them.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from turnout.bench.generate_peers import (
    INT8,
    LOOP,
    OURS,
    PEERS,
    THEIRS,
    Generate,
    built,
    by_generate,
    by_loop,
    generating,
    logits_of,
)
from turnout.bench.mixtral import check_shape, routed_like_mixtral
from turnout.bench.race import Ratio, Timing, race, ratio
from turnout.bench.run import check_gate, ratio_keys, red_gate, result, row
from turnout.errors import ConfigError, TurnoutError
from turnout.layers.attention import AttentionConfig
from turnout.layers.moe import MoEConfig
from turnout.models import ModelConfig
from turnout.models.presets import tiny
from turnout.models.size import sizes
from turnout.routers import TopK
from turnout.train.recipe import Recipe


def wide() -> ModelConfig:
    """A model whose experts are more than caches hold: 0.2 G parameters, of which a token meets an eighth."""
    return ModelConfig(
        dim=512,
        num_layers=8,
        attention=AttentionConfig(num_heads=8, num_kv_heads=8, head_dim=64),
        moe=MoEConfig(num_experts=16, hidden=1024, router=TopK(k=2)),
    )


MODELS = {"tiny": tiny, "wide": wide}
PROMPT, NEW = 128, 64
# of the norm of a position's logits: at every one with the same weights, at the median one with experts of 8 bits, with
# which one or two tokens in a hundred get other experts, where two scores are next to each other
SAME, ROUNDED = 1e-4, 0.01


def run(
    models: Sequence[str],
    *,
    peers: Sequence[str] = (),
    batches: Sequence[int] = (1, 8),
    prompt: int = PROMPT,
    new: int = NEW,
    rounds: int,
    warmup: int,
) -> dict[str, Any]:
    """A row for each model, batch and one of `peers` (none: all); ratios are null without one of transformers'.

    Raises: ConfigError if a model or peer is unknown, or a model too short for prompt and continuation; TurnoutError,
    before anything is timed, if logits of a prompt are not finite or not those of the others, or a backend does not
    compute what the oracle computes.
    """
    for name in models or [""]:
        if name not in MODELS:
            raise ConfigError(f"unknown model {name!r}; available: {', '.join(MODELS)}")
    for name in peers:
        if name not in PEERS:
            raise ConfigError(f"unknown peer {name!r}; available: {', '.join(PEERS)}")
    if not batches or min(batches) < 1:
        raise ConfigError(f"--batches {','.join(map(str, batches))!r} must be whole numbers of at least 1")
    shapes = {name: shape_of(name) for name in models}
    for shape in shapes.values():
        check_length(shape, prompt, new)
    check_gate()
    rows: list[dict[str, Any]] = []
    for name in shapes:
        rows += _rows(name, peers or PEERS, batches, prompt=prompt, new=new, rounds=rounds, warmup=warmup)
    return result(rows, "transformers")


def shape_of(name: str) -> ModelConfig:
    """The model with the routing that Mixtral has.

    Raises: ConfigError if Mixtral cannot have its shape.
    """
    shape = routed_like_mixtral(MODELS[name]())
    check_shape(Recipe(name=name, model=shape))
    return shape


def check_length(shape: ModelConfig, prompt: int, new: int) -> None:
    """Raises: ConfigError if prompt and continuation are longer than the model takes, or too short to time."""
    if prompt < 1 or new < 2:
        raise ConfigError(f"--prompt {prompt} must be at least 1, and --new {new} at least 2")
    if prompt + new > shape.max_seq_len:
        raise ConfigError(f"--prompt {prompt} and --new {new} are more than max_seq_len={shape.max_seq_len}")


def check_logits(logits: Mapping[str, Tensor]) -> dict[str, float]:
    """How far each is from ours in float32, of the norm: at the worst position, and of 8 bits at the median one.

    Shapes: logits (B, S, V).

    Raises: TurnoutError naming whose logits are not finite, or further from ours than precision explains.
    """
    found = {}
    for name, logits_BSV in logits.items():
        if not logits_BSV.isfinite().all():
            raise red_gate(f"{name} has logits that are not finite")
        apart_BS = (logits_BSV - logits[OURS]).norm(dim=2) / logits[OURS].norm(dim=2)
        found[name] = float(apart_BS.median() if name == INT8 else apart_BS.max())
        most = ROUNDED if name == INT8 else SAME
        if found[name] > most:
            raise red_gate(
                f"the logits of {name} are {found[name]:.2g} of their norm away "
                f"from those of {OURS}; allowed are {most}"
            )
    return found


def _rows(
    name: str, peers: Sequence[str], batches: Sequence[int], *, prompt: int, new: int, rounds: int, warmup: int
) -> list[dict[str, Any]]:
    shape = shape_of(name)
    ours, rounded, theirs = built(shape)
    ways: dict[str, Generate] = {
        OURS: generating(ours),
        INT8: generating(rounded),
        LOOP: by_loop(theirs),
        THEIRS: by_generate(theirs),
    }
    rows = []
    for batch in batches:
        prompt_BS = torch.randint(shape.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(batch))
        apart = check_logits(
            {peer: logits_of(model, prompt_BS) for peer, model in ((OURS, ours), (INT8, rounded), (LOOP, theirs))}
        )
        timings = _race({peer: ways[peer] for peer in peers}, prompt_BS, new, rounds=rounds, warmup=warmup)
        facts = {"model": name, "batch": batch, "prompt": prompt, "new": new}
        facts |= {"params": sizes(shape, prompt).total}
        rows += [_row(peer, facts, timings, apart.get(peer, apart[LOOP])) for peer in peers]
    return rows


def _race(
    ways: dict[str, Generate], prompt_BS: Tensor, new: int, *, rounds: int, warmup: int
) -> dict[str, dict[str, Timing]]:
    """Milliseconds of everybody: of the whole call, until the first token, and of each later one."""
    ends: dict[str, list[list[float]]] = {name: [] for name in ways}

    def call(name: str) -> None:
        ends[name].append(ways[name](prompt_BS, new)[1])

    calls: dict[str, Callable[[], object]] = {name: partial(call, name) for name in ways}
    whole = race(calls, rounds=rounds, warmup=warmup)
    found = {}
    for name, at_s in ends.items():
        if any(len(of_call) != new for of_call in at_s):
            raise TurnoutError(f"{name} gave another number of tokens than the {new} it was asked for")
        counted = at_s[warmup:]
        found[name] = {
            "whole": whole[name],
            "first": Timing(ms=tuple(1e3 * of_call[0] for of_call in counted)),
            "token": Timing(ms=tuple(1e3 * (of_call[-1] - of_call[0]) / (new - 1) for of_call in counted)),
        }
    return found


def _row(
    peer: str, facts: dict[str, Any], timings: dict[str, dict[str, Timing]], logits_apart: float
) -> dict[str, Any]:
    own = timings[peer]
    theirs = [name for name in (LOOP, THEIRS) if name in timings]
    best = min(theirs, key=lambda name: timings[name]["whole"].median, default=None)

    def over(part: str) -> Ratio | None:
        return ratio(timings[best][part], own[part]) if best else None

    keys = {
        f"{part}_ms_{kind}": measure(own[part].ms)
        for part in ("first", "token")
        for kind, measure in (("min", min), ("median", statistics.median), ("max", max))
    }
    return {
        **row("generate", peer, own["whole"]),
        "mode": "forward",
        **facts,
        "is_peer": peer == best,
        "tokens_per_s": 1e3 * facts["batch"] / own["token"].median,
        "tokens_per_s_whole": 1e3 * facts["batch"] * facts["new"] / own["whole"].median,
        **keys,
        "logits_apart": logits_apart,
        # times of the peer over those of this row
        **ratio_keys("speedup_over_peer", over("whole")),
        **ratio_keys("speedup_over_peer_first", over("first")),
        **ratio_keys("speedup_over_peer_token", over("token")),
    }
