"""Flat: every rank sends to every other at once."""

from turnout.alltoall.transport import PROGRAMS, P, Transport


@PROGRAMS.register("flat")
def flat(to: Transport[P], parcels: P) -> P:
    """The linear all-to-all: n - 1 messages of S/n bytes from a rank that has S."""
    return to.exchange(parcels, "node", "local")
