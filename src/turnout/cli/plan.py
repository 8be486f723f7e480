"""`turnout plan VERB`: the planner. It never imports torch."""

from collections.abc import Sequence
from importlib import import_module

import typer

# verb -> the module of turnout.cli that has it, in the order of --help
VERBS = {
    "search": "plan_search",
    "time": "plan_time",
    "memory": "plan_memory",
    "volume": "plan_volume",
    "inference": "plan_inference",
    "explain": "plan_explain",
    "validate": "plan_validate",
    "predict": "plan_predict",
    "placement": "plan_placement",
    "models": "plan_lists",
    "clusters": "plan_lists",
}


def add_to(app: typer.Typer, words: Sequence[str] = ()) -> None:
    """Adds the verb that `words` begin with, or all: typer prepares every option of what it is given."""
    plan = typer.Typer(
        help="What a model with experts does to network, memory, time and bill, on machines you need not have.",
        no_args_is_help=True,
        epilog="Example: turnout plan time tiny --nodes 1 --layout ep=8",
    )
    wanted = [VERBS[word] for word in words[:1] if word in VERBS] or dict.fromkeys(VERBS.values())
    for name in wanted:
        import_module(f"turnout.cli.{name}").add_to(plan)
    app.add_typer(plan, name="plan")
