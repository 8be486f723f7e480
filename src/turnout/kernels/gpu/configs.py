"""Sizes of tiles for the kernels: a few to choose from, by how many rows an expert has and how wide numbers are."""

from dataclasses import astuple, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from turnout.kernels.arguments import Chosen


class Tile(NamedTuple):
    """One product: its tile's columns, numbers multiplied per step, warps, and steps loaded ahead."""

    columns: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True, kw_only=True)
class Config:
    """What a call is launched with; the same rows for every product, so that there is one schedule of tiles."""

    rows: int  # of a tile
    up: Tile
    down: Tile
    hidden_grad: Tile
    x_grad: Tile
    matrix_grad: Tile  # its depth runs over an expert's rows
    matrix_rows: int  # of a tile of a matrix's gradient
    group: int = 8  # tiles of rows that share columns before the next columns begin
    boxed: bool = False  # the tensor memory accelerator fetches blocks of matrices: compute capability 9.0 and later
    persistent: bool = False  # a program for each multiprocessor, tile after tile: the next is fetched as one ends

    def as_list(self) -> list:
        """As JSON has it."""
        return [list(value) if isinstance(value, tuple) else value for value in astuple(self)]

    @classmethod
    def of_list(cls, values: list) -> "Config":
        """The reverse of `as_list`. Raises: TypeError, ValueError if it is none."""
        rows, *tiles, matrix_rows, group, boxed, persistent = values
        up, down, hidden_grad, x_grad, matrix_grad = (Tile(*tile) for tile in tiles)
        return cls(
            rows=int(rows),
            up=up,
            down=down,
            hidden_grad=hidden_grad,
            x_grad=x_grad,
            matrix_grad=matrix_grad,
            matrix_rows=int(matrix_rows),
            group=int(group),
            boxed=bool(boxed),
            persistent=bool(persistent),
        )


def _config(
    rows: int,
    up: Tile,
    other: Tile,
    *,
    hidden_grad: Tile,
    matrix: Tile,
    matrix_rows: int = 128,
    group: int = 8,
    boxed: bool = False,
) -> Config:
    return Config(
        rows=rows,
        up=up,
        down=other,
        hidden_grad=hidden_grad,
        x_grad=other,
        matrix_grad=matrix,
        matrix_rows=matrix_rows,
        group=group,
        boxed=boxed,
        persistent=boxed,
    )


# The first of each is taken before any was measured. All of one have the same rows: a backward pass then finds
# its forward pass's schedule of tiles whatever was measured in between. After its product `hidden_grad` holds three
# more tiles in registers, so its own is half as wide as others. The gradient of a matrix looks up whose row to load:
# Triton 3.6 then loads a step ahead with 3 or 4 stages, and two with 5 or 6.
NARROW, HALF, WHOLE = Tile(64, 64, 4, 4), Tile(128, 64, 8, 3), Tile(256, 64, 8, 3)
DEEP = Tile(256, 64, 8, 5)
MANY_ROWS = (
    _config(128, HALF, WHOLE, hidden_grad=HALF, matrix=WHOLE),
    _config(128, Tile(128, 64, 8, 4), Tile(256, 64, 8, 4), hidden_grad=Tile(64, 64, 8, 4), matrix=WHOLE),
    _config(128, NARROW, Tile(128, 64, 4, 4), hidden_grad=Tile(64, 64, 8, 3), matrix=Tile(128, 64, 4, 4)),
    _config(128, HALF, Tile(128, 64, 8, 4), hidden_grad=Tile(64, 64, 4, 4), matrix=Tile(128, 64, 8, 4), group=16),
    _config(128, HALF, WHOLE, hidden_grad=Tile(64, 64, 8, 4), matrix=DEEP, boxed=True),
    _config(128, Tile(128, 64, 8, 4), Tile(256, 64, 8, 4), hidden_grad=HALF, matrix=DEEP, boxed=True),
    _config(128, HALF, Tile(128, 64, 8, 4), hidden_grad=Tile(64, 64, 8, 4), matrix=DEEP, group=16, boxed=True),
)
SOME_ROWS = (
    _config(64, NARROW, Tile(128, 64, 4, 4), hidden_grad=NARROW, matrix=Tile(128, 32, 4, 4)),
    _config(64, HALF, HALF, hidden_grad=HALF, matrix=HALF),
    _config(64, Tile(128, 64, 4, 3), WHOLE, hidden_grad=NARROW, matrix=Tile(128, 64, 8, 3)),
    _config(64, Tile(128, 64, 4, 4), Tile(128, 64, 4, 4), hidden_grad=NARROW, matrix=Tile(128, 64, 8, 5), boxed=True),
)
SLIM = Tile(64, 64, 4, 3)
FEW_ROWS = (
    _config(16, Tile(32, 128, 4, 4), Tile(32, 256, 4, 4), hidden_grad=SLIM, matrix=Tile(128, 16, 4, 3), group=1),
    _config(16, Tile(64, 128, 4, 3), Tile(64, 128, 4, 4), hidden_grad=SLIM, matrix=Tile(128, 16, 4, 3), group=1),
    _config(16, Tile(32, 64, 4, 6), Tile(32, 128, 4, 6), hidden_grad=SLIM, matrix=Tile(128, 16, 4, 3), group=1),
    _config(16, Tile(16, 256, 4, 3), Tile(16, 256, 4, 4), hidden_grad=SLIM, matrix=Tile(128, 16, 4, 3), group=1),
)
# float32 in full precision has no matrix units: a tile of 64 by 64 is what registers hold
FULL = Tile(64, 32, 8, 2)
WIDE_MANY = (
    _config(64, FULL, FULL, hidden_grad=FULL, matrix=FULL, matrix_rows=64),
    _config(64, SLIM, Tile(64, 32, 4, 3), hidden_grad=FULL, matrix=Tile(64, 32, 4, 3), matrix_rows=64),
)
WIDE_FEW = (
    _config(16, Tile(32, 64, 4, 3), Tile(32, 64, 4, 3), hidden_grad=SLIM, matrix=FULL, matrix_rows=32, group=1),
    _config(16, SLIM, SLIM, hidden_grad=SLIM, matrix=FULL, matrix_rows=32, group=1),
)


