"""All experts in one compiled pass on the CPU: gather, products, activation, weighted sum, while rows are in cache."""

from typing import Any

import torch
from torch import Tensor, nn

from turnout.contracts import ExpertBackend, FewCall, FusedBackend, Refusal
from turnout.experts.activations import kernels_failure
from turnout.experts.fused_op import fused_experts, half_by_matrix_unit, in_dtypes_of, kernel_weights, the_kernel
from turnout.experts.weights import FFNExperts
from turnout.kernels import Kernel, Routing, trusted_kernel
from turnout.kernels.build import cpu_flags
from turnout.kernels.consumed import is_last_pass, is_read_once, mapped_bytes
from turnout.tensors import Admission, Assignment, SoftmaxChoice, first_order, is_traced

LEAST_BYTES = 1 << 20  # of values saved, whose memory is given back: of less the call would be most of it
DTYPES = (torch.float32, torch.bfloat16)


class _Fused(torch.autograd.Function):
    """Saves its inputs and the values before the activation."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_N: Tensor,
        up_EDG: Tensor,
        down_EFD: Tensor,
        up_bias_EG: Tensor | None,
        down_bias_ED: Tensor | None,
        kind: str,
        routing: Routing,
        kernel: Kernel,
    ) -> Tensor:
        weights = kernel_weights(up_EDG, down_EFD, up_bias_EG, down_bias_ED, kind)
        mapped = mapped_bytes()
        y_TD, saved = kernel.forward(x_TD, weight_N, weights, routing, saved_rows=routing.num_rows)
        assert saved is not None
        own = saved.nbytes >= LEAST_BYTES and mapped_bytes() - mapped >= saved.nbytes
        ctx.may_give_back = own and is_read_once()
        ctx.save_for_backward(x_TD, weight_N, weights.up_EDG, weights.down_EFD, up_bias_EG, down_bias_ED, saved)
        ctx.kind, ctx.routing, ctx.kernel = kind, routing, kernel
        return y_TD

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_TD, weight_N, up_EDG, down_EFD, up_bias_EG, down_bias_ED, saved = ctx.saved_tensors
        weights = kernel_weights(up_EDG, down_EFD, up_bias_EG, down_bias_ED, ctx.kind)
        found = ctx.kernel.backward(
            grads[0].contiguous(),
            x_TD,
            weight_N,
            weights,
            ctx.routing,
            saved,
            wanted=ctx.needs_input_grad[:6],
            give_back=ctx.may_give_back and is_last_pass(),
        )
        return (*in_dtypes_of(weights, found), None, None, None)


class FusedCPU(FusedBackend):
    """The kernel of turnout.kernels, in float32; bfloat16 weights are widened as they are read.

    Where there is AMX, tokens and weights of bfloat16 stay what they are, forward and backward, and those of float32
    are multiplied by it in three parts of eight bits, as exactly as by vectors.
    """

    def refusal(self, experts: nn.Module, *, dtype: torch.dtype, device: torch.device) -> Refusal | None:
        if not isinstance(experts, FFNExperts):
            return Refusal(reason="fused_cpu computes feed-forward experts; modules of your own need backend='loop'")
        reason = _reason(experts, dtype, device)
        return Refusal(reason=f"{reason}; use backend='padded_bmm'") if reason else None

    def few_call(self, experts: nn.Module, choice: SoftmaxChoice, *, dtype: torch.dtype) -> FewCall | None:
        assert isinstance(experts, FFNExperts)
        if experts.up_EDG.dtype not in (dtype, torch.bfloat16):
            # rounded first, as many tokens are
            return None
        up_bias, down_bias = (None if b is None else b.float() for b in (experts.up_bias_EG, experts.added_bias_ED))
        weights = kernel_weights(experts.up_EDG, experts.down_EFD, up_bias, down_bias, experts.kind)
        # few rows are widened, whatever multiplies many
        return the_kernel(torch.float32, weights.down_EFD).few(choice, weights, dtype=dtype)

    def run_tokens(self, experts: nn.Module, x_TD: Tensor, assignment: Assignment, admission: Admission) -> Tensor:
        assert isinstance(experts, FFNExperts)
        by_half = not _half_failure(experts, x_TD.dtype)
        matrices = (experts.up_EDG, experts.down_EFD)
        if by_half:
            # under autocast they are float32
            matrices = (matrices[0].to(x_TD.dtype), matrices[1].to(x_TD.dtype))
        inputs = (
            (x_TD if by_half else x_TD.float()).contiguous(),
            assignment.weight_N.float().contiguous(),
            *matrices,
            None if experts.up_bias_EG is None else experts.up_bias_EG.float(),
            None if experts.added_bias_ED is None else experts.added_bias_ED.float(),
        )
        keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
        if is_traced(*(tensor for tensor in inputs if tensor is not None)):
            routes = (assignment.token_N, assignment.expert_N, admission.keep_N)
            return fused_experts(*inputs, *routes, experts.kind, keep)[0].to(x_TD.dtype)
        kernel = the_kernel(inputs[0].dtype, matrices[1])
        routing = kernel.sort(assignment, admission.keep_N)
        if keep:
            return _Fused.apply(*inputs, experts.kind, routing, kernel).to(x_TD.dtype)
        # of few tokens a node that nobody asks for takes time beside the kernel
        rows_TD, weight_N, up_EDG, down_EFD, up_bias_EG, down_bias_ED = inputs
        weights = kernel_weights(up_EDG, down_EFD, up_bias_EG, down_bias_ED, experts.kind)
        return kernel.forward(rows_TD, weight_N, weights, routing, saved_rows=None)[0].to(x_TD.dtype)


def _reason(experts: FFNExperts, dtype: torch.dtype, device: torch.device) -> str:
    if device.type != "cpu":
        return f"fused_cpu computes on the CPU, not on {device.type}"
    if failure := kernels_failure("fused_cpu", experts.kind, experts.activation):
        return failure
    if dtype not in DTYPES or experts.up_EDG.dtype not in DTYPES or experts.down_EFD.dtype != experts.up_EDG.dtype:
        return f"fused_cpu computes float32 and bfloat16, not {dtype} with weights in {experts.up_EDG.dtype}"
    if dtype == torch.bfloat16 and _has_matrix_unit():
        failure = _half_failure(experts, dtype)
        return f"this processor multiplies bfloat16 by a matrix unit; {failure}" if failure else ""
    return _kernel_failure()


def _half_failure(experts: FFNExperts, dtype: torch.dtype) -> str:
    """Why the kernel does not multiply bfloat16 as it is here."""
    if dtype != torch.bfloat16 or not {experts.up_EDG.dtype, experts.down_EFD.dtype} <= set(DTYPES):
        return "fused_cpu does so only with tokens of it"
    return _matrix_unit_failure()


@torch.compiler.assume_constant_result
def _matrix_unit_failure() -> str:
    half = half_by_matrix_unit()
    return half if isinstance(half, str) else ""


# torch.compile asks once instead of tracing how a kernel is compiled
@torch.compiler.assume_constant_result
def _kernel_failure() -> str:
    kernel = trusted_kernel()
    return kernel if isinstance(kernel, str) else ""


# with vectors of bfloat16 alone (AVX512-BF16) torch's product takes twice the time of one in float32
@torch.compiler.assume_constant_result
def _has_matrix_unit() -> bool:
    return "amx_bf16" in cpu_flags().split()


ExpertBackend.TABLE.register("fused_cpu")(FusedCPU())
