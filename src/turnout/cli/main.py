"""`turnout VERB`: the table of verbs, and the one place where errors become exit codes."""

import os
import sys

import typer

from turnout import __version__
from turnout.cli import bench, chat, compare, data, doctor, generate, plan, report, train, verify
from turnout.cli.console import print_error
from turnout.errors import ConfigError, RequestError, TurnoutError

app = typer.Typer(
    name="turnout",
    help="Mixture-of-Experts for PyTorch: train, talk to, look at and compare MoE models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for verb in (train, chat, generate, report, compare, bench, data, doctor, verify, plan):
    verb.add_to(app)


@app.callback(invoke_without_command=True)
def root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    """Options of `turnout` itself."""
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Exit codes: 0 done, 1 failed, 2 bad use, 128 + n stopped by signal n after saving."""
    try:
        app()
    except TurnoutError as error:
        # what every rank finds wrong the first one says
        if not isinstance(error, ConfigError | RequestError) or os.environ.get("RANK", "0") == "0":
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
