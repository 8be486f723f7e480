"""Grouped average pooling (GrAP): gate rows that are fixed and orthogonal, a block of features for each expert."""

import math

import torch
from torch import Tensor

from turnout.errors import ConfigError


def check_blocks(dim: int, num_experts: int) -> None:
    """Raises: ConfigError unless the features part into E equal blocks."""
    if dim % num_experts:
        legal = [n for n in range(1, dim + 1) if dim % n == 0]
        raise ConfigError(
            f"the GrAP gate gives each expert an equal block of features: num_experts={num_experts} must divide "
            f"dim={dim}; legal: {legal}"
        )


def block_means(x_RD: Tensor, num_experts: int) -> Tensor:
    """GrAP's logits w_i . x: the mean of the i-th of E neighbouring blocks of D / E features.

    Shapes: x_RD (R, D), E divides D; returns (R, E).
    Source: Li et al. 2024 (LocMoE), arXiv:2401.13920, the GrAP weights.
    """
    return x_RD.unflatten(1, (num_experts, -1)).mean(dim=2)


def grap_rows(dim: int, num_experts: int) -> Tensor:
    """GrAP's rows written out: E / D on an expert's own block and 0 elsewhere; orthogonal, each of norm sqrt(E / D).

    Shapes: returns (E, D) float64.
    Source: Li et al. 2024 (LocMoE), arXiv:2401.13920, the GrAP weights.
    """
    own_EE = torch.eye(num_experts, dtype=torch.float64)
    return own_EE.repeat_interleave(dim // num_experts, dim=1) * (num_experts / dim)


def grap_affinity(x_RD: Tensor, num_experts: int) -> Tensor:
    """Cosine of each token with each of GrAP's rows, in closed form; a zero token has 0 with all of them.

    The rows are orthogonal, so the squares of a token's affinities sum to at most 1.
    Shapes: x_RD (R, D), E divides D; returns (R, E) in [-1, 1] up to rounding.
    Source: Li et al. 2024 (Expert-Token Resonance), arXiv:2406.00023, the affinity; closed form ours.
    """
    block_norm = math.sqrt(x_RD.shape[1] / num_experts)
    return block_means(x_RD, num_experts) * block_norm / _norms(x_RD)


def row_affinity(x_RD: Tensor, weight_ED: Tensor) -> Tensor:
    """Cosine of each token with each gate row; 0 where either is zero.

    Shapes: x_RD (R, D); weight_ED (E, D); returns (R, E) in [-1, 1] up to rounding.
    Source: Li et al. 2024 (Expert-Token Resonance), arXiv:2406.00023, the affinity.
    """
    return (x_RD @ (weight_ED / _norms(weight_ED)).T) / _norms(x_RD)


def _norms(rows: Tensor) -> Tensor:
    """Length of each row, as a column; 1 for a zero row, whose quotient and gradient then stay finite."""
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return length.masked_fill(length == 0, 1.0)
