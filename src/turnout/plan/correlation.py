"""Rank correlation."""

from collections.abc import Sequence


def spearman(pairs: Sequence[tuple[float, float]]) -> float:
    """Correlation of ranks; ties share the mean of theirs."""
    a, b = ranks([x for x, _ in pairs]), ranks([y for _, y in pairs])
    middle = (len(pairs) - 1) / 2
    covariance = sum((x - middle) * (y - middle) for x, y in zip(a, b, strict=True))
    spread = (sum((x - middle) ** 2 for x in a) * sum((y - middle) ** 2 for y in b)) ** 0.5
    return covariance / spread if spread else 0.0


def ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    first = {value: ordered.index(value) for value in set(values)}
    return [first[value] + (ordered.count(value) - 1) / 2 for value in values]
