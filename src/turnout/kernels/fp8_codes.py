"""Numbers of 8 bits in floating point (e4m3) with a power of two for each block: how weights and rows are rounded.

Weights have a scale for each SIDE x SIDE block of a matrix, rows for each block of columns, as DeepSeek-V3 has it
(arXiv:2412.19437, section 3.3). A power of two rounds nothing: it moves the exponent, of which 4 bits span a factor of
2^15 at full precision, so that a finer scale, one for each output channel, would be no more exact. And a block is one
from either side: a set of codes would serve x @ W and the product of a gradient with W.T.
"""

import torch
from torch import Tensor

SIDE = 128  # rows and columns of a matrix that share a scale
MOST = 448.0  # the largest number of the format
LEAST_MAX = 1e-30  # of zeros alone any scale will do
CODES = torch.float8_e4m3fn


def scale_of(most: Tensor) -> Tensor:
    """The least power of two that brings so large a value within MOST, in float32."""
    bits = (most.float().clamp(min=LEAST_MAX) * (1 / MOST)).view(torch.int32)
    return ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)


def encode_rows(x_MD: Tensor, block: int = SIDE) -> tuple[Tensor, Tensor]:
    """Codes of rows, and a scale for each `block` columns of each.

    Shapes: x_MD (M, D); returns (M, D) float8_e4m3fn, and (M, ceil(D / block)) float32.
    """
    num_rows, dim = x_MD.shape
    blocks = -(-dim // block)
    padded = torch.nn.functional.pad(x_MD.float(), (0, blocks * block - dim)).view(num_rows, blocks, block)
    scale_MB = scale_of(padded.abs().amax(dim=2))
    return (padded / scale_MB.unsqueeze(2)).flatten(1)[:, :dim].to(CODES), scale_MB


def decode_rows(codes_MD: Tensor, scale_MB: Tensor, block: int = SIDE) -> Tensor:
    """The rows that the codes stand for, in float32, which holds them all exactly."""
    return codes_MD.float() * scale_MB.repeat_interleave(block, dim=1)[:, : codes_MD.shape[1]]


def encode_matrix(weight_IJ: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of a matrix, and a scale for each SIDE x SIDE block.

    Shapes: weight_IJ (I, J); returns (I, J) float8_e4m3fn, and (ceil(I / SIDE), ceil(J / SIDE)) float32.
    """
    rows, columns = weight_IJ.shape
    up_rows, up_columns = -(-rows // SIDE), -(-columns // SIDE)
    pad = (0, up_columns * SIDE - columns, 0, up_rows * SIDE - rows)
    padded = torch.nn.functional.pad(weight_IJ.float(), pad).view(up_rows, SIDE, up_columns, SIDE)
    scales = scale_of(padded.abs().amax(dim=(1, 3)))
    codes = (padded / scales[:, None, :, None]).view(up_rows * SIDE, up_columns * SIDE)
    return codes[:rows, :columns].to(CODES), scales


def decode_matrix(codes_IJ: Tensor, scales: Tensor) -> Tensor:
    """The matrix that the codes stand for, in float32, which holds it exactly."""
    wide = scales.repeat_interleave(SIDE, dim=0).repeat_interleave(SIDE, dim=1)
    return codes_IJ.float() * wide[: codes_IJ.shape[0], : codes_IJ.shape[1]]
