"""`turnout VERB`: the table of verbs, and the one place where errors become exit codes."""

import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module

import typer

from turnout import __version__
from turnout.cli.console import print_error
from turnout.errors import ConfigError, RequestError, TurnoutError

# each is a module of turnout.cli (with _ for -), in the order of --help
VERBS = (
    "train",
    "chat",
    "generate",
    "report",
    "compare",
    "bench",
    "data",
    "doctor",
    "verify",
    "plan",
    "tune",
    "fit-hme",
)

GROUPS = ("plan",)  # of these, verbs that have verbs of their own, many


def app_of(words: Sequence[str] = ()) -> typer.Typer:
    """The command line with the verb that `words` begin with, or with all: to read all takes longer than most plans."""
    app = typer.Typer(
        name="turnout",
        help="Mixture-of-Experts for PyTorch: train, talk to, look at and compare MoE models.",
        no_args_is_help=True,
        epilog="Example: turnout train tiny --minutes 5; turnout chat runs/tiny-1; turnout VERB --help says more.",
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )
    app.callback(invoke_without_command=True)(root)
    for verb in [word for word in words[:1] if word in VERBS] or VERBS:
        module = import_module(f"turnout.cli.{verb.replace('-', '_')}")
        if verb in GROUPS:
            module.add_to(app, words[1:])
        else:
            module.add_to(app)
    return app


def root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    """Options of `turnout` itself."""
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Exit codes: 0 done, 1 failed, 2 bad use, 128 + n stopped by signal n after saving."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # as stderr has it: what the terminal cannot show comes as an escape, and is no reason to stop
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app_of(sys.argv[1:])()
    except TurnoutError as error:
        # what every rank finds wrong the first one of a node says
        if not isinstance(error, ConfigError | RequestError) or os.environ.get("LOCAL_RANK", "0") == "0":
            print_error(str(error))
        sys.exit(2 if isinstance(error, ConfigError | RequestError) else 1)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            # the reader (head, less) is gone; nothing is left to say
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        else:
            print_error(str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        print_error("interrupted")
        sys.exit(130)
