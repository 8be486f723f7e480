"""Experts in 8-bit floating point as an operator that torch.compile knows; it has no derivative."""

import torch
from torch import Tensor

from turnout.kernels.arguments import like_first
from turnout.kernels.fp8_codes import CODES
from turnout.kernels.gpu import codes_launcher
from turnout.kernels.gpu.configs import CodesConfig, codes_candidates


@torch.library.custom_op("turnout::fp8_experts", mutates_args=())
def fp8_experts(
    x_TD: Tensor,
    weight_N: Tensor,
    codes: list[Tensor],
    up_bias_EG: Tensor | None,
    down_bias_ED: Tensor | None,
    token_N: Tensor,
    expert_N: Tensor,
    keep_N: Tensor | None,
    count_BE: Tensor | None,
    kind: str,
    top_k: int,
) -> Tensor:
    """y_TD in the dtype of x_TD; `codes`: codes and scales of both products, as `Float8FFNExperts` holds them."""
    up_codes, up_scales, down_codes, down_scales = (tensor.contiguous() for tensor in codes)
    up_bias, down_bias = (None if bias is None else bias.contiguous() for bias in (up_bias_EG, down_bias_ED))
    given = codes_launcher().Codes(
        up_EPFD=up_codes.view(CODES),
        up_scales=up_scales.view(torch.float32),
        down_EDF=down_codes.view(CODES),
        down_scales=down_scales.view(torch.float32),
        up_bias_EG=up_bias,
        down_bias_ED=down_bias,
        kind=kind,
    )
    routes = (token_N.contiguous(), expert_N.contiguous(), keep_N)
    with torch.cuda.device_of(x_TD):
        passed = codes_launcher().forward(
            x_TD.contiguous(),
            weight_N.contiguous(),
            *routes,
            given,
            config_for(len(weight_N), len(up_codes)),
            top_k=top_k,
            count_BE=count_BE,
        )
    return passed.y_TD


fp8_experts.register_fake(like_first)


def config_for(num_assignments: int, num_experts: int) -> CodesConfig:
    """The likeliest; none was measured."""
    return codes_candidates(num_assignments, num_experts)[0]
