"""Where experts should lie, from what was routed: EPLB, copies, a search by seconds. Never imports torch."""

from turnout.balance.copies import best_copied, copied
from turnout.balance.cost import Cost, Prices, cost_of, pays
from turnout.balance.dealing import Deal, dealt, turns
from turnout.balance.eplb import eplb
from turnout.balance.errands import expert_moves, home_of, twin_bytes
from turnout.balance.machine import ExpertShape, Machine
from turnout.balance.moving import Move, by_rank, moved_bytes
from turnout.balance.routed import Routed
from turnout.balance.search import Limits, balanced

__all__ = [
    "Cost",
    "Deal",
    "ExpertShape",
    "Limits",
    "Machine",
    "Move",
    "Prices",
    "Routed",
    "balanced",
    "best_copied",
    "by_rank",
    "copied",
    "cost_of",
    "dealt",
    "eplb",
    "expert_moves",
    "home_of",
    "moved_bytes",
    "pays",
    "turns",
    "twin_bytes",
]
