"""Node dedup: a token crosses to a node once, however many of its experts live there."""

from turnout.alltoall.transport import PROGRAMS, P, Transport


@PROGRAMS.register("node_dedup")
def node_dedup(to: Transport[P], parcels: P) -> P:
    """One copy per node over the network, then one per rank inside the node; on the way back partial sums.

    Source: DeepSeek-AI 2024, arXiv:2412.19437, section 3.2.2; DeepEP, https://github.com/deepseek-ai/DeepEP.
    """
    parcels = to.dedup(parcels, "node")
    parcels = to.exchange(parcels, "node")
    parcels = to.expand(parcels, "rank")
    parcels = to.exchange(parcels, "local")
    return to.expand(parcels, "assignment")
