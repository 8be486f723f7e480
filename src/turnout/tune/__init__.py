"""Which r, how many chunks and which program, step by step: predicted, measured, remembered. Never imports torch."""

from turnout.tune.choice import Choice, Key, LayerShape, Workload, alike, key_of
from turnout.tune.dictionary import Dictionary
from turnout.tune.explain import Row, explain
from turnout.tune.predict import Hardware, candidates, predict, predictions
from turnout.tune.search import Entry, Rules, choose, is_warm, observed

__all__ = [
    "Choice",
    "Dictionary",
    "Entry",
    "Hardware",
    "Key",
    "LayerShape",
    "Row",
    "Rules",
    "Workload",
    "alike",
    "candidates",
    "choose",
    "explain",
    "is_warm",
    "key_of",
    "observed",
    "predict",
    "predictions",
]
