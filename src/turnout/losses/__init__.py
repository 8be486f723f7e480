"""Auxiliary losses on routing: one file and one row each."""

from turnout.losses.communication_balance import CommunicationBalance
from turnout.losses.cv_squared import cv_squared
from turnout.losses.device_balance import DeviceBalance
from turnout.losses.entropy import Entropy, routing_entropy
from turnout.losses.importance import Importance
from turnout.losses.load_balance import LoadBalance, load_balance_from_counts, load_balance_loss
from turnout.losses.load_cv import LoadCV
from turnout.losses.locality import Locality, locality_loss
from turnout.losses.router_z import RouterZ, router_z_loss

__all__ = [
    "CommunicationBalance",
    "DeviceBalance",
    "Entropy",
    "Importance",
    "LoadBalance",
    "LoadCV",
    "Locality",
    "RouterZ",
    "cv_squared",
    "load_balance_from_counts",
    "load_balance_loss",
    "locality_loss",
    "router_z_loss",
    "routing_entropy",
]
