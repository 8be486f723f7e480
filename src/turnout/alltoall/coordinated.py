"""Coordinated: tensor-parallel ranks hold the same tokens, so each sends a share and they gather at the experts."""

from turnout.alltoall.transport import PROGRAMS, P, Transport


@PROGRAMS.register("coordinated")
def coordinated(to: Transport[P], parcels: P) -> P:
    """The exchange runs among ranks of the same tensor index: 1/t of the bytes between nodes, an all-gather within.

    Source: Rajbhandari et al. 2022, arXiv:2201.05596, parallelism-coordinated communication.
    """
    parcels = to.dedup(parcels, "tensor")
    parcels = to.exchange(parcels, "node", "local")
    return to.expand(parcels, "tensor")
