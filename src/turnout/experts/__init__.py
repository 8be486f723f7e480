"""Expert weights, activations and the backends that compute them: one file and one row a backend."""

from turnout.experts.choose import available_backends, choose_backend, passed_by
from turnout.experts.float8 import Float8FFNExperts
from turnout.experts.fused_cpu import FusedCPU
from turnout.experts.fused_fp8 import FusedFP8
from turnout.experts.fused_int8 import FusedInt8
from turnout.experts.fused_triton import FusedTriton
from turnout.experts.grouped_mm import GroupedMM
from turnout.experts.loop import Loop
from turnout.experts.padded_bmm import PaddedBMM
from turnout.experts.precision import PRECISIONS, quantize_experts
from turnout.experts.quantized import INT8_BITS, QuantizedFFNExperts
from turnout.experts.rounded import RoundedExperts
from turnout.experts.threaded_mm import ThreadedMM
from turnout.experts.weights import FFNExperts, ModuleExperts

__all__ = [
    "INT8_BITS",
    "PRECISIONS",
    "FFNExperts",
    "Float8FFNExperts",
    "FusedCPU",
    "FusedFP8",
    "FusedInt8",
    "FusedTriton",
    "GroupedMM",
    "Loop",
    "ModuleExperts",
    "PaddedBMM",
    "QuantizedFFNExperts",
    "RoundedExperts",
    "ThreadedMM",
    "available_backends",
    "choose_backend",
    "passed_by",
    "quantize_experts",
]
