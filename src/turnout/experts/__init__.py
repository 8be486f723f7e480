"""Expert weights, activations and the backends that compute them: one file and one row a backend."""

from turnout.experts.choose import available_backends, choose_backend, passed_by
from turnout.experts.fused_cpu import FusedCPU
from turnout.experts.fused_int8 import FusedInt8
from turnout.experts.fused_triton import FusedTriton
from turnout.experts.grouped_mm import GroupedMM
from turnout.experts.loop import Loop
from turnout.experts.padded_bmm import PaddedBMM
from turnout.experts.quantized import PRECISIONS, QuantizedFFNExperts, quantize_experts
from turnout.experts.threaded_mm import ThreadedMM
from turnout.experts.weights import FFNExperts, ModuleExperts

__all__ = [
    "PRECISIONS",
    "FFNExperts",
    "FusedCPU",
    "FusedInt8",
    "FusedTriton",
    "GroupedMM",
    "Loop",
    "ModuleExperts",
    "PaddedBMM",
    "QuantizedFFNExperts",
    "ThreadedMM",
    "available_backends",
    "choose_backend",
    "passed_by",
    "quantize_experts",
]
