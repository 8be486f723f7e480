"""What `turnout compare` says when it is done: tables for people, rows for scripts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from turnout.cli.console import table


def print_comparison(screen: Any, curves: list[Any], path: Path, baseline: str, budget: str) -> None:
    """Tables of the runs and of their routing, and the verdicts in words."""
    from turnout.train.verdicts import verdicts

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


def print_setups(screen: Any, variants: list[Any]) -> None:
    """Before anything is trained: each router and its losses, what could not be as asked, and who sees later tokens."""
    from turnout.bench.run import words
    from turnout.train.routing_setup import routing_setup

    found = [(v, setup) for v in variants if (setup := routing_setup(v.recipe)) is not None]
    if not found:
        return
    cells = []
    for variant, setup in found:
        moe = variant.recipe.model.moe
        own = [f"its own: {setup.own_balance}"] if setup.own_balance else []
        losses = [
            f"{loss.coefficient:g} {words(replace(loss, coefficient=type(loss)().coefficient))}" for loss in moe.losses
        ]
        cells.append([variant.recipe.name, words(moe.router), " + ".join([*losses, *own]) or "none"])
    screen.print(
        table("What is trained", {"recipe": "left", "router": "left", "balance and other losses": "left"}, cells)
    )
    for variant, setup in found:
        for note in variant.notes:
            screen.print(f"  {variant.recipe.name}: {note}")
        if setup.sees_later_tokens:
            screen.print(f"  {variant.recipe.name} {_looks_ahead(setup.sees_later_tokens)}")


def _looks_ahead(phases: str) -> str:
    if phases == "training":
        return "sees later tokens in training alone: its training loss is too good, its validation loss is not"
    return f"sees later tokens in {phases}: its validation loss is one that no generation can have"


def rows_of(curves: list[Any]) -> list[dict[str, Any]]:
    """A row of `--json` for each recipe and seed."""
    from turnout.train.verdicts import seconds_to

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
            **_setup(c.setup),
            "seconds_to_loss_of": {
                name: seconds_to(c, final[name, c.seed])
                for name in names
                if name != c.recipe and (name, c.seed) in final
            },
            "curve": {"seconds": c.seconds, "tokens": c.tokens, "val_loss": c.val_loss},
        }
        for c in curves
    ]


def _setup(setup: Any) -> dict[str, Any]:
    """The same keys for a dense recipe, so that every row has them."""
    names = ("router", "capacity", "losses", "own_balance", "sees_later_tokens")
    return {name: None if setup is None else getattr(setup, name) for name in names}
