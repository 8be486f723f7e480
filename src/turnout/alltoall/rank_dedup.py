"""Rank dedup: a token goes to a rank once, however many of its experts live there."""

from turnout.alltoall.transport import PROGRAMS, P, Transport


@PROGRAMS.register("rank_dedup")
def rank_dedup(to: Transport[P], parcels: P) -> P:
    """The flat exchange with one copy per rank; pays where a rank has many experts and a token many choices."""
    parcels = to.dedup(parcels, "rank")
    parcels = to.exchange(parcels, "node", "local")
    return to.expand(parcels, "assignment")
