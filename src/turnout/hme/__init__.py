"""Hierarchical mixtures of experts (Jordan & Jacobs 1994) as scikit-learn estimators; needs `turnout[hme]`."""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from turnout.errors import ConfigError

if TYPE_CHECKING:
    from turnout.hme.distribution import Predictive
    from turnout.hme.estimators import HMEClassifier, HMERegressor

_HOME = {
    "HMEClassifier": "turnout.hme.estimators",
    "HMERegressor": "turnout.hme.estimators",
    "Predictive": "turnout.hme.distribution",
}

__all__ = ["HMEClassifier", "HMERegressor", "Predictive"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'turnout.hme' has no attribute {name!r}")
    if importlib.util.find_spec("sklearn") is None:
        raise ConfigError(f"turnout.hme.{name} needs scikit-learn: pip install 'turnout[hme]'")
    return getattr(importlib.import_module(_HOME[name]), name)
