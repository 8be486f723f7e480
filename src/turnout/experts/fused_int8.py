"""Experts of 8 bits in one compiled pass on the CPU, for inference."""

import functools
from pathlib import Path

import torch
from torch import Tensor, nn

from turnout.contracts import ExpertBackend, FewCall, FusedBackend, Refusal
from turnout.experts.activations import kernels_failure
from turnout.experts.int8_op import int8_experts
from turnout.experts.quantized import QuantizedFFNExperts
from turnout.kernels import Int8Weights, Kernel, trusted_kernel
from turnout.kernels.build import Library, compiled, has_vnni
from turnout.kernels.int8_proof import prove_int8
from turnout.kernels.matrix_unit import trusted_by_matrix_unit
from turnout.kernels.proof import once
from turnout.tensors import Admission, Assignment, SoftmaxChoice, is_traced

DTYPES = (torch.float32, torch.bfloat16)


class FusedInt8(FusedBackend):
    """Products of codes as whole numbers, by VNNI where there is such; of many rows by AMX, in bfloat16."""

    trains = False

    def refusal(self, experts: nn.Module, *, dtype: torch.dtype, device: torch.device) -> Refusal | None:
        if not isinstance(experts, QuantizedFFNExperts):
            return Refusal(
                reason="fused_int8 computes experts after quantize_experts(model); others need backend='loop'"
            )
        reason = _reason(experts, dtype, device)
        return Refusal(reason=f"{reason}; use backend='loop'") if reason else None

    def few_call(self, experts: nn.Module, choice: SoftmaxChoice, *, dtype: torch.dtype) -> FewCall | None:
        assert isinstance(experts, QuantizedFFNExperts)
        kernel = trusted_int8()
        assert isinstance(kernel, Kernel)
        return kernel.few(choice, int8_weights(experts), dtype=dtype, digits=experts.digits)

    def run_tokens(self, experts: nn.Module, x_TD: Tensor, assignment: Assignment, admission: Admission) -> Tensor:
        """Raises: ConfigError if a gradient is to come back through the experts."""
        assert isinstance(experts, QuantizedFFNExperts)
        experts.check_inference(x_TD, assignment.weight_N)
        weights, digits = int8_weights(experts), experts.digits
        rows = x_TD.detach().float().contiguous(), assignment.weight_N.detach().float().contiguous()
        if is_traced(*rows, *weights.matrices):
            own = list(weights.matrices), weights.up_bias_EG, weights.down_bias_ED
            routes = assignment.token_N, assignment.expert_N, admission.keep_N
            y_TD = int8_experts(*rows, *own, *routes, weights.hidden, weights.kind, digits, _uses_matrix_unit())
            return y_TD.to(x_TD.dtype)
        kernel = trusted_int8()
        assert isinstance(kernel, Kernel)
        y_TD = kernel.infer_int8(*rows, weights, kernel.sort(assignment, admission.keep_N), digits=digits)
        return y_TD.to(x_TD.dtype)


@functools.cache
def trusted_int8() -> Kernel | str:
    """The kernel, once its pass of 8 bits is proven too, or why there is none."""
    kernel = trusted_kernel()
    if isinstance(kernel, str):
        return kernel
    doubt = once(functools.partial(prove_int8, kernel), _proof())
    unit = doubt or int8_by_matrix_unit()
    return unit if isinstance(unit, Kernel) else doubt or kernel


@functools.cache
def int8_by_matrix_unit() -> Kernel | str:
    """The same, with many rows by the processor's matrix unit; or why there is none."""
    return trusted_by_matrix_unit(prove_int8, ".int8-amx-proven")


def int8_instructions() -> str:
    """What multiplies, and why nothing faster does."""
    unit = int8_by_matrix_unit()
    if isinstance(unit, Kernel):
        return "AMX"
    return f"VNNI; {unit}" if has_vnni() else "no VNNI here: right, but not fast"


def _proof() -> Path:
    library = compiled()
    assert isinstance(library, Library)
    return library.path.with_suffix(".int8-proven")


def int8_weights(experts: QuantizedFFNExperts) -> Int8Weights:
    """The codes as the kernel reads them: contiguous."""
    biases = (experts.up_bias_EG, experts.down_bias_ED)
    up_bias_EG, down_bias_ED = (None if bias is None else bias.float().contiguous() for bias in biases)
    return Int8Weights(
        up_codes=experts.up_codes.contiguous(),
        up_scales=experts.up_scales.contiguous(),
        up_bases=experts.up_bases.contiguous(),
        down_codes=experts.down_codes.contiguous(),
        down_scales=experts.down_scales.contiguous(),
        down_bases=experts.down_bases.contiguous(),
        up_bias_EG=up_bias_EG,
        down_bias_ED=down_bias_ED,
        hidden=experts.hidden,
        kind=experts.kind,
    )


def _reason(experts: QuantizedFFNExperts, dtype: torch.dtype, device: torch.device) -> str:
    if device.type != "cpu":
        return f"fused_int8 computes on the CPU, not on {device.type}"
    if failure := kernels_failure("fused_int8", experts.kind, experts.activation):
        return failure
    if dtype not in DTYPES:
        return f"fused_int8 computes tokens in float32 and bfloat16, not {dtype}"
    return _kernel_failure()


# torch.compile asks once instead of tracing how a kernel is compiled
@torch.compiler.assume_constant_result
def _kernel_failure() -> str:
    kernel = trusted_int8()
    return kernel if isinstance(kernel, str) else ""


@torch.compiler.assume_constant_result
def _uses_matrix_unit() -> bool:
    kernel = trusted_int8()
    return isinstance(kernel, Kernel) and kernel.matrix_unit


ExpertBackend.TABLE.register("fused_int8")(FusedInt8())