@dataclass(frozen=True, kw_only=True)
class CodesConfig:
    """The same for experts in 8-bit floating point: h has a scale for each row of a tile of the first product."""

    rows: int  # of a tile
    up: Tile  # its depth is the 128 columns of x that share a scale
    down: Tile  # its depth is up's columns
    group: int = 8
    boxed: bool = False
    persistent: bool = False


def _codes(rows: int, up: Tile, down: Tile, *, group: int = 8, boxed: bool = False) -> CodesConfig:
    return CodesConfig(rows=rows, up=up, down=down, group=group, boxed=boxed, persistent=boxed)


# as above, the first of each is taken; a tile is no wider than a scale of a matrix reaches
CODES_MANY = (
    _codes(128, Tile(128, 128, 8, 3), Tile(128, 128, 8, 4), boxed=True),
    _codes(128, Tile(64, 128, 8, 4), Tile(128, 64, 8, 6), boxed=True),
    _codes(128, Tile(64, 128, 8, 4), Tile(128, 64, 8, 6)),
)
CODES_SOME = (
    _codes(64, Tile(64, 128, 4, 4), Tile(128, 64, 4, 6), boxed=True),
    _codes(64, Tile(128, 128, 8, 3), Tile(128, 128, 4, 4)),
)
CODES_FEW = (
    _codes(16, Tile(64, 128, 4, 4), Tile(64, 64, 4, 6), group=1),
    _codes(16, Tile(32, 128, 4, 5), Tile(64, 32, 4, 8), group=1),
)


def codes_candidates(num_assignments: int, num_experts: int) -> tuple[CodesConfig, ...]:
    """Configs worth a try for so many rows of codes, likeliest first."""
    per_expert = num_assignments / num_experts
    if per_expert <= 16:
        return CODES_FEW
    return CODES_SOME if per_expert <= 128 else CODES_MANY


def candidates(num_assignments: int, num_experts: int, dtype: torch.dtype) -> tuple[Config, ...]:
    """Configs worth a try for so many rows, likeliest first, all with the same rows to a tile."""
    per_expert = num_assignments / num_experts
    if dtype == torch.float32:
        return WIDE_MANY if per_expert > 16 else WIDE_FEW
    if per_expert <= 16:
        return FEW_ROWS
    return SOME_ROWS if per_expert <= 128 else MANY_ROWS


def counted_rows(k: int) -> int:
    """Rows of logits, each with k choices, whose choices are counted together: up to 256 choices and 64 rows."""
    return min(64, 1 << ((256 // k).bit_length() - 1))


def chosen_room(logits_RE: Tensor, k: int) -> tuple[Chosen, Tensor]:
    """What a router's kernel writes, without its values; and counts of blocks of `counted_rows(k)` rows in int32."""
    num_rows, num_experts = logits_RE.shape
    rows, num = counted_rows(k), num_rows * k
    expert_N, token_N, choice_N = (logits_RE.new_empty(num, dtype=torch.int64) for _ in range(3))
    scores_RE = torch.empty_like(logits_RE, memory_format=torch.contiguous_format)
    count_BE = logits_RE.new_empty((num_rows + rows - 1) // rows, num_experts, dtype=torch.int32)
    return Chosen(scores_RE, logits_RE.new_empty(num), expert_N, token_N, choice_N), count_BE
