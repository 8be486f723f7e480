"""`turnout plan`: the planner. It never imports torch."""

import typer

from turnout.errors import ConfigError

ISSUE = "the planner is not part of this version: see docs/roadmap.md"


def add_to(app: typer.Typer) -> None:
    app.command(hidden=False)(plan)


def plan() -> None:
    """Predict traffic, memory, time and cost of a MoE on a cluster (not in this version yet)."""
    raise ConfigError(ISSUE)
