"""docs/routers.svg: how the validation loss falls with each router."""

import importlib.util
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STYLES = ("-", "--", ":")  # ten colours, then the same ones dashed


def plot_losses(by_router: Mapping[str, Sequence[dict[str, Any]]], path: Path) -> None:
    """A line a router, mean of its seeds, the best at the end first; without matplotlib nothing is drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        print(f"matplotlib is not installed: {path.name} stays as it is")
        return
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = path.name  # the same picture from the same figures
    figure, axes = pyplot.subplots(figsize=(9, 5), constrained_layout=True)
    for number, (name, runs) in enumerate(by_router.items()):
        tokens, losses = _mean_curve(runs)
        axes.plot(tokens, losses, STYLES[number // 10], color=f"C{number % 10}", label=name, linewidth=1.2)
    axes.set_xlabel("million tokens")
    axes.set_ylabel("validation loss (nats per token)")
    axes.set_ylim(top=7.0)
    axes.legend(frameon=False, ncols=2)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _mean_curve(runs: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    curves = [run["curve"] for run in runs]
    tokens = [count / 1e6 for count in curves[0]["tokens"]]
    return tokens, [statistics.fmean(at) for at in zip(*(curve["val_loss"] for curve in curves), strict=True)]
