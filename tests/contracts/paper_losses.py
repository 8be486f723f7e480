"""Losses as their papers write them, in plain loops over experts and devices; nothing of the code they judge."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from turnout.tensors import Assignment


def entropy(scores_RE: Tensor) -> Tensor:
    """Mean over tokens of -sum p ln p. Huang et al. 2024, arXiv:2403.07652."""
    total = scores_RE.sum() * 0
    for row in scores_RE.unbind():
        # p ln p is 0 where p is
        p = row[row > 0]
        total = total - (p * p.log()).sum()
    return total / max(len(scores_RE), 1)


def cv_squared(values: Sequence[Tensor]) -> Tensor:
    """Variance over squared mean, of which at least 1e-10. Shazeer et al. 2017, arXiv:1701.06538, eq. 7."""
    mean = torch.stack(list(values)).sum() / len(values)
    variance = torch.stack([(value - mean) ** 2 for value in values]).sum() / len(values)
    square = mean**2
    return variance / torch.where(square < 1e-10, 1e-10, square)


def importance(scores_RE: Tensor, given: Assignment, of: str) -> Tensor:
    """CV^2 of what the tokens give each expert: all their scores, or their gates. arXiv:1701.06538, eq. 6-7."""
    if of == "scores":
        return cv_squared([column.sum() for column in scores_RE.T])
    totals = [scores_RE.new_zeros(()) for _ in range(given.num_experts)]
    for e, weight in zip(given.expert_N.tolist(), given.weight_N, strict=True):
        totals[e] = totals[e] + weight
    return cv_squared(totals)


def device_balance(scores_RE: Tensor, given: Assignment, groups: int) -> Tensor:
    """sum_i f'_i P'_i: f'_i the mean of the device's f_e = E / (K T) * choices of e. arXiv:2401.06066, eq. 15-17."""
    num_experts, experts = given.num_experts, given.expert_N.tolist()
    size = num_experts // groups
    total = scores_RE.sum() * 0
    for i in range(groups):
        own = range(i * size, (i + 1) * size)
        f = sum(num_experts / max(len(experts), 1) * experts.count(e) for e in own) / size
        total = total + f * sum(scores_RE[:, e].sum() for e in own) / max(len(scores_RE), 1)
    return total


def communication_balance(scores_RE: Tensor, given: Assignment, groups: int, top_groups: int) -> Tensor:
    """sum_i f''_i P''_i: f''_i = D / (M T) * tokens sent to device i. arXiv:2405.04434, eq. 29-31."""
    num_tokens, size = max(len(scores_RE), 1), given.num_experts // groups
    pairs = list(zip(given.token_N.tolist(), given.expert_N.tolist(), strict=True))
    total = scores_RE.sum() * 0
    for i in range(groups):
        sent = {t for t, e in pairs if e // size == i}
        f = groups / (top_groups * num_tokens) * len(sent)
        total = total + f * scores_RE[:, i * size : (i + 1) * size].sum() / num_tokens
    return total


def load_cv(smooth_load_E: Tensor) -> Tensor:
    """CV^2 of the expected loads. arXiv:1701.06538, eq. 11."""
    return cv_squared(list(smooth_load_E.unbind()))


def locality(scores_RE: Tensor, local: Sequence[int], epsilon: float) -> Tensor:
    """KL(D_c || D_l), D_c the mean score; 0 where no expert is near or all are. arXiv:2401.13920, locality loss."""
    num_experts, total = scores_RE.shape[1], scores_RE.sum() * 0
    if len(local) in (0, num_experts) or not len(scores_RE):
        return total
    for e in range(num_experts):
        current = scores_RE[:, e].sum() / len(scores_RE)
        near = (1 - epsilon) / len(local) if e in local else epsilon / (num_experts - len(local))
        if current > 0:
            total = total + current * (current.log() - math.log(near))
    return total
