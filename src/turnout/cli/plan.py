"""`turnout plan`: the planner. It never imports torch."""

import typer

from turnout.cli import options
from turnout.errors import ConfigError


def add_to(app: typer.Typer) -> None:
    app.command()(plan)


def plan(as_json: options.Json = False) -> None:
    """Predict traffic, memory, time and cost of a MoE on a cluster (not in this version yet)."""
    raise ConfigError("the planner is not part of this version: see docs/roadmap.md")
