"""Auxiliary losses on routing: one file and one row each."""

from turnout.losses.load_balance import LoadBalance, load_balance_loss
from turnout.losses.router_z import RouterZ, router_z_loss

__all__ = ["LoadBalance", "RouterZ", "load_balance_loss", "router_z_loss"]
