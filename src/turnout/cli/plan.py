"""`turnout plan VERB`: the planner. It never imports torch."""

import typer

from turnout.cli import (
    plan_explain,
    plan_inference,
    plan_lists,
    plan_memory,
    plan_placement,
    plan_predict,
    plan_search,
    plan_time,
    plan_validate,
    plan_volume,
)

plan = typer.Typer(
    help="What a model with experts does to network, memory, time and bill, on machines you need not have.",
    no_args_is_help=True,
    epilog="Example: turnout plan time tiny --nodes 1 --layout ep=8",
)
for verb in (
    plan_search, plan_time, plan_memory, plan_volume, plan_inference, plan_explain, plan_validate, plan_predict,
    plan_placement, plan_lists,
):  # fmt: skip
    verb.add_to(plan)


def add_to(app: typer.Typer) -> None:
    app.add_typer(plan, name="plan")
