"""Rows with addresses, as the loopback transport moves them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from turnout.alltoall.transport import Packing


@dataclass(frozen=True)
class Row:
    """A payload on its way, for one or more assignments of one token."""

    source: int  # place that has the token
    token: int  # index of the token there
    slots: tuple[tuple[int, int], ...]  # (position among the source's assignments, destination place) of each
    payload: Any  # a number or an array; copies are summed on the way back


@dataclass(frozen=True)
class Rows:
    """What every rank holds, and how the rows are packed."""

    ranks: tuple[tuple[Row, ...], ...]  # rank = place * tensor + tensor index
    packing: Packing = "assignment"


def load(destinations: Sequence[Sequence[Sequence[int]]], payload: Callable[[int, int], Any], tensor: int = 1) -> Rows:
    """The rows of every rank before a program: `destinations[source][token][choice]` is the place of the expert.

    `payload(source, token)` is the token's vector; the tensor-parallel ranks of a place all hold it.
    """
    ranks = []
    for source, tokens in enumerate(destinations):
        pairs = sorted((to, token) for token, choices in enumerate(tokens) for to in choices)
        rows = [Row(source, token, ((i, to),), payload(source, token)) for i, (to, token) in enumerate(pairs)]
        ranks += [tuple(rows)] * tensor
    return Rows(tuple(ranks))


def token_sums(rows: Rows, tokens: Sequence[int]) -> list[list[Any]]:
    """What combine gives each rank's tokens: the sum of their rows; `tokens[source]` counts them."""
    tensor = len(rows.ranks) // len(tokens)
    sums: list[list[Any]] = [[0] * tokens[rank // tensor] for rank in range(len(rows.ranks))]
    for rank, held in enumerate(rows.ranks):
        for row in held:
            sums[rank][row.token] = sums[rank][row.token] + row.payload
    return sums


def summed_by_token(rows: Sequence[Row]) -> list[Row]:
    """One row a token: the sum of its rows."""
    sums: dict[int, Row] = {}
    for row in rows:
        have = sums.get(row.token)
        sums[row.token] = row if have is None else replace(have, payload=have.payload + row.payload)
    return list(sums.values())


def first_only(rows: Sequence[Row]) -> list[Row]:
    """A row for every assignment: the payload for the first of a merged row, zero for the others."""
    return [
        replace(row, slots=(slot,), payload=row.payload if i == 0 else row.payload * 0)
        for row in rows
        for i, slot in enumerate(row.slots)
    ]


def by_position(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Rows in the order in which flat delivers them."""
    return tuple(sorted(rows, key=lambda row: (row.source, row.slots[0][0])))
