"""Experts of 8 bits as an operator that torch.compile knows; it has no derivative."""

import torch
from torch import Tensor

from turnout.kernels import Int8Weights, trusted_kernel
from turnout.kernels.arguments import like_first
from turnout.tensors import Assignment


@torch.library.custom_op("turnout::int8_experts", mutates_args=(), device_types="cpu")
def int8_experts(
    x_TD: Tensor,
    weight_N: Tensor,
    matrices: list[Tensor],
    up_bias_EG: Tensor | None,
    down_bias_ED: Tensor | None,
    token_N: Tensor,
    expert_N: Tensor,
    keep_N: Tensor | None,
    hidden: int,
    kind: str,
    digits: int,
    matrix_unit: bool,
) -> Tensor:
    """y_TD in float32, as x_TD is; `matrices` are the codes, scales and bases of both products."""
    kernel = trusted_kernel()
    assert not isinstance(kernel, str)
    unit = kernel.with_matrix_unit() if matrix_unit else kernel
    assert not isinstance(unit, str)
    up_codes, up_scales, up_bases, down_codes, down_scales, down_bases = matrices
    weights = Int8Weights(
        up_codes=up_codes,
        up_scales=up_scales,
        up_bases=up_bases,
        down_codes=down_codes,
        down_scales=down_scales,
        down_bases=down_bases,
        up_bias_EG=up_bias_EG,
        down_bias_ED=down_bias_ED,
        hidden=hidden,
        kind=kind,
    )
    assignment = Assignment(
        token_N=token_N,
        expert_N=expert_N,
        weight_N=weight_N,
        choice_N=token_N,
        num_tokens=len(x_TD),
        num_experts=len(up_codes),
    )
    return unit.infer_int8(x_TD, weight_N, weights, unit.sort(assignment, keep_N), digits=digits)


int8_experts.register_fake(like_first)
