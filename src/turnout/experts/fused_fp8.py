"""Experts in 8-bit floating point by Triton's kernels on a GPU, for inference: half the bytes of bfloat16."""

import torch
from torch import Tensor, nn

from turnout.contracts import ExpertBackend, FusedBackend, Refusal
from turnout.experts.activations import kernels_failure
from turnout.experts.float8 import Float8FFNExperts
from turnout.experts.fp8_op import fp8_experts
from turnout.kernels.gpu import CODES_CAPABILITY, MOST_EXPERTS, codes_failure, device_failure
from turnout.tensors import Admission, Assignment

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class FusedFP8(FusedBackend):
    """Products of e4m3 codes with scales, sums in float32; rows too are rounded before each, in blocks of columns."""

    trains = False

    def refusal(self, experts: nn.Module, *, dtype: torch.dtype, device: torch.device) -> Refusal | None:
        if not isinstance(experts, Float8FFNExperts):
            return Refusal(
                reason="fused_fp8 computes experts after quantize_experts(model, precision='fp8'); others need "
                "backend='loop'"
            )
        reason = _reason(experts, dtype, device)
        return Refusal(reason=f"{reason}; use backend='loop'") if reason else None

    def run_tokens(self, experts: nn.Module, x_TD: Tensor, assignment: Assignment, admission: Admission) -> Tensor:
        """Raises: ConfigError if a gradient is to come back through the experts."""
        assert isinstance(experts, Float8FFNExperts)
        experts.check_inference(x_TD, assignment.weight_N)
        codes = [experts.up_codes, experts.up_scales, experts.down_codes, experts.down_scales]
        return fp8_experts(
            x_TD.detach(),
            assignment.weight_N.detach().float(),
            codes,
            experts.up_bias_EG,
            experts.down_bias_ED,
            assignment.token_N,
            assignment.expert_N,
            admission.keep_N,
            assignment.count_BE,
            experts.kind,
            assignment.top_k or 0,
        )


def _reason(experts: Float8FFNExperts, dtype: torch.dtype, device: torch.device) -> str:
    if failure := kernels_failure("fused_fp8", experts.kind, experts.activation):
        return failure
    if dtype not in DTYPES:
        return f"fused_fp8 computes tokens in float32, bfloat16 and float16, not {dtype}"
    if experts.num_experts > MOST_EXPERTS:
        return f"fused_fp8 counts up to {MOST_EXPERTS} experts, not {experts.num_experts}"
    if experts.dim * experts.hidden >= 1 << 30:
        return f"fused_fp8 computes matrices of up to 2^30 weights, not {experts.dim} x {experts.hidden}"
    return device_failure(device, "fused_fp8", CODES_CAPABILITY) or codes_failure(experts.kind, dtype, device)


ExpertBackend.TABLE.register("fused_fp8")(FusedFP8())
