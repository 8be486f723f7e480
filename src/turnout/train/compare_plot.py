"""What a comparison leaves behind: comparison.json always, comparison.svg where matplotlib is installed."""

import importlib.util
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from turnout.train.compare import Curve
from turnout.train.verdicts import verdicts


def write_comparison(curves: Sequence[Curve], out: Path, baseline: str = "") -> Path:
    """Write the curves and verdicts against `baseline`, and a plot if matplotlib is there; returns the path to show."""
    content = {"curves": [asdict(c) for c in curves], "verdicts": [asdict(v) for v in verdicts(curves, baseline)]}
    path = out / "comparison.json"
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        return path
    return _plot(curves, out / "comparison.svg")


def _plot(curves: Sequence[Curve], path: Path) -> Path:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True, constrained_layout=True)
    names = list(dict.fromkeys(c.recipe for c in curves))
    for curve in curves:
        color = f"C{names.index(curve.recipe)}"
        label = curve.recipe if curve.seed == curves[0].seed else None
        axes[0].plot([s / 60 for s in curve.seconds], curve.val_loss, color=color, label=label)
        axes[1].plot([t / 1e6 for t in curve.tokens], curve.val_loss, color=color)
    axes[0].set_xlabel("training minutes")
    axes[1].set_xlabel("million tokens")
    axes[0].set_ylabel("validation loss (nats per token)")
    axes[0].legend(frameon=False)
    # the first evaluations, one of each recipe, would press the rest together
    losses = sorted(loss for c in curves for loss in c.val_loss if math.isfinite(loss))
    if len(losses) > 2 * len(names):
        axes[0].set_ylim(top=losses[-len(names) - 1])
    figure.savefig(path)
    pyplot.close(figure)
    return path
