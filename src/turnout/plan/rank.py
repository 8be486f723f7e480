"""What layouts are ranked by."""

from typing import Literal

Rank = Literal["time", "cost", "memory"]
RANKS: tuple[Rank, ...] = ("time", "cost", "memory")
# numbers within this share of each other are equal: sums in another order differ by less
TIE = 1e-9
