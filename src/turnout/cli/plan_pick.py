"""What a question leaves to others: the layout to the search, the skew to a recorded run."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from turnout.plan.query import Query


def with_layout(query: "Query", layout: str, screen: Any) -> "Query":
    """The query as it is if the user gave a layout; else with the search's pick, which is said.

    Raises: ConfigError if no layout fits the devices.
    """
    from turnout.errors import ConfigError

    if layout:
        return query
    from turnout.plan.search import search

    result = search(query, top=1)
    if not result.best:
        raise ConfigError(
            f"none of {result.considered:,} layouts fits {query.world:,} x {query.machine.device.name}: the one that "
            f"needs least needs {result.least_memory_gib:,.1f} GiB; give more devices, or a --layout to look at"
        )
    screen.print(f"  no --layout: the fastest that fits of {result.considered:,} searched in {result.seconds:.1f} s")
    return query.with_strategy(result.best[0].strategy)


def with_skew_of(query: "Query", trace: Path | None, layer: str) -> tuple["Query", "Query"]:
    """The query as a recorded run skews it, for time (mean) and for memory (worst); as it is, twice, without a run.

    Raises: ConfigError if the run has no trace, its layers or experts are not the model's, or the routing is said too.
    """
    from turnout.errors import ConfigError

    if trace is None:
        if layer != "all":
            raise ConfigError(f"--layer {layer} is of a trace; give --trace RUN too, or leave it out")
        return query, query
    from dataclasses import replace

    for name, plain in (("skew", 1.0), ("capacity_factor", 0.0)):
        if getattr(query, name) != plain:
            option = "--" + name.replace("_", "-")
            raise ConfigError(f"{option} {getattr(query, name):g} and --trace {trace} both say how tokens go; drop one")

    from turnout.plan.recorded import recorded_loads, skewed_jobs

    timed, held = skewed_jobs(query.job(), recorded_loads(trace, query.shape, layer))
    return replace(query, skew=timed.skew), replace(query, skew=held.skew)
