"""What LocMoE and LocMoE+ prove about affinities of random tokens, as functions of numbers.

delta is a cosine between a token and a gate row, d the width, n the number of experts, s that of tokens, C a capacity.
Sources: Li et al. 2024, arXiv:2401.13920 (LocMoE: lemma 3, theorem 1); Li et al. 2024, arXiv:2406.00023 (LocMoE+:
theorem 5, remark 7).
"""

import math
from collections.abc import Sequence

from torch import Tensor

LEAST_STEP = 1e-15
MOST_STEPS = 10_000


def tail_probability(delta: float, dim: int) -> float:
    """p_delta: the chance that a token uniform on the sphere has |cos| >= delta with a given row.

    1 - I_{delta^2}(1/2, (d-1)/2), the regularised incomplete beta function, by its continued fraction, with full
    relative precision in the tail.
    Source: LocMoE, lemma 3.
    """
    if delta <= 0 or dim == 1:
        return 1.0 if delta <= 1 else 0.0
    if delta >= 1:
        return 0.0
    a, b, x = 0.5, (dim - 1) / 2, delta * delta
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    # the fraction converges fast on one side of the mean alone; the other side has the complement
    if x < (a + 1) / (a + b + 2):
        return 1 - math.exp(log_front) * _beta_fraction(a, b, x) / a
    return math.exp(log_front) * _beta_fraction(b, a, 1 - x) / b


def tail_probability_large_dim(delta: float, dim: int) -> float:
    """p_delta for large d: erfc(sqrt(delta^2 d / (2 - delta^2))).

    Source: LocMoE, theorem 1.
    """
    return math.erfc(math.sqrt(_exponent(delta, dim)))


def capacity_bound(delta: float, dim: int, num_experts: int) -> float:
    """ec_min >= 1 / (n p_delta), infinite where p_delta is below the smallest number.

    Source: LocMoE, theorem 1.
    """
    return _inverse(num_experts * tail_probability(delta, dim))


def capacity_bound_large_dim(delta: float, dim: int, num_experts: int) -> float:
    """`capacity_bound` with p_delta for large d.

    Source: LocMoE, theorem 1.
    """
    return _inverse(num_experts * tail_probability_large_dim(delta, dim))


def capacity_floor(delta: float, dim: int, num_experts: int) -> float:
    """C_min = exp(d delta^2 / (2 - delta^2)) / n, which lies below `capacity_bound_large_dim`.

    Source: LocMoE+, remark 7; LocMoE, theorem 1, its last form.
    """
    exponent = _exponent(delta, dim)
    # past 709 exp is beyond float64
    return math.exp(exponent) / num_experts if exponent < 709 else math.inf


def min_capacity(delta: Tensor, *, dim: int, num_experts: int, num_tokens: int, minimum: int = 1) -> Tensor:
    """`capacity_floor` of a measured delta as a number of rows: rounded up, from `minimum` to the number of tokens.

    A tensor in and a tensor out, so that nothing waits for the device. The bound is below 1 for most deltas (d=4096,
    n=16, delta=0.03: 0.4) and past any batch for the rest (delta=0.1: 5e7): a bound to clamp, not a capacity to use.

    Shapes: delta (); returns () int64.
    """
    square = delta.double().clamp(0, 1).square()
    # bounded where it reaches all tokens anyway, so that exp cannot overflow
    exponent = (dim * square / (2 - square)).clamp(max=math.log(num_experts * num_tokens + 1))
    return (exponent.exp() / num_experts).ceil().long().clamp(min=minimum).clamp(max=num_tokens)


def token_choice_success(capacity: int, right: Sequence[float], num_tokens: int) -> float:
    """C sum_i p_i / s, at most 1: the order of the chance that token choice brings expert i its own token o_i.

    `right` has p_i, the chance that o_i chooses expert i. An expert is chosen by about s / n tokens and keeps C of
    them whatever they are, so o_i stays with chance C n / s; the mean over i gives the theorem's order.
    Source: LocMoE+, theorem 5.
    """
    return min(1.0, capacity * sum(right) / num_tokens)


def expert_choice_success(capacity: int, beaten: Sequence[float], num_tokens: int) -> tuple[float, float]:
    """Lower and upper bound of the chance that o_i is among the C tokens of highest affinity at expert i.

    `beaten` has q_i, the chance that an irrelevant token scores at least as high as o_i at expert i. An expert whose
    q_i satisfies C <= (s-1) q_i / 2 succeeds with at most exp(-(s-1) q_i / 8), one with C >= 2 s q_i with at least
    1 - exp(-3C / 16); both are averaged over the experts, 0 and 1 standing where neither is satisfied.
    Source: LocMoE+, theorem 5, which states each for all experts at once.
    """
    others = num_tokens - 1
    lower = [1 - math.exp(-3 * capacity / 16) if capacity >= 2 * num_tokens * q else 0.0 for q in beaten]
    upper = [math.exp(-others * q / 8) if capacity <= others * q / 2 else 1.0 for q in beaten]
    return sum(lower) / len(beaten), sum(upper) / len(beaten)


def _exponent(delta: float, dim: int) -> float:
    return dim * delta * delta / (2 - delta * delta)


def _inverse(value: float) -> float:
    return 1 / value if value > 0 else math.inf


def _beta_fraction(a: float, b: float, x: float) -> float:
    """The continued fraction of the incomplete beta function by Lentz's method (DLMF 8.17.22)."""
    numerator, denominator = 1.0, 1 / _nonzero(1 - (a + b) * x / (a + 1))
    value = denominator
    for m in range(1, MOST_STEPS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            denominator = 1 / _nonzero(1 + term * denominator)
            numerator = _nonzero(1 + term / numerator)
            change = denominator * numerator
            value *= change
        if abs(change - 1) <= LEAST_STEP:
            break
    return value


def _nonzero(value: float) -> float:
    return value if abs(value) > 1e-300 else 1e-300
