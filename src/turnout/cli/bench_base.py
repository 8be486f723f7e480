"""`--base REV` of the cases of `turnout bench`: their own rows by the code of another revision and by this one."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from turnout.cli.console import console, print_json, table

Base = Annotated[
    str,
    typer.Option(
        metavar="REV",
        help="Compare with the code of this git revision: our rows alone, in processes of their own, in turns.",
        show_default=False,
    ),
]
Turns = Annotated[int, typer.Option(help="Of --base: how often each of the two runs.", min=1)]


def compare_with(
    context: typer.Context,
    *,
    instead: Sequence[dict[str, str]] = ({},),
    also: Sequence[str] = (),
    is_own: Callable[[str], bool] = lambda peer: peer.startswith("turnout"),
) -> None:
    """Run what was typed with both codes and print the ratios.

    `instead`: once with each, options that take the place of those typed; `also`: words behind them.
    """
    from turnout.bench.base import compare

    chosen = context.params
    name = str(context.info_name)
    commands = [[name, *_typed(context, but), *also] for but in instead]
    result = compare(chosen["base"], commands, is_own=is_own, turns=chosen["turns"])
    screen = console(as_json=chosen["as_json"])
    screen.print(_times(name, result))
    for key, words in (("not_in_base", "the base has no"), ("only_in_base", "only the base has")):
        if result[key]:
            screen.print(f"  {words} such row: {', '.join(dict.fromkeys(result[key]))}")
    if chosen["as_json"]:
        print_json(result)


def own_of(peers: Sequence[str], own: Sequence[str]) -> str:
    """Those of `own` that were asked for, or all, with commas between them.

    Raises: ConfigError if others alone were asked for.
    """
    from turnout.errors import ConfigError

    found = [name for name in own if not peers or name in peers]
    if not found:
        raise ConfigError(f"--base compares ours alone; --peers {','.join(peers)} has none of {', '.join(own)}")
    return ",".join(found)


def _typed(context: typer.Context, instead: dict[str, str]) -> list[str]:
    """Options as they were typed, but for those that say how to compare and how to print."""
    words = [f"{option}={value}" for option, value in instead.items()]
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if source is None or source.name != "COMMANDLINE" or parameter.name in ("base", "turns", "as_json"):
            continue
        option, value = parameter.opts[0], context.params[str(parameter.name)]
        if isinstance(value, bool):
            words.append(option if value else parameter.secondary_opts[0])
        elif option not in instead:
            words.append(f"{option}={value}")
    return words


def _times(case: str, result: dict[str, Any]) -> Any:
    columns = {"peer": "left", "case": "left", "base ms": "right", "ms": "right", "times as fast": "right"}
    cells = []
    for row in result["rows"]:
        low, high = row["base_over_now_quartiles"]
        times = f"{row['base_over_now']:.3f} ({low:.3f}-{high:.3f})"
        cells.append([row["peer"], _words(row), f"{row['base_ms_median']:.2f}", f"{row['ms_median']:.2f}", times])
    base = result["base"]
    # all of one command are alike in these
    alike = [f"{row['dtype']}, {row['threads']} threads" for row in result["rows"][:1]]
    titles = [f"{case}: {base['revision']} ({base['commit'][:10]}) over the code at hand", *alike]
    return table(", ".join([*titles, f"{base['turns']} turns"]), columns, cells)


def _words(row: dict[str, Any]) -> str:
    """The name of a shape or its sizes, and what is done with it."""
    shape = row["shape"]
    if shape is None:
        sizes = [f"{name}={row[name]}" for name in ("model", "batch", "tokens") if row[name] is not None]
    else:
        sizes = [shape.get("name") or f"T={shape['tokens']} E={shape['experts']} k={shape['k']}"]
    return " ".join([*sizes, row["mode"]])
