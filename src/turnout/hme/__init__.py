"""Hierarchical mixtures of experts (Jordan & Jacobs 1994) as scikit-learn estimators; needs `turnout[hme]`."""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from turnout.errors import ConfigError

if TYPE_CHECKING:
    from turnout.hme.bridge import hidden_for, to_moe
    from turnout.hme.classifier import HMEClassifier
    from turnout.hme.distribution import Predictive
    from turnout.hme.plots import plot_fit, plot_tree
    from turnout.hme.regressor import HMERegressor

_HOME = {
    "HMEClassifier": "turnout.hme.classifier",
    "HMERegressor": "turnout.hme.regressor",
    "Predictive": "turnout.hme.distribution",
    "hidden_for": "turnout.hme.bridge",
    "plot_fit": "turnout.hme.plots",
    "plot_tree": "turnout.hme.plots",
    "to_moe": "turnout.hme.bridge",
}

__all__ = ["HMEClassifier", "HMERegressor", "Predictive", "hidden_for", "plot_fit", "plot_tree", "to_moe"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'turnout.hme' has no attribute {name!r}")
    if importlib.util.find_spec("sklearn") is None:
        raise ConfigError(f"turnout.hme.{name} needs scikit-learn: pip install 'turnout[hme]'")
    return getattr(importlib.import_module(_HOME[name]), name)
