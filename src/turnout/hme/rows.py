"""The rows of a fit, and blocks of them: as columns, in the space where they are computed with, kept or formed anew."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

from turnout.hme.algebra import MANY_INPUTS, pair_products
from turnout.hme.checks import Scale
from turnout.hme.gaussian import Gaussian
from turnout.hme.mixture import Mixture
from turnout.hme.space import CACHE_LINE, NumpySpace
from turnout.hme.tree import Floats, Ints
from turnout.hme.workspace import Workspace

# of the widest array of a block: smaller blocks cost more calls, larger ones leave a core's cache, and their memory is
# given back to the system and taken from it page by page
BLOCK_BYTES = 4 << 20
LEAST_ROWS = 128  # of a block, however wide its arrays
# of all blocks of a fit with their products of inputs: up to this they are kept from pass to pass, else formed anew
MOST_HELD_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """N rows: inputs, targets, weights, in numpy's arrays or memory maps; what is formed of them stands in `space`."""

    x_NP: Floats  # with the constant as the last column; where there is a `scale`, as they were given and without it
    y_NT: Floats
    weight_N: Floats
    scale: Scale | None = None  # by which inputs are standardized, block by block, so that no copy of all is made
    held: "tuple[Block, ...]" = ()  # all rows, for passes to come; empty: each pass forms its blocks anew
    work: Workspace = field(default_factory=Workspace)

    @property
    def space(self) -> NumpySpace:
        """Where blocks of these rows lie, and all that is computed with them."""
        return self.work.space

    def __len__(self) -> int:
        return len(self.x_NP)

    @property
    def num_inputs(self) -> int:
        """P: inputs and the constant."""
        return self.x_NP.shape[1] + (self.scale is not None)

    def taken(self, row_N: Ints) -> "Rows":
        """These rows, in this order."""
        x_NP, y_NT, weight_N = self.x_NP[row_N], self.y_NT[row_N], self.weight_N[row_N]
        return Rows(x_NP=x_NP, y_NT=y_NT, weight_N=weight_N, scale=self.scale, work=Workspace(self.space))

    def parts(self, widest: int, least: int = LEAST_ROWS) -> Iterator[slice]:
        """Slices of rows, all but the last alike: an array of `widest` numbers a row takes `block_bytes` at most.

        Unless that were fewer than `least`.
        """
        most = max(least, self.space.block_bytes(BLOCK_BYTES) // (8 * max(1, widest)))
        alike = -(-len(self) // max(1, -(-len(self) // most)))
        step = max(1, -(-alike // CACHE_LINE) * CACHE_LINE)
        return (slice(start, start + step) for start in range(0, len(self), step))

    def block(self, part: slice | Ints) -> "Block":
        """These rows as columns."""
        x_NP, y_NT = self.space.asarray(self.x_NP[part]), self.space.asarray(self.y_NT[part])
        x_NP = x_NP if self.scale is None else self.scale.with_constant(x_NP)
        z_ZN = self.space.room(x_NP.shape[1] + y_NT.shape[1], len(x_NP))
        z_ZN[: x_NP.shape[1]], z_ZN[x_NP.shape[1] :] = x_NP.T, y_NT.T
        return Block(z_ZN=z_ZN, inputs=x_NP.shape[1], weight_N=self.space.asarray(self.weight_N[part]))

    def held_for(self, mixture: Mixture) -> "Rows":
        """The same rows with their blocks for trees of this size kept, or as they are where that takes much memory."""
        inputs, targets = self.num_inputs, self.y_NT.shape[1]
        most, row_bytes = self.space.most_held_bytes(MOST_HELD_BYTES), 8 * len(self)
        if row_bytes * (_pairs_held(inputs) + inputs + targets) <= most:
            return replace(self, held=tuple(self.blocks(mixture)))
        if self.space.holds_rows and row_bytes * (inputs + targets) <= most:
            return replace(self, held=tuple(replace(block, keeps_products=False) for block in self.blocks(mixture)))
        return self

    def blocks(self, mixture: Mixture) -> "Iterator[Block]":
        """Blocks small enough that the widest array of `mixture` takes about `block_bytes`."""
        if self.held:
            return iter(self.held)
        tree, size, outputs = mixture.tree, self.num_inputs, mixture.family.outputs
        curvatures = 1 if isinstance(mixture.family, Gaussian) else outputs * (outputs + 1) // 2
        expert = tree.num_leaves * max(1, outputs, curvatures)
        gate = tree.num_gates * tree.branching * max(2, tree.branching - 1) // 2
        widest = max(_pairs_held(size), size, expert, tree.child_GB.size, gate)
        # of many classes sums are far larger than a block: as many rows as pairs of inputs take no more memory
        wide = _pairs_held(size)
        least = max(LEAST_ROWS, min(wide, BLOCK_BYTES // (8 * max(1, wide))))
        return (self.block(part) for part in self.parts(widest, least))


def _pairs_held(inputs: int) -> int:
    return 0 if inputs > MANY_INPUTS else inputs * (inputs + 1) // 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """Some of the rows, as columns: inputs with the constant above targets, so that residuals are one product."""

    z_ZN: Floats
    inputs: int  # the constant among them
    weight_N: Floats
    keeps_products: bool = True  # whether products of inputs stay from pass to pass, as long as the block does

    @property
    def x_PN(self) -> Floats:
        return self.z_ZN[: self.inputs]

    @property
    def y_TN(self) -> Floats:
        return self.z_ZN[self.inputs :]

    @cached_property
    def _product_QN(self) -> Floats:
        return pair_products(self.x_PN)

    def products(self) -> Floats | None:
        """Products of pairs of inputs, (Q, N), formed once if they are kept; None of many inputs, with too many."""
        if self.inputs > MANY_INPUTS:
            return None
        return self._product_QN if self.keeps_products else pair_products(self.x_PN)

    @cached_property
    def counts_once(self) -> bool:
        """Whether every row has the weight 1."""
        return bool((self.weight_N == 1).all())
