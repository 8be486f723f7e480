"""Placement: which rank of an expert group holds which experts."""

from dataclasses import dataclass

from turnout.errors import ConfigError


@dataclass(frozen=True)
class Placement:
    """Rank r holds the experts bounds[r] .. bounds[r + 1] - 1: runs of neighbours, in order of the ranks."""

    bounds: tuple[int, ...]

    def __post_init__(self) -> None:
        rises = all(before < after for before, after in zip(self.bounds, self.bounds[1:], strict=False))
        if len(self.bounds) < 2 or self.bounds[0] != 0 or not rises:
            raise ConfigError(f"placement.bounds={self.bounds} must start at 0 and rise: every rank holds an expert")

    @classmethod
    def even(cls, num_experts: int, ranks: int) -> "Placement":
        """Runs of equal length, the first ones longer by one where the ranks do not divide the experts.

        Raises: ConfigError if a rank would hold none.
        """
        if not 1 <= ranks <= num_experts:
            raise ConfigError(
                f"{num_experts} experts cannot lie on {ranks} ranks: each holds at least one; "
                f"nearest legal: ep={max(1, min(ranks, num_experts))}"
            )
        each, longer = divmod(num_experts, ranks)
        return cls(tuple(rank * each + min(rank, longer) for rank in range(ranks + 1)))

    @property
    def num_experts(self) -> int:
        return self.bounds[-1]

    @property
    def ranks(self) -> int:
        return len(self.bounds) - 1

    def slots_of(self, rank: int) -> range:
        """The places of a rank's experts among those of all ranks."""
        return range(self.bounds[rank], self.bounds[rank + 1])

    def experts_of(self, rank: int) -> tuple[int, ...]:
        """The experts a rank holds, in the order it holds them."""
        return tuple(self.slots_of(rank))
