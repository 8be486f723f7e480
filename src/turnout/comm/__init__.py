"""Processes and what moves between them: the world, groups of ranks, the torch.distributed transport, the ledger."""

from turnout.comm.fused import FusedProducts
from turnout.comm.fused_chunks import ChunkedProducts
from turnout.comm.fused_symmetric import SymmetricProducts, is_shared
from turnout.comm.groups import ExpertGroup, Groups, StageGroup, TensorGroup, expert_mesh, make_groups
from turnout.comm.ledger import Ledger
from turnout.comm.lines import Lines
from turnout.comm.shard_wire import GatherOfShards, SumOfShards, note_of_copies
from turnout.comm.sharing import Peers, Sharing
from turnout.comm.sizes import Sizes
from turnout.comm.tensor_wire import TensorWire
from turnout.comm.transport import Arrived, TorchTransport
from turnout.comm.watch import Watch
from turnout.comm.world import World, is_launched, join

__all__ = [
    "Arrived",
    "ChunkedProducts",
    "ExpertGroup",
    "FusedProducts",
    "GatherOfShards",
    "Groups",
    "Ledger",
    "Lines",
    "Peers",
    "Sharing",
    "Sizes",
    "StageGroup",
    "SumOfShards",
    "SymmetricProducts",
    "TensorGroup",
    "TensorWire",
    "TorchTransport",
    "Watch",
    "World",
    "expert_mesh",
    "is_launched",
    "is_shared",
    "join",
    "make_groups",
    "note_of_copies",
]
