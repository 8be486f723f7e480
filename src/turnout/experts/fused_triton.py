"""All experts by Triton's kernels on a GPU: gather, products, activation and weighted sum, without a host copy."""

import torch
from torch import Tensor, nn

from turnout.contracts import ExpertBackend, FusedBackend, Refusal
from turnout.experts.activations import kernels_failure
from turnout.experts.fused_triton_op import triton_experts
from turnout.experts.weights import FFNExperts
from turnout.kernels.gpu import MOST_EXPERTS, device_failure, proof_failure
from turnout.kernels.gpu.tuned import race_failure, shape_of
from turnout.tensors import Admission, Assignment

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class FusedTriton(FusedBackend):
    """Kernels of turnout.kernels.gpu in the dtype of the tokens, sums in float32; of a pass only up's output is kept.

    The same bits each time, at the price of one write and one read of a row for each assignment.
    """

    def refusal(self, experts: nn.Module, *, dtype: torch.dtype, device: torch.device) -> Refusal | None:
        if not isinstance(experts, FFNExperts):
            return Refusal(reason="fused_triton computes feed-forward experts; others need backend='loop'")
        reason = _reason(experts, dtype, device)
        return Refusal(reason=f"{reason}; use backend='padded_bmm'") if reason else None

    def held_back(self, experts: nn.Module, *, dtype: torch.dtype, device: torch.device) -> Refusal | None:
        """Where it lost a race on this device with such experts, or never ran one."""
        if device.type != "cuda" or not isinstance(experts, FFNExperts):
            return Refusal(reason="auto takes fused_triton for feed-forward experts on CUDA alone")
        reason = _race_failure(tuple(experts.down_EFD.shape), experts.kind, dtype, device)
        return Refusal(reason=f"fused_triton is {reason}; to have it: backend='fused_triton'") if reason else None

    def run_tokens(self, experts: nn.Module, x_TD: Tensor, assignment: Assignment, admission: Admission) -> Tensor:
        assert isinstance(experts, FFNExperts)
        biases = (experts.up_bias_EG, experts.added_bias_ED)
        inputs = (
            x_TD,
            assignment.weight_N.float(),
            experts.up_EDG.to(x_TD.dtype),
            experts.down_EFD.to(x_TD.dtype),
            *(None if bias is None else bias.to(x_TD.dtype).contiguous() for bias in biases),
        )
        keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
        routes = (assignment.token_N, assignment.expert_N, admission.keep_N, assignment.count_BE)
        return triton_experts(*inputs, *routes, experts.kind, assignment.top_k or 0, keep)[0]


def _reason(experts: FFNExperts, dtype: torch.dtype, device: torch.device) -> str:
    num_experts, dim, width = experts.up_EDG.shape
    if failure := kernels_failure("fused_triton", experts.kind, experts.activation):
        return failure
    if dtype not in DTYPES:
        return f"fused_triton computes float32, bfloat16 and float16, not {dtype}"
    if num_experts > MOST_EXPERTS:
        return f"fused_triton counts up to {MOST_EXPERTS} experts, not {num_experts}"
    if dim * width >= 1 << 31:
        return f"fused_triton computes experts of up to 2^31 weights, not {dim} x {width}"
    return device_failure(device) or proof_failure(experts.kind, dtype, device)


# torch.compile asks once instead of tracing what reads a file
@torch.compiler.assume_constant_result
def _race_failure(sizes: tuple[int, ...], kind: str, dtype: torch.dtype, device: torch.device) -> str:
    return race_failure(shape_of(sizes, kind, device, dtype))


ExpertBackend.TABLE.register("fused_triton")(FusedTriton())
