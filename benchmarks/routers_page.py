"""Write docs/routers.md: every router on the same text for the same steps, over seeds.

Usage: turnout compare tiny --set "model.moe.router={name='topk', k=2}" --routers all --steps N --seeds 3 --json \
           | tail -1 > RESULT.json
       turnout bench routers --json | tail -1 > BENCH.json
       python -m benchmarks.routers_page RESULT.json [MORE.json ...] --bench BENCH.json \
           --set "model.moe.router={name='topk', k=2}" [--paper-losses LOSSES.json]

Several files are joined: other routers, or the same ones at other seeds. `--set` as of the comparison. LOSSES.json: the
same comparison with other losses, which has a table of its own. With matplotlib it also draws docs/routers.svg.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.routers_plot import plot_losses
from benchmarks.routers_runs import BESIDE, by_router_of, check_alike, differences, mean, order_of, read, speed
from turnout.contracts import RouterConfig
from turnout.train.compared_losses import balance_alone
from turnout.train.recipes import load_recipe
from turnout.train.variants import with_routers

PAGE = Path(__file__).parents[1] / "docs" / "routers.md"
INTRO = """# Routers side by side

Written by `python -m benchmarks.routers_page`: the recipe `{recipe}` with each router, {tokens} tokens each, seeds
{first} to {last}; a router that a loss can move and that does not balance itself has the load-balance loss alone. The
commands are at the end. Loss is nats a token on validation text, mean and spread (greatest less least) over seeds;
beside {beside}: the mean difference at the same seed, below 0 is better; speed: tokens a second over {beside}'s, on a
machine with other work, `-` where {beside} did not run beside it. Dropped (for want of room), left out (by design: none
of LocMoE+'s in evaluation) and undecided (entropy of the scores, 1 is a fair draw) are of the last step of training. On
validation text after training: experts a token; worst load (the greatest over the fair share, less 1, mean over
layers); told by id (share of an expert's identity that the token's id tells); bytes that a layer would send between 8
ranks, there and back, a token. Layer time: a layer forward and backward over one with softmax top-k of as many choices,
in the shapes of `turnout bench routers` on two CPU cores, where `top_p` is held to k experts a token and `remoe` starts
at k:
{shapes}.
"""
PLOT = "routers.svg"
COLUMNS = (
    *("router", "loss", "spread", f"beside {BESIDE}", "speed", "experts a token", "dropped", "left out"),
    *("worst load", "undecided", "told by id", "bytes", "layer time"),
)
SOFT = "soft_moe"


def main() -> None:
    """Raises: SystemExit if the row everything stands beside is missing, or one router's rows are not of one kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--bench", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--paper-losses", type=Path)
    asked = parser.parse_args()
    rows = [row for path in asked.results for row in read(path)]
    recipe, by_router = by_router_of(rows)
    if BESIDE not in by_router:
        sys.exit(f"no rows of the router {BESIDE}, which the others stand beside")
    check_alike(by_router)
    page = _page(recipe, by_router, read(asked.bench), asked.settings)
    if asked.paper_losses:
        page += _other_losses(by_router, by_router_of(read(asked.paper_losses))[1])
    page += _sources([*asked.results, asked.bench, *filter(None, [asked.paper_losses])])
    PAGE.write_text("\n".join(page), encoding="utf-8")
    plot_losses({name: by_router[name] for name in order_of(by_router)}, PAGE.with_name(PLOT))
    print(f"wrote {PAGE.name}: {len(by_router)} routers, {len(rows)} runs")


def _sources(paths: Sequence[Path]) -> list[str]:
    """The file and the command of every figure."""
    notes = [(path.name, json.loads(path.read_text(encoding="utf-8"))["note"]) for path in paths]
    return [
        "## Where the figures come from",
        "",
        *(f"- `benchmarks/results/{name}`: {note}" for name, note in notes),
        "",
    ]


def _page(
    recipe: str,
    by_router: dict[str, list[dict[str, Any]]],
    timed: Sequence[dict[str, Any]],
    settings: Sequence[str],
) -> list[str]:
    rows = [row for runs in by_router.values() for row in runs]
    seeds = sorted({row["seed"] for row in rows})
    tokens = statistics.median(row["tokens"] for row in rows)
    beside = by_router[BESIDE]
    order = order_of(by_router)
    ahead = [name for name in order if _looks_ahead(name, by_router[name][0])]
    fewer = [f"{name} ({len(by_router[name])})" for name in order if len(by_router[name]) < len(seeds)]
    shapes = _shapes(timed)
    return [
        *INTRO.format(
            recipe=recipe,
            tokens=f"{tokens / 1e6:.2f} M",
            first=seeds[0],
            last=seeds[-1],
            beside=BESIDE,
            shapes=";\n".join(shapes),
        ).splitlines(),
        "",
        *([f"A loss that no generation can have, for they see later tokens: {', '.join(ahead)}.", ""] if ahead else []),
        *([f"Of fewer seeds: {', '.join(fewer)}.", ""] if fewer else []),
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
        *(_row(name, by_router[name], beside, timed) for name in order),
        "",
        *_beyond_the_table(timed),
        "",
        f"![Validation loss over tokens, a line a router, mean of its seeds]({PLOT})",
        "",
        *_defaults(order, by_router),
        "",
        *_settings(recipe, by_router, settings),
        "",
    ]


def _beyond_the_table(timed: Sequence[dict[str, Any]]) -> list[str]:
    """What is no router, and what the layer times cannot tell."""
    soft = [f"{row['time_over_topk']:.2f}" for row in timed if row["peer"] == SOFT]
    same = [f"{low:.2f} to {high:.2f}" for row in timed if row["peer"] == BESIDE for low, high in [_quartiles(row)]]
    return [
        "Soft MoE is a layer of its own, whose experts get mixtures of the tokens of a sequence, later ones too, and",
        f"which a decoder refuses: layer time {', '.join(soft)}. Mixture-of-Depths wraps layers and has no row either.",
        "",
        f"What a layer time cannot tell: of two layers alike, both of {BESIDE}, one takes {', '.join(same)} of the",
        "other's (quartiles over rounds, shape by shape).",
    ]


def _quartiles(row: dict[str, Any]) -> tuple[float, float]:
    low, high = row["time_over_topk_quartiles"]
    return low, high


def _other_losses(by_router: dict[str, list[dict[str, Any]]], other: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The routers whose papers train them with other losses, beside themselves with the load-balance loss alone."""
    lines = ["## With the losses of their papers", ""]
    lines += [
        "What `turnout compare` gives a router unless told otherwise; beside itself in the table above, seed by seed.",
        "",
    ]
    lines += ["| router | losses | seeds | loss | beside the table above |", "|---|---|---|---|---|"]
    for name in sorted(other):
        runs = other[name]
        behind = differences(runs, by_router[name])
        if not any(behind):
            continue
        cells = [
            ", ".join(_words(loss) for loss in runs[0]["losses"]),
            ", ".join(str(run["seed"]) for run in runs),
            f"{mean(runs, 'val_loss'):.3f}",
            ", ".join(f"{each:+.3f}" for each in behind),
        ]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return [*lines, ""]


def _shapes(timed: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(_shape_words(row["shape"]) for row in timed))


def _shape_words(shape: dict[str, Any]) -> str:
    return (
        f"{shape['experts']} experts of {shape['dim']} by {shape['hidden']}, {shape['k']} a token, "
        f"{shape['tokens']:,} tokens"
    )


def _row(
    name: str,
    runs: Sequence[dict[str, Any]],
    beside: Sequence[dict[str, Any]],
    timed: Sequence[dict[str, Any]],
) -> str:
    losses = [run["val_loss"] for run in runs]
    behind = statistics.fmean(differences(runs, beside))
    own = {_shape_words(row["shape"]): f"{row['time_over_topk']:.2f}" for row in timed if row["peer"] == name}
    # a shape may not allow a router
    times = [own.get(shape, "-") for shape in _shapes(timed)]
    routing = [run["routing"] for run in runs]
    cells = [
        f"{statistics.fmean(losses):.3f}",
        f"{max(losses) - min(losses):.3f}",
        f"{behind:+.3f}",
        speed(runs, beside),
        f"{mean(routing, 'experts_per_token'):.2f}",
        f"{mean(runs, 'dropped_share'):.1%}",
        f"{mean(runs, 'declined_share'):.1%}",
        f"{mean(routing, 'max_violation'):+.0%}",
        f"{mean(runs, 'router_entropy'):.2f}",
        f"{mean(routing, 'specialisation'):.2f}",
        f"{mean(routing, 'sent_bytes_per_token'):,.0f}",
        ", ".join(times),
    ]
    return f"| `{name}` | {' | '.join(cells)} |"


def _defaults(order: Sequence[str], by_router: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Which routers are ahead of the one beside them at every seed, and what follows for what a layer starts with."""
    ahead = [
        f"`{name}`"
        for name in order
        if not _looks_ahead(name, by_router[name][0])
        and all(difference < 0 for difference in differences(by_router[name], by_router[BESIDE]))
    ]
    followed = (
        "So `tiny`, which has token ids and little time, routes by `hash`."
        if ahead[:1] == ["`hash`"]
        else "`tiny` routes by `hash` all the same: that was chosen on other runs, see docs/LOG.md."
    )
    return [
        "## What the defaults follow from",
        "",
        f"Ahead of `{BESIDE}` at every seed: {', '.join(ahead) or 'none'}.",
        followed,
        f"A layer by itself has no token ids and starts with `{BESIDE}`, the simplest that learns. These are the",
        "first minutes of a training: what learns slowly is judged too early, and small models tell nothing of large.",
    ]


def _settings(recipe: str, by_router: dict[str, list[dict[str, Any]]], settings: Sequence[str]) -> list[str]:
    """What each router was set to, and its losses."""
    lines = ["## Settings", "", "Where they are not the router's own defaults they are those of the recipe:", ""]
    for name in sorted(by_router):
        found = {_words_of(recipe, name, row, settings) for row in by_router[name]}
        if len(found) > 1:
            sys.exit(f"the rows of {name} are of different settings or losses: {'; '.join(sorted(found))}")
        lines += [f"- {words}" for words in found]
    return lines


def _words_of(recipe: str, name: str, row: dict[str, Any], settings: Sequence[str]) -> str:
    router, losses = _recorded(row) if row.get("router") else _as_it_was(recipe, name, settings)
    return f"`{router}`; {', '.join(losses) or 'no auxiliary loss'}"


def _recorded(row: dict[str, Any]) -> tuple[str, list[str]]:
    return _words(row["router"]), [_words(loss) for loss in row["losses"]]


def _words(part: dict[str, Any]) -> str:
    values = [f"{k}={_words(v) if isinstance(v, dict) else repr(v)}" for k, v in part.items() if k != "name"]
    return f"{part['name']}({', '.join(values)})"


def _as_it_was(recipe: str, name: str, settings: Sequence[str]) -> tuple[str, list[str]]:
    """Of rows that do not say: the comparison then gave every router that needs a loss the load-balance loss."""
    (variant,) = with_routers(load_recipe(recipe, settings), [name])
    assert variant.recipe.model.moe is not None
    router = variant.recipe.model.moe.router
    return repr(router), [repr(loss) for loss in balance_alone(router)]


def _looks_ahead(name: str, row: dict[str, Any]) -> bool:
    """Whether its validation loss is of tokens that see later ones."""
    told = row.get("sees_later_tokens")
    return not RouterConfig.TABLE[name]().causal if told is None else "evaluation" in told


if __name__ == "__main__":
    main()
