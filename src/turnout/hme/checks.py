"""What is asked of data before anything is fitted: clear errors, and a standard scale."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from turnout.hme.families import Family
from turnout.hme.gaussian import Gaussian
from turnout.hme.tree import Floats

PART_ROWS = 8192  # rows whose squares are held at once
LARGEST, SMALLEST = 1e75, 1e-75  # products of four are finite, and above zero

MOST_NEWTON_BYTES = 2 << 30  # of the matrices of a step; one larger takes minutes too


@dataclass(frozen=True, kw_only=True, eq=False)
class Scale:
    """The mean and deviation of columns; a constant column has deviation 1, so that it becomes zero."""

    mean_D: Floats
    deviation_D: Floats

    @classmethod
    def of(cls, x_ND: Floats, weight_N: Floats) -> "Scale":
        """Weighted moments; columns that vary less than rounding are constant.

        Raises: ValueError for numbers whose squares are beyond float64, or so small that they vanish.
        """
        total = weight_N.sum()
        mean_D = weight_N @ x_ND / total
        square_D = np.zeros_like(mean_D)
        for start in range(0, len(x_ND), PART_ROWS):
            part = slice(start, start + PART_ROWS)
            with np.errstate(over="ignore", invalid="ignore"):
                square_D += weight_N[part] @ (x_ND[part] - mean_D) ** 2
        check_size(np.sqrt(square_D))
        high_D, low_D = x_ND.max(axis=0), x_ND.min(axis=0)
        rounding_D = 1e-13 * np.maximum(high_D, -low_D)
        range_D = high_D - low_D
        if ((range_D > rounding_D) & (range_D < SMALLEST)).any():
            raise ValueError(f"numbers vary by less than {SMALLEST:g}, and their squares vanish: multiply such columns")
        deviation_D = np.sqrt(square_D / total)
        return cls(mean_D=mean_D, deviation_D=np.where(deviation_D > rounding_D, deviation_D, 1.0))

    def standard(self, x_ND: Floats) -> Floats:
        return (x_ND - self.mean_D) / self.deviation_D

    def with_constant(self, x_ND: Floats) -> Floats:
        """Standardized columns and a last one of ones."""
        x_NP = np.empty((len(x_ND), x_ND.shape[1] + 1))
        np.subtract(x_ND, self.mean_D, out=x_NP[:, :-1])
        x_NP[:, :-1] /= self.deviation_D
        x_NP[:, -1] = 1.0
        return x_NP


@contextmanager
def unchanged_by_errors(estimator: object) -> Iterator[None]:
    """Rows that are refused leave `estimator` with all that it had learned, and nothing else."""
    before = vars(estimator).copy()
    try:
        yield
    except BaseException:
        vars(estimator).clear()
        vars(estimator).update(before)
        raise


def check_given(y: object) -> None:
    """Raises: ValueError where there is no target, in scikit-learn's words."""
    if y is None:
        raise ValueError("requires y to be passed, but the target y is None")


def check_positive(name: str, value: float, least: float = 0.0) -> None:
    """Raises: ValueError unless `value` is a finite number of at least `least`."""
    if not (isinstance(value, int | float | np.number) and np.isfinite(value) and value >= least):
        raise ValueError(f"{name}={value!r} must be a finite number of at least {least:g}")


def check_size(x_ND: Floats) -> None:
    """Raises: ValueError for numbers beyond LARGEST, whose squares and products would be infinite."""
    if not (np.abs(x_ND) <= LARGEST).all():
        raise ValueError(f"numbers vary by more than {LARGEST:g}, and their squares overflow: divide such columns")


def check_whole(name: str, value: object) -> None:
    """Raises: ValueError unless `value` is a whole number."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be a whole number")


def check_most_experts(most: object, num_experts: int) -> None:
    """Raises: ValueError for a tree that is to grow to fewer experts than it starts with."""
    if most is not None and not (isinstance(most, int | np.integer) and most >= num_experts):
        raise ValueError(
            f"max_experts={most!r} must be at least the {num_experts} experts that depth and branching start with"
        )


def check_choice(name: str, value: object, legal: tuple[str, ...]) -> None:
    """Raises: ValueError naming the legal values."""
    if value not in legal:
        raise ValueError(f"{name}={value!r} must be one of: {', '.join(legal)}")


def check_experts(num_rows: int, num_experts: int) -> None:
    """Raises: ValueError when there are fewer rows than experts."""
    if num_rows < num_experts:
        raise ValueError(
            f"{num_rows} rows (n_samples={num_rows}) cannot fit {num_experts} experts; "
            "give at least one row for each, or lower depth or branching"
        )


def newton_bytes(num_leaves: int, branching: int, family: Family, size: int) -> int:
    """Memory of the matrices of one Newton step of all gates and all experts; `size`: inputs and the constant."""
    expert = size * (1 if isinstance(family, Gaussian) else family.outputs)
    gate = size * (branching - 1)
    experts, gates = num_leaves * expert**2, _num_gates(num_leaves, branching) * gate**2
    # a block's sums and those so far, packed; then whole, scaled, factored and copied on the way
    return 8 * (experts + gates + 4 * max(experts, gates))


def check_newton(num_leaves: int, branching: int, family: Family, size: int) -> None:
    """Raises: ValueError where the matrices of a Newton step would take more than MOST_NEWTON_BYTES."""
    wanted = newton_bytes(num_leaves, branching, family, size)
    if wanted > MOST_NEWTON_BYTES:
        gates = _num_gates(num_leaves, branching)
        raise ValueError(
            f"{num_leaves} experts of {family.outputs} outputs and {gates} gates over {size - 1} inputs need "
            f"{wanted / 2**30:.1f} GiB for a step, more than {MOST_NEWTON_BYTES / 2**30:.0f}: give fewer inputs (a "
            "selection, principal components), fewer classes, outputs or experts, or choose solver='gradient', which "
            "needs no such matrices"
        )


def _num_gates(num_leaves: int, branching: int) -> int:
    return -(-(num_leaves - 1) // (branching - 1))
