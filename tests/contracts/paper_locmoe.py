"""LocMoE and LocMoE+ as their papers write them, in plain loops; nothing of the code they judge."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests.contracts.paper_choices import Choices, Own, Paper, by_score, settled
from turnout.reference import best_experts, softmax


def locmoe(x_RD: Tensor, num_experts: int, *, relu: bool, least_capacity: int, own: Own) -> Paper:
    """The expert whose block of features has the greatest mean. Li et al. 2024, arXiv:2401.13920."""
    size = x_RD.shape[1] // num_experts
    blocks = [x_RD[:, e * size : (e + 1) * size].sum(dim=1) / size for e in range(num_experts)]
    logits_RE = torch.stack(blocks, dim=1)
    if relu:
        logits_RE = logits_RE * (logits_RE > 0)
    scores_RE = softmax(logits_RE)
    choices = settled(best_experts(logits_RE, 1).tolist(), own, logits_RE)
    return Paper(
        logits_RE=logits_RE,
        scores_RE=scores_RE,
        choices=choices,
        gate_RE=scores_RE,
        least_capacity=least_capacity,
    )


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """How many of its tokens an expert of LocMoE+ keeps."""

    threshold: float
    mass: str
    floor: str
    minimum: int
    factor: float


def grap_affinity(x_RD: Tensor, num_experts: int) -> Tensor:
    """Cosine of each token with a row that is 1 on the expert's block and 0 elsewhere; 0 for a zero token."""
    dim = x_RD.shape[1]
    row_ED = torch.zeros(num_experts, dim, dtype=torch.float64)
    for e in range(num_experts):
        row_ED[e, e * dim // num_experts : (e + 1) * dim // num_experts] = 1.0
    return row_affinity(x_RD, row_ED)


def row_affinity(x_RD: Tensor, row_ED: Tensor) -> Tensor:
    """Cosine of each token with each row; where one of them is zero its length counts as 1, and the cosine is 0."""
    square_R1, square_E1 = (rows.square().sum(dim=1, keepdim=True) for rows in (x_RD, row_ED))
    length_R1, length_E1 = (torch.where(square == 0, 1.0, square).sqrt() for square in (square_R1, square_E1))
    return (x_RD / length_R1) @ (row_ED / length_E1).T


def locmoe_plus(
    affinity_RE: Tensor,
    dim: int,
    *,
    k: int,
    mode: str,
    temperature: float,
    keeping: Keeping,
    own: Own,
) -> Paper:
    """Tokens choose, then experts, or one of them alone. Li et al. 2024, arXiv:2406.00023, and specs/locmoe.md."""
    scores_RE = softmax(affinity_RE / temperature)
    num_tokens, num_experts = affinity_RE.shape
    declined: set[tuple[int, int]] = set()
    if mode == "expert_choice":
        asked = [list(range(num_tokens)) for _ in range(num_experts)]
        theirs = [[t for t in asked[e] if e in own.choices[t]] for e in range(num_experts)]
        keeps = kept_by_experts(affinity_RE, scores_RE, asked, dim, k, keeping, replace(own, choices=theirs))
        chosen = [[e for e in range(num_experts) if t in keeps[e]] for t in range(num_tokens)]
        choices = settled(by_score(chosen, affinity_RE), own, affinity_RE)
    else:
        choices = settled(best_experts(affinity_RE, k).tolist(), own, affinity_RE)
        asked = [[t for t in range(num_tokens) if e in choices[t]] for e in range(num_experts)]
        if mode == "hybrid":
            theirs = [[t for t in asked[e] if (t, e) not in own.declined] for e in range(num_experts)]
            keeps = kept_by_experts(affinity_RE, scores_RE, asked, dim, k, keeping, replace(own, choices=theirs))
            declined = {(t, e) for e in range(num_experts) for t in asked[e] if t not in keeps[e]}
    return Paper(
        logits_RE=affinity_RE / temperature,
        scores_RE=scores_RE,
        choices=choices,
        gate_RE=scores_RE,
        even=mode != "expert_choice",
        declined=frozenset(declined),
        priority_RE=affinity_RE.detach(),
    )


def kept_by_experts(
    affinity_RE: Tensor,
    scores_RE: Tensor,
    asked: Choices,
    dim: int,
    k: int,
    keeping: Keeping,
    own: Own,
) -> Choices:
    """Of the tokens that asked it, the best of each expert: the fewest that carry the threshold, within the bounds."""
    num_tokens, num_experts = affinity_RE.shape
    if num_tokens == 0:
        return [[] for _ in range(num_experts)]
    fair = keeping.factor * num_tokens * k / num_experts
    # a product such as 1.1 * 10 is not above 11
    most = max(keeping.minimum, math.ceil(min(fair * (1 - 1e-15), num_tokens)))
    least = keeping.minimum
    if keeping.floor != "none":
        best = [max(row) for row in affinity_RE.tolist()]
        delta = min(max(sum(best) / num_tokens if keeping.floor == "mean" else max(best), 0.0), 1.0)
        exponent = min(dim * delta**2 / (2 - delta**2), 50.0)
        least = min(max(keeping.minimum, math.ceil(math.exp(exponent) / num_experts)), num_tokens)
    keeps: Choices = []
    for e, tokens in enumerate(asked):
        affinity = {t: float(affinity_RE[t, e].detach()) for t in tokens}
        mass = affinity if keeping.mass == "affinity" else {t: float(scores_RE[t, e].detach()) for t in tokens}
        whole = sum(max(mass[t], 0.0) for t in tokens)
        order, carried, keep = sorted(tokens, key=lambda t: (-affinity[t], t)), 0.0, []
        for t in order:
            if len(keep) >= most or (len(keep) >= least and carried >= keeping.threshold * whole * (1 - 1e-9)):
                break
            keep.append(t)
            carried += max(mass[t], 0.0)
        keeps.append(keep)
    return settled(keeps, replace(own, choices=by_score(own.choices, affinity_RE.T)), affinity_RE.T)
