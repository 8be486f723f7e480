"""The kernels of fp8.py, called on tensors: all experts in 8-bit floating point, for inference."""

# see launch.py
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from turnout.kernels.arguments import KINDS
from turnout.kernels.fp8_codes import CODES, SIDE
from turnout.kernels.gpu.configs import CodesConfig, Tile
from turnout.kernels.gpu.fp8 import down_codes_kernel, round_kernel, up_codes_kernel
from turnout.kernels.gpu.grid import boxes, given, is_boxed, programs, tile_settings
from turnout.kernels.gpu.launch import combine
from turnout.kernels.gpu.order import Routes, sort


@dataclass(frozen=True, kw_only=True)
class Codes:
    """Of all experts, P = 2 matrices for gate and value or 1; scales in float32, contiguous."""

    up_EPFD: Tensor
    up_scales: Tensor
    down_EDF: Tensor
    down_scales: Tensor
    up_bias_EG: Tensor | None
    down_bias_ED: Tensor | None
    kind: str


@dataclass(frozen=True, kw_only=True)
class Passed:
    """What a pass made; all but y for the proof."""

    y_TD: Tensor
    codes_TD: Tensor
    scale_TB: Tensor
    h_MF: Tensor
    h_scale_MB: Tensor
    routes: Routes


def forward(
    x_TD: Tensor,
    weight_N: Tensor,
    token_N: Tensor,
    expert_N: Tensor,
    keep_N: Tensor | None,
    codes: Codes,
    config: CodesConfig,
    *,
    top_k: int,
    count_BE: Tensor | None = None,
) -> Passed:
    """Rows are rounded once for each token, h once for each assignment as it is made. All is contiguous."""
    num_experts, dim, hidden = codes.down_EDF.shape
    num, sizes = len(weight_N), {"num_tokens": len(x_TD), "num_experts": num_experts}
    routes = sort(expert_N, token_N, keep_N, **sizes, rows=config.rows, top_k=top_k, count_BE=count_BE)
    columns = config.up.columns
    passed = Passed(
        y_TD=torch.empty_like(x_TD) if num else torch.zeros_like(x_TD),
        codes_TD=torch.empty_like(x_TD, dtype=CODES),
        scale_TB=x_TD.new_empty(len(x_TD), triton.cdiv(dim, SIDE), dtype=torch.float32),
        h_MF=x_TD.new_empty(num, hidden, dtype=CODES),
        h_scale_MB=x_TD.new_empty(num, triton.cdiv(hidden, columns), dtype=torch.float32),
        routes=routes,
    )
    if num == 0:
        return passed
    block_t = 16 if len(x_TD) > 16 else 1
    round_kernel[(triton.cdiv(len(x_TD), block_t), triton.cdiv(dim, SIDE))](
        x_TD, passed.codes_TD, passed.scale_TB, len(x_TD), D=dim, SIDE=SIDE, BLOCK_T=block_t
    )
    start_E, tile_start_E = routes.start_2E.unbind()
    up = codes.up_EPFD.flatten(0, 1)
    boxed = is_boxed(config, up)
    up_kernel = up_codes_kernel[(programs(x_TD, num, num_experts, hidden, config, config.up),)]
    up_kernel(
        passed.codes_TD, passed.scale_TB, routes.token_M, boxes(up, (columns, SIDE)) if boxed else up,
        codes.up_scales, given(codes.up_bias_EG, x_TD), passed.h_MF, passed.h_scale_MB, start_E, tile_start_E,
        KIND=KINDS[codes.kind], HAS_BIAS=codes.up_bias_EG is not None,
        **_settings(codes, config, config.up, boxed=boxed),
    )  # fmt: skip
    tile, y_MD = config.down, x_TD.new_empty(num, dim)
    boxed = is_boxed(config, passed.h_MF, codes.down_EDF)
    h, down = passed.h_MF, codes.down_EDF
    if boxed:
        h, down = boxes(h, (config.rows, columns)), boxes(down, (tile.columns, columns))
    down_codes_kernel[(programs(x_TD, num, num_experts, dim, config, tile),)](
        h, passed.h_scale_MB, down, codes.down_scales, given(codes.down_bias_ED, x_TD), y_MD, start_E, tile_start_E,
        HAS_BIAS=codes.down_bias_ED is not None, BLOCK_K=columns, **_settings(codes, config, tile, boxed=boxed),
    )  # fmt: skip
    combine(y_MD, weight_N, token_N, routes, passed.y_TD, top_k=top_k)
    return passed


def _settings(codes: Codes, config: CodesConfig, tile: Tile, *, boxed: bool) -> dict:
    num_experts, dim, hidden = codes.down_EDF.shape
    return {"D": dim, "F": hidden, "SIDE": SIDE} | tile_settings(codes.down_EDF, num_experts, config, tile, boxed=boxed)
