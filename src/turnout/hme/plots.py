"""Pictures of a fitted tree with matplotlib (`turnout[plot]`): its gates, and the piecewise fit along one input."""

import importlib.util
from collections.abc import Iterable
from typing import Any

import numpy as np
from sklearn.utils.validation import check_is_fitted

from turnout.errors import ConfigError
from turnout.hme.base import HMEBase
from turnout.hme.regressor import HMERegressor
from turnout.hme.text import placed
from turnout.hme.tree import CLOSED

GRID = 400  # points of a curve


def plot_tree(estimator: HMEBase, feature_names: Iterable[str] | None = None, ax: Any = None) -> Any:
    """The tree, with the direction of each gate as bars by input and experts as discs below it; returns the axes.

    Bars are the weights of standardized inputs towards the gate's first branch.
    Raises: ConfigError without matplotlib; NotFittedError before fit; ValueError for another number of names.
    """
    check_is_fitted(estimator)
    mixture = estimator.mixture_
    ax = _axes(ax)
    names = estimator.input_names(feature_names)
    place, depth = placed(mixture.tree)
    for gate in range(mixture.tree.num_gates):
        x, level = place[gate]
        for child in mixture.tree.child_GB[gate]:
            if child != CLOSED:
                ax.plot([x, place[int(child)][0]], [-level, -place[int(child)][1]], color="0.7", zorder=1)
        weight_D = mixture.gate_GPO[gate, :-1, 0]
        bar_D = weight_D / max(float(np.abs(weight_D).max(initial=0)), 1e-12)
        at_D = x + np.linspace(-0.3, 0.3, len(bar_D))
        ax.bar(at_D, 0.3 * bar_D, 0.5 / len(bar_D), bottom=-level, color=np.where(bar_D > 0, "C1", "C0"), zorder=2)
        ax.text(x, -level + 0.36, names[int(np.abs(weight_D).argmax())], ha="center", fontsize=8)
    for leaf in range(mixture.tree.num_leaves):
        x, level = place[~leaf]
        ax.scatter([x], [-level], s=120, color="C2", zorder=2)
        ax.text(x, -level - 0.3, f"expert {leaf}", ha="center", fontsize=8)
    ax.set(ylim=(-depth - 0.6, 0.7), xticks=[], yticks=[])
    return ax


def plot_fit(estimator: HMERegressor, X: Any, y: Any, feature: int = 0, ax: Any = None) -> Any:
    """The fit along one input, others at their means: mean, 90 % band, and each expert where it answers; returns axes.

    Shapes: X (N, D), where NaN is left out; y (N,). `feature`: the column of X.
    Raises: ConfigError without matplotlib, for several outputs or a feature that X lacks; NotFittedError before fit.
    """
    check_is_fitted(estimator)
    x_ND = np.asarray(X, dtype=np.float64)
    if len(estimator.target_scale_.mean_D) > 1:
        raise ConfigError(f"plot_fit draws one output, not {len(estimator.target_scale_.mean_D)}: fit them one by one")
    if not 0 <= feature < estimator.n_features_in_:
        raise ConfigError(f"feature={feature} must be 0 to {estimator.n_features_in_ - 1}")
    ax = _axes(ax)
    grid_N = np.linspace(np.nanmin(x_ND[:, feature]), np.nanmax(x_ND[:, feature]), GRID)
    at_ND = np.tile(np.nanmean(x_ND, axis=0), (GRID, 1))
    at_ND[:, feature] = grid_N
    predicted = estimator.predict_dist(at_ND)
    ax.scatter(x_ND[:, feature], np.asarray(y), s=8, color="0.6")
    low_N, high_N = predicted.quantile(0.05)[:, 0], predicted.quantile(0.95)[:, 0]
    ax.fill_between(grid_N, low_N, high_N, color="C0", alpha=0.15, label="90 % of the distribution")
    for leaf in range(predicted.weight_NL.shape[1]):
        answers_N = predicted.weight_NL[:, leaf] > 0.5
        if answers_N.any():
            ax.plot(grid_N, np.where(answers_N, predicted.mean_NLO[:, leaf, 0], np.nan), color="C1", lw=1)
    ax.plot(grid_N, predicted.mean[:, 0], color="C0", label="mean")
    ax.legend(frameon=False)
    return ax


def _axes(ax: Any) -> Any:
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("plots need matplotlib: pip install 'turnout[plot]'")
    if ax is not None:
        return ax
    from matplotlib.figure import Figure

    return Figure(figsize=(8, 4.5), layout="constrained").add_subplot()
