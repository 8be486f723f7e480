"""Expert weights, activations and the backends that compute them: one file and one row a backend."""

from turnout.experts.choose import available_backends, choose_backend
from turnout.experts.fused_cpu import FusedCPU
from turnout.experts.grouped_mm import GroupedMM
from turnout.experts.loop import Loop
from turnout.experts.padded_bmm import PaddedBMM
from turnout.experts.threaded_mm import ThreadedMM
from turnout.experts.weights import FFNExperts, ModuleExperts

__all__ = [
    "FFNExperts",
    "FusedCPU",
    "GroupedMM",
    "Loop",
    "ModuleExperts",
    "PaddedBMM",
    "ThreadedMM",
    "available_backends",
    "choose_backend",
]
