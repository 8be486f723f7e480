"""The shape of a hierarchical mixture: gates that choose among branches, experts at the leaves.

All arrays of `turnout.hme` end in their shape, in letters of this legend; inside a block rows are the last axis, so
that the short axes (branches, outputs) are summed a whole vector at a time:

    N rows     D inputs    P inputs and the constant (D + 1, the constant last)    O outputs of one expert
    G gates    B branches of a gate    L leaves (experts)    Q pairs of inputs p <= q    C pairs of outputs o <= r
    Z inputs, the constant and targets (P + O)    M models: gates or experts    E several of these axes in one
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from turnout.errors import ConfigError

CLOSED = np.iinfo(np.int64).min  # a branch that leads nowhere

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Nodes = slice | Ints  # rows of an array of nodes; a slice wherever they stand evenly


@dataclass(frozen=True, kw_only=True, eq=False)
class Fork:
    """Gates of one level at which a branch is open, and the nodes it leads to (gates by number, then leaves)."""

    branch: int
    gates: Nodes
    children: Nodes
    beside: Nodes  # where the last branches of these gates lead


@dataclass(frozen=True, kw_only=True, eq=False)
class Tree:
    """Any tree of gates: `child_GB` holds a gate's number, ~leaf (below zero), or CLOSED; gate 0 is the root.

    Parents stand before their children. The last branch of every gate is open: it is the one whose linear predictor
    is fixed at zero. A tree without gates is one expert.
    """

    child_GB: Ints

    @classmethod
    def complete(cls, depth: int, branching: int) -> "Tree":
        """The tree whose every gate has `branching` branches and whose leaves all stand `depth` gates deep.

        Raises: ConfigError for a negative depth, a branching below 2, or more than 65,536 experts.
        """
        if depth < 0 or branching < 2 or depth * np.log2(branching) > 16:
            raise ConfigError(
                f"depth={depth}, branching={branching}: depth must be at least 0, branching at least 2, "
                "and branching ** depth at most 65536 experts"
            )
        num_gates = (branching**depth - 1) // (branching - 1)
        # gates are numbered level by level, so the children of gate g are b g + 1 .. b g + b, and leaves go on after
        node_GB = branching * np.arange(num_gates)[:, None] + np.arange(1, branching + 1)
        return cls(child_GB=np.where(node_GB < num_gates, node_GB, ~(node_GB - num_gates)).astype(np.int64))

    @property
    def num_gates(self) -> int:
        return self.child_GB.shape[0]

    @property
    def branching(self) -> int:
        return self.child_GB.shape[1]

    @cached_property
    def num_leaves(self) -> int:
        return max(1, int(((self.child_GB < 0) & self.open_GB).sum()))

    @cached_property
    def open_GB(self) -> NDArray[np.bool_]:
        return self.child_GB != CLOSED

    @cached_property
    def under_GBL(self) -> NDArray[np.bool_]:
        """Whether leaf l stands under branch b of gate g: the paths of all leaves, as one matrix."""
        under = np.zeros((*self.child_GB.shape, self.num_leaves), dtype=bool)
        for gate in reversed(range(self.num_gates)):  # children before parents
            for branch, child in enumerate(self.child_GB[gate]):
                if child >= 0:
                    under[gate, branch] = under[child].any(axis=0)
                elif child != CLOSED:
                    under[gate, branch, ~child] = True
        return under

    @cached_property
    def levels(self) -> tuple[tuple[Fork, ...], ...]:
        """From the root down, the forks of each level; that of the last branches, which are all open, comes first."""
        level_G = np.zeros(self.num_gates, dtype=np.int64)
        for gate in range(self.num_gates):
            inner_B = self.child_GB[gate][self.child_GB[gate] >= 0]
            level_G[inner_B] = level_G[gate] + 1
        gates_of = [np.flatnonzero(level_G == level) for level in range(level_G.max(initial=-1) + 1)]
        branches = (self.branching - 1, *range(self.branching - 1))
        return tuple(tuple(self._fork(gates, branch) for branch in branches) for gates in gates_of)

    @cached_property
    def free_nodes(self) -> Nodes:
        """Where all branches but the last of all gates lead; any node for a closed branch."""
        return _evenly(self._node_GB[:, :-1].ravel())

    @cached_property
    def _node_GB(self) -> Ints:
        leaf_GB = self.num_gates + ~np.where(self.open_GB, self.child_GB, -1)
        return np.where(self.child_GB >= 0, self.child_GB, leaf_GB)

    def _fork(self, gates: Ints, branch: int) -> Fork:
        open_G = gates[self.open_GB[gates, branch]]
        node_GB = self._node_GB[open_G]
        return Fork(
            branch=branch, gates=_evenly(open_G), children=_evenly(node_GB[:, branch]), beside=_evenly(node_GB[:, -1])
        )

    def abreast(self) -> tuple["Tree", Ints, Ints]:
        """The tree numbered so that nodes which one branch of a level's gates leads to stand next to one another.

        Of a complete tree each step along the paths then reads and writes whole stretches of memory, which numpy does
        two to three times as fast as every other row. Returns also the gates and the leaves in their new order.
        """
        gates, leaves = [], []
        level = [0 if self.num_gates else ~0]
        while level:
            inner = [node for node in level if node >= 0]
            gates += inner
            leaves += [~node for node in level if node < 0]
            level = [int(child) for branch_G in self.child_GB[inner].T for child in branch_G if child != CLOSED]
        gate_G, leaf_L = np.array(gates, dtype=np.int64), np.array(leaves, dtype=np.int64)
        child_GB = self.child_GB[gate_G]
        is_gate_GB = child_GB >= 0
        node_GB = np.where(is_gate_GB, child_GB, np.where(child_GB == CLOSED, 0, ~child_GB))
        new_gate_GB = np.argsort(gate_G)[node_GB * is_gate_GB] if len(gates) else node_GB
        new_GB = np.where(is_gate_GB, new_gate_GB, ~np.argsort(leaf_L)[node_GB * ~is_gate_GB])
        return Tree(child_GB=np.where(child_GB == CLOSED, CLOSED, new_GB)), gate_G, leaf_L

    def split(self, leaf: int) -> "Tree":
        """The tree with a new gate (the last) in place of `leaf`, over it and branching - 1 new leaves (the last)."""
        new_B = ~np.array([leaf, *range(self.num_leaves, self.num_leaves + self.branching - 1)], dtype=np.int64)
        child_GB = np.where(self.child_GB == ~leaf, self.num_gates, self.child_GB)
        return Tree(child_GB=np.vstack([child_GB, new_B]))

    def without(self, leaf: int) -> "Pruned":
        """The tree without `leaf`; a gate that is left with one branch gives its place to what stands there.

        Raises: ConfigError if it is the only leaf.
        """
        if self.num_leaves == 1:
            raise ConfigError("the last expert of a tree cannot be pruned")
        child_GB, last_GB = self.child_GB.copy(), np.arange(self.branching)[None].repeat(self.num_gates, axis=0)
        gate = int(np.nonzero((child_GB == ~leaf).any(axis=1))[0][0])
        rest_B = np.array([b for b in range(self.branching) if child_GB[gate, b] not in (~leaf, CLOSED)])
        kept_G = np.arange(self.num_gates)
        if len(rest_B) == 1:
            child_GB[child_GB == gate] = child_GB[gate, rest_B[0]]
            kept_G = np.delete(kept_G, gate)
        else:
            closed_B = np.setdiff1d(np.arange(self.branching), rest_B)
            last_GB[gate] = np.concatenate([closed_B, rest_B])  # open branches last
            child_GB[gate] = np.where(np.isin(last_GB[gate], closed_B), CLOSED, child_GB[gate, last_GB[gate]])
        kept_L = np.delete(np.arange(self.num_leaves), leaf)
        return Pruned(
            tree=Tree(child_GB=_renumbered(child_GB[kept_G], kept_G, kept_L)),
            gate_G=kept_G,
            leaf_L=kept_L,
            branch_GB=last_GB[kept_G],
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Pruned:
    """A smaller tree, and where its gates, leaves and branches stood in the larger one."""

    tree: Tree
    gate_G: Ints
    leaf_L: Ints
    branch_GB: Ints


def _evenly(nodes: Ints) -> Nodes:
    """A slice where the steps are all alike: then rows are viewed, not copied."""
    steps = np.diff(nodes)
    if not len(nodes) or (len(steps) and (steps[0] <= 0 or (steps != steps[0]).any())):
        return nodes
    return slice(int(nodes[0]), int(nodes[-1]) + 1, int(steps[0]) if len(steps) else 1)


def _renumbered(child_GB: Ints, kept_G: Ints, kept_L: Ints) -> Ints:
    """Old numbers of gates and leaves replaced by their places among the kept ones."""
    is_gate_GB, is_leaf_GB = child_GB >= 0, (child_GB < 0) & (child_GB != CLOSED)
    gate_GB = np.searchsorted(kept_G, np.where(is_gate_GB, child_GB, 0))
    leaf_GB = ~np.searchsorted(kept_L, np.where(is_leaf_GB, ~child_GB, 0))
    return np.where(is_gate_GB, gate_GB, np.where(is_leaf_GB, leaf_GB, CLOSED))
