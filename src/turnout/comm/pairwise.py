"""An all-to-all between nodes over gloo as one message to each peer, for which everybody is ready first.

gloo's own all-to-all begins to send before it says that it can receive. Whoever is late says so behind his rows, on the
same connection, and who waits for him sends only when those are through: of a link with two directions one rests. It
also runs two collectives of a group at once and no more, so that exchanges that are begun ahead, as a layer's chunks
are, shake hands in pairs, and over a long way both directions rest meanwhile. Messages leave in the order in which they
were begun, at once. They cost more of the processor, which is why ranks of one node go on with gloo's.
Source: facebookincubator/gloo, gloo/alltoallv.cc, which calls `send` and then `recv` for each peer.
"""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

MOST = 16  # ranks of a group: of more the messages are many and small, and the processor is what they wait for
# of a group's messages only these: whatever else it sends has other tags. Those of one tag keep their order
_TAG = 0x7075


class Pairwise:
    """Rows on their way to all peers, and theirs to this rank; as many bytes and messages as one all-to-all."""

    def __init__(
        self, out: Tensor, sent: Tensor, received: Sequence[int], leave: Sequence[int], group: ProcessGroup
    ) -> None:
        """Every rank of the group calls it, in the same order. `received`, `leave`: entries from and for each peer."""
        place, coming, leaving = dist.get_rank(group), out.split(list(received)), sent.split(list(leave))
        # everybody begins with another peer
        others = [(place + step) % group.size() for step in range(1, group.size())]
        self._work = [group.recv([coming[peer]], peer, _TAG) for peer in reversed(others)]
        self._work += [group.send([leaving[peer]], peer, _TAG) for peer in others]
        coming[place].copy_(leaving[place])

    def wait(self) -> None:
        """Until all has come and gone."""
        for each in self._work:
            each.wait()
