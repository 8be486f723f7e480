"""Write docs/routers.md: every router on the same text for the same steps, over seeds.

Usage: turnout compare tiny --set "model.moe.router={name='topk', k=2}" --routers all --steps N --seeds 3 --json \
           | tail -1 > RESULT.json
       turnout bench routers --json | tail -1 > BENCH.json
       python -m benchmarks.routers_page RESULT.json [MORE.json ...] --bench BENCH.json \
           --set "model.moe.router={name='topk', k=2}"

Several files are joined: other routers, or the same ones at other seeds. `--set` as of the comparison.
"""

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from turnout.contracts import RouterConfig
from turnout.train.compared_losses import balance_alone
from turnout.train.recipes import load_recipe
from turnout.train.variants import with_routers

PAGE = Path(__file__).parents[1] / "docs" / "routers.md"
BESIDE = "topk"  # whose loss the others stand beside
INTRO = """# Routers side by side

Written by `python -m benchmarks.routers_page` from `turnout compare {recipe} --routers all`: the recipe `{recipe}` with
each router, {tokens} tokens each, seeds {first} to {last}. Loss is nats a token on validation text, mean and spread
(greatest less least) over seeds; beside {beside}: the mean difference at the same seed, below 0 is better. Dropped (for
want of room), left out (by design) and undecided (entropy of the scores, 1 is a fair draw) are of the last step of
training. On validation text after training: experts a token; worst load (the greatest over the fair share, less 1,
mean over layers); told by id (share of an expert's identity that the token's id tells); bytes that a layer would send
between 8 ranks, there and back, a token. Time: a layer forward and backward over one with softmax top-k of as many
choices, in the shapes of `turnout bench routers` on two CPU cores:
{shapes}.
"""
COLUMNS = (
    *("router", "loss", "spread", f"beside {BESIDE}", "experts a token", "dropped", "left out"),
    *("worst load", "undecided", "told by id", "bytes", "time"),
)


def main() -> None:
    """Raises: SystemExit if the row everything stands beside is missing, or one router's rows are not of one kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--bench", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], dest="settings")
    asked = parser.parse_args()
    rows = [row for path in asked.results for row in _read(path)]
    recipe, by_router = _by_router(rows)
    if BESIDE not in by_router:
        sys.exit(f"no rows of the router {BESIDE}, which the others stand beside")
    _check_alike(by_router)
    page = _page(recipe, by_router, _read(asked.bench), asked.settings)
    PAGE.write_text("\n".join(page), encoding="utf-8")
    print(f"wrote {PAGE.name}: {len(by_router)} routers, {len(rows)} runs")


def _check_alike(by_router: dict[str, list[dict[str, Any]]]) -> None:
    """Raises: SystemExit if a router had other tokens than the one beside it, or no seed in common with it."""
    wanted = {run["tokens"] for run in by_router[BESIDE]}
    for name, runs in by_router.items():
        if {run["tokens"] for run in runs} != wanted:
            sys.exit(f"{name} was trained on another number of tokens than {BESIDE}: their losses do not compare")
        if not _differences(runs, by_router[BESIDE]):
            sys.exit(f"{name} has no seed in common with {BESIDE}")


def _read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["rows"]


def _by_router(rows: Sequence[dict[str, Any]]) -> tuple[str, dict[str, list[dict[str, Any]]]]:
    """The recipe's name, and the complete runs of each router."""
    recipe = _shared_start([row["recipe"] for row in rows])
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["complete"]:
            found[row["recipe"].removeprefix(f"{recipe}-")].append(row)
    return recipe, found


def _shared_start(names: Sequence[str]) -> str:
    router = next(r for r in sorted(RouterConfig.TABLE.names(), key=len, reverse=True) if names[0].endswith(f"-{r}"))
    return names[0].removesuffix(f"-{router}")


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
    order = sorted(by_router, key=lambda name: _mean(by_router[name], "val_loss"))
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
        *_defaults(order, by_router),
        "",
        *_settings(recipe, by_router, settings),
        "",
    ]


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
    behind = statistics.fmean(_differences(runs, beside))
    own = {_shape_words(row["shape"]): f"{row['time_over_topk']:.2f}" for row in timed if row["peer"] == name}
    # a shape may not allow a router
    times = [own.get(shape, "-") for shape in _shapes(timed)]
    routing = [run["routing"] for run in runs]
    cells = [
        f"{statistics.fmean(losses):.3f}",
        f"{max(losses) - min(losses):.3f}",
        f"{behind:+.3f}",
        f"{_mean(routing, 'experts_per_token'):.2f}",
        f"{_mean(runs, 'dropped_share'):.1%}",
        f"{_mean(runs, 'declined_share'):.1%}",
        f"{_mean(routing, 'max_violation'):+.0%}",
        f"{_mean(runs, 'router_entropy'):.2f}",
        f"{_mean(routing, 'specialisation'):.2f}",
        f"{_mean(routing, 'sent_bytes_per_token'):,.0f}",
        ", ".join(times),
    ]
    return f"| `{name}` | {' | '.join(cells)} |"


def _mean(rows: Sequence[dict[str, Any]], key: str) -> float:
    return statistics.fmean(row[key] for row in rows)


def _defaults(order: Sequence[str], by_router: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Which routers are ahead of the one beside them at every seed, and what follows for what a layer starts with."""
    ahead = [
        f"`{name}`"
        for name in order
        if not _looks_ahead(name, by_router[name][0])
        and all(difference < 0 for difference in _differences(by_router[name], by_router[BESIDE]))
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


def _differences(runs: Sequence[dict[str, Any]], beside: Sequence[dict[str, Any]]) -> list[float]:
    """Loss less that of the other router at the same seed."""
    same_seed = {run["seed"]: run["val_loss"] for run in beside}
    return [run["val_loss"] - same_seed[run["seed"]] for run in runs if run["seed"] in same_seed]


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
