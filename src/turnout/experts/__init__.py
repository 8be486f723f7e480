"""Expert weights, activations and the backends that compute them: one file and one row a backend."""

from turnout.experts.choose import available_backends, choose_backend
from turnout.experts.grouped_mm import GroupedMM
from turnout.experts.loop import Loop
from turnout.experts.padded_bmm import PaddedBMM
from turnout.experts.weights import FFNExperts, ModuleExperts

__all__ = [
    "FFNExperts",
    "GroupedMM",
    "Loop",
    "ModuleExperts",
    "PaddedBMM",
    "available_backends",
    "choose_backend",
]
