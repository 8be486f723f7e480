"""Hierarchical (2DH): first inside the node, then between nodes, so that few large messages cross."""

from turnout.alltoall.transport import PROGRAMS, P, Transport


@PROGRAMS.register("hierarchical")
def hierarchical(to: Transport[P], parcels: P) -> P:
    """Tutel's 2DH: m - 1 messages inside the node and n/m - 1 between nodes, in place of n - 1.

    Each exchange aligns its blocks by peer first, which are phases 1 and 3 of the paper. Algorithm 2 prints the index
    of that copy as i / col; i / row, as in Tutel's kernel, is right for grids that are not square.
    Source: Hwang et al. 2022, arXiv:2206.03382, algorithm 2.
    """
    parcels = to.exchange(parcels, "local")
    return to.exchange(parcels, "node")
