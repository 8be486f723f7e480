"""The kernels of 8-bit floating point are trusted once they have computed, on this very device, what the codes mean.

Step by step, so that each bound is that of its own rounding: codes of rows bit for bit; h within half a step of its
format; and y of the kernel's own h, which is exact in float64.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from turnout import reference
from turnout.kernels.fp8_codes import decode_matrix, decode_rows, encode_matrix, encode_rows
from turnout.kernels.gpu.configs import CodesConfig, Tile
from turnout.kernels.gpu.fp8_launch import Codes, Passed, forward
from turnout.kernels.gpu.trust import doubt
from turnout.kernels.proof import assignment_of, drawn

# of a sum of products, relative to the largest: an interpreter adds in float32; Hopper's matrix unit, of this format,
# cuts each of 32 products to 13 bits below the largest of them
SUM_TOLERANCE = {"cpu": 1e-5, "cuda": 4e-3}
# of a row and of the sum over its rows
DTYPE_TOLERANCE = {torch.float32: 0.0, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}
HALF_STEP, LEAST_STEP = 2.0**-4, 2.0**-10  # of e4m3: relative to a number; and to its scale, where it is next to zero
# several blocks of a scale and parts of one, and very few rows; tokens, dim, hidden, experts, choices
SIZES = ((140, 272, 208, 3, 2), (3, 40, 24, 3, 2))
PLAIN = CodesConfig(rows=64, up=Tile(64, 128, 4, 2), down=Tile(64, 64, 4, 2))
FETCHED = CodesConfig(rows=128, up=Tile(128, 128, 8, 3), down=Tile(128, 128, 8, 3), boxed=True, persistent=True)


def prove(kind: str, dtype: torch.dtype, device: torch.device) -> str:
    """Why not to trust the kernels there, or nothing."""
    off = f"{{:.2g}} times as far off as {dtype} may be here"
    return doubt("Triton's kernels of fp8", partial(worst_excess, kind, dtype, device), 1, off)


def worst_excess(kind: str, dtype: torch.dtype, device: torch.device) -> float:
    """Largest difference in units of what rounding explains; infinite where codes of rows are others."""
    # whatever the caller is in the middle of
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
        cases = [(SIZES[0], True, PLAIN), (SIZES[0], False, FETCHED), (SIZES[1], True, PLAIN)]
        found = [_excess(kind, sizes, dtype, device, config, bias=bias) for sizes, bias, config in cases]
        # torch's max keeps NaN, Python's would drop it
        return float(torch.stack(found).max())


def codes_of(up_EDG: Tensor, down_EFD: Tensor, biases: list[Tensor], kind: str) -> Codes:
    """Matrices as `Float8FFNExperts` rounds them."""
    parts = up_EDG.shape[2] // down_EFD.shape[1]
    ups = [[encode_matrix(part.t()) for part in up.chunk(parts, dim=1)] for up in up_EDG]
    downs = [encode_matrix(down.t()) for down in down_EFD]
    up_bias, down_bias = biases or (None, None)
    return Codes(
        up_EPFD=torch.stack([torch.stack([codes for codes, _ in up]) for up in ups]),
        up_scales=torch.stack([torch.stack([scales for _, scales in up]) for up in ups]),
        down_EDF=torch.stack([codes for codes, _ in downs]),
        down_scales=torch.stack([scales for _, scales in downs]),
        up_bias_EG=up_bias,
        down_bias_ED=down_bias,
        kind=kind,
    )


def on_device(codes: Codes, device: torch.device) -> Codes:
    """The same there."""
    moved = {name: value.to(device) for name, value in vars(codes).items() if isinstance(value, Tensor)}
    return replace(codes, **moved)


def excess(
    passed: Passed, x_TD: Tensor, weight_NK: Tensor, expert_TK: Tensor, codes: Codes, config: CodesConfig
) -> Tensor:
    """How far a pass is off float64, in units of what rounding explains; all but `passed` is on the CPU."""
    rows_TD, scale_TB = encode_rows(x_TD)
    if not torch.equal(passed.codes_TD.cpu().view(torch.uint8), rows_TD.view(torch.uint8)):
        return torch.tensor(torch.inf, dtype=torch.float64)
    sums = SUM_TOLERANCE[passed.y_TD.device.type]
    x_wide = decode_rows(rows_TD, scale_TB).double()
    row_N, columns = passed.routes.row_N.cpu().long(), config.up.columns
    got_h = decode_rows(passed.h_MF.cpu()[row_N], passed.h_scale_MB.cpu()[row_N], columns).double()
    step = passed.h_scale_MB.cpu()[row_N].double().repeat_interleave(columns, dim=1)[:, : got_h.shape[1]]
    token_N, expert_N = torch.arange(len(row_N)) // expert_TK.shape[1], expert_TK.flatten()
    want_h, y_rows = [], []
    for n in range(len(row_N)):
        up_DG, down_FD, up_bias, down_bias = _wide(codes, int(expert_N[n]))
        want_h.append(_before_down(x_wide[token_N[n]], up_DG, up_bias, codes.kind))
        y_rows.append(got_h[n] @ down_FD + down_bias)
    want_h = torch.stack(want_h)
    h_bound = HALF_STEP * want_h.abs() + LEAST_STEP * step + sums * want_h.abs().max().clamp(min=1)
    y = (torch.stack(y_rows) * weight_NK.double().view(-1, 1)).view(len(x_TD), expert_TK.shape[1], -1).sum(dim=1)
    y_bound = (sums + DTYPE_TOLERANCE[x_TD.dtype]) * y.abs().max().clamp(min=1)
    off = [((got_h - want_h).abs() / h_bound).max(), ((passed.y_TD.cpu().double() - y).abs() / y_bound).max()]
    return torch.stack(off).max()


def _excess(
    kind: str, sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device, config: CodesConfig, *, bias: bool
) -> Tensor:
    (x_TD, weight_N, up_EDG, down_EFD, *biases), expert_TK, _ = drawn(kind, sizes, bias=bias)
    x_TD, codes = x_TD.to(dtype), codes_of(up_EDG, down_EFD, biases, kind)
    assignment = assignment_of(weight_N, expert_TK, len(up_EDG))
    routes = (assignment.token_N.to(device), assignment.expert_N.to(device), None)
    passed = forward(
        x_TD.to(device), weight_N.to(device), *routes, on_device(codes, device), config, top_k=expert_TK.shape[1]
    )
    return excess(passed, x_TD, weight_N, expert_TK, codes, config)


def _wide(codes: Codes, e: int) -> tuple[Tensor, Tensor, Tensor | float, Tensor | float]:
    ups = zip(codes.up_EPFD[e], codes.up_scales[e], strict=True)
    up_DG = torch.cat([decode_matrix(*up).t() for up in ups], dim=1).double()
    down_FD = decode_matrix(codes.down_EDF[e], codes.down_scales[e]).t().double()
    up_bias = 0.0 if codes.up_bias_EG is None else codes.up_bias_EG[e].double()
    return up_DG, down_FD, up_bias, 0.0 if codes.down_bias_ED is None else codes.down_bias_ED[e].double()


def _before_down(x_D: Tensor, up_DG: Tensor, up_bias: Tensor | float, kind: str) -> Tensor:
    """h, by the oracle: through a second matrix of ones on the diagonal."""
    hidden = up_DG.shape[1] // (2 if kind.startswith("swiglu") else 1)
    unit = torch.eye(hidden, dtype=torch.float64)
    return reference.ffn(x_D.unsqueeze(0), up_DG=up_DG, down_FD=unit, kind=kind, up_bias_G=up_bias, down_bias_D=0.0)[0]
