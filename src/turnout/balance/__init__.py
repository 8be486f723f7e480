"""Where experts should lie, from what was routed: EPLB, and a search by predicted seconds. Never imports torch."""

from turnout.balance.cost import Cost, Prices, cost_of, pays
from turnout.balance.eplb import eplb
from turnout.balance.machine import ExpertShape, Machine
from turnout.balance.moving import Move, by_rank, expert_moves, moved_bytes
from turnout.balance.routed import Routed
from turnout.balance.search import Limits, balanced

__all__ = [
    "Cost",
    "ExpertShape",
    "Limits",
    "Machine",
    "Move",
    "Prices",
    "Routed",
    "balanced",
    "by_rank",
    "cost_of",
    "eplb",
    "expert_moves",
    "moved_bytes",
    "pays",
]
