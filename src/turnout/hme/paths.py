"""Sums along the paths of a tree: from the root down for log priors, from the leaves up for posterior mass.

Nodes are rows of one array, gates before leaves, which is filled level by level: work grows with the number of nodes,
and where the tree is complete a level is a slice.
"""

from turnout.hme.shares import Shares
from turnout.hme.space import MakeRoom, space_of
from turnout.hme.tree import Floats, Nodes, Tree


def log_priors(tree: Tree, shares: Shares, make: MakeRoom | None = None) -> Floats:
    """Log probability of each node before y is seen, (E, N) with E = G + L: the sum along its path."""
    make = make or space_of(shares.free_MON).room
    node_EN = make(tree.num_gates + tree.num_leaves, shares.free_MON.shape[2])
    node_EN[0] = 0.0
    for last, *others in tree.levels:
        _put(node_EN, last.children, node_EN[last.gates], shares.log_last_MN[last.gates])
        for fork in others:
            _put(node_EN, fork.children, node_EN[fork.beside], shares.predictor_MON[fork.gates, fork.branch])
    return node_EN


def branch_mass(tree: Tree, node_EN: Floats) -> tuple[Floats, Floats]:
    """Posterior mass below each branch but the last, and below each gate: h_i, h_i h_j|i, ... of all levels.

    Shapes: node_EN (G + L, N), of which the leaves' rows are given and the gates' are filled; returns (G, O, N) and
    (G, 1, N), which may be views of it.
    """
    for last, *others in reversed(tree.levels):
        node_EN[last.gates] = node_EN[last.children]
        for fork in others:
            node_EN[fork.gates] += node_EN[fork.children]
    gates, outputs = tree.num_gates, tree.branching - 1
    mass_GON = node_EN[tree.free_nodes].reshape(gates, outputs, node_EN.shape[1])
    if not tree.open_GB.all():
        space = space_of(node_EN)
        mass_GON = space.where(space.index(tree.open_GB[:, :-1, None]), mass_GON, 0.0)
    return mass_GON, node_EN[:gates, None]


def leaf_nodes(tree: Tree, leaf_LN: Floats) -> Floats:
    """Room for all nodes, with the leaves' rows filled; (G + L, N)."""
    node_EN = space_of(leaf_LN).room(tree.num_gates + tree.num_leaves, leaf_LN.shape[1])
    node_EN[tree.num_gates :] = leaf_LN
    return node_EN


def _put(node_EN: Floats, at: Nodes, left_EN: Floats, right_EN: Floats) -> None:
    if isinstance(at, slice):
        space_of(node_EN).add(left_EN, right_EN, out=node_EN[at])
    else:
        node_EN[at] = left_EN + right_EN
