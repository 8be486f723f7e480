"""The network lab: hosts of a cluster as network namespaces of this machine, wired by links of chosen speed. Linux."""

from turnout.bench.lab.hosts import Lab, Links
from turnout.bench.lab.isolation import isolated, why_not

__all__ = ["Lab", "Links", "isolated", "why_not"]
