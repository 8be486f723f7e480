"""A hierarchical mixture of experts: its parameters, its densities and posteriors."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from turnout.hme.algebra import product
from turnout.hme.families import Experts, Family, Judgement, ridge_log_prior
from turnout.hme.paths import log_priors
from turnout.hme.shares import Shares, by_rows, predictors, softmax_with_last_zero
from turnout.hme.space import MakeRoom, NumpySpace, space_of
from turnout.hme.tree import Floats, Ints, Tree

# of a leaf relative to the likeliest: where posteriors become subnormal, each product with one takes a hundred cycles
LEAST_LOG_POSTERIOR = -300.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixture:
    """A tree, the predictors of its gates and its experts. The last branch of a gate has the predictor zero.

    Source: Jordan & Jacobs 1994, "Hierarchical mixtures of experts and the EM algorithm", eq. 1-8.
    """

    tree: Tree
    family: Family
    gate_GPO: Floats  # O: all branches but the last
    experts: Experts

    def renumbered(self, tree: Tree, gate_G: Ints, leaf_L: Ints) -> "Mixture":
        """The same mixture on `tree`, whose gates and leaves are these of its own, in this order."""
        return replace(self, tree=tree, gate_GPO=self.gate_GPO[gate_G], experts=self.experts[leaf_L])

    def on(self, space: NumpySpace) -> "Mixture":
        """The same with its parameters in `space`; itself if they are there."""
        if space_of(self.gate_GPO) is space:
            return self
        return replace(self, gate_GPO=space.asarray(self.gate_GPO), experts=self.experts.on(space))

    def shares(self, x_PN: Floats) -> Shares:
        """Probability of each branch at its gate; zero, and -inf in logarithm, for a closed branch."""
        return self._shares(predictors(x_PN, self.gate_GPO))

    def _shares(self, predictor_GON: Floats, make: MakeRoom | None = None) -> Shares:
        if not self.tree.open_GB.all():
            predictor_GON[space_of(predictor_GON).index(~self.tree.open_GB[:, :-1])] = -np.inf
        return softmax_with_last_zero(predictor_GON, make)

    def log_priors(self, shares: Shares) -> Floats:
        """Log probability of each leaf before y is seen, (L, N)."""
        return log_priors(self.tree, shares)[self.tree.num_gates :]

    def priors(self, x_PN: Floats) -> Floats:
        """Probability of each leaf before y is seen, (L, N)."""
        return space_of(x_PN).exp(self.log_priors(self.shares(x_PN)))

    @cached_property
    def _weight_EZ(self) -> Floats:
        """Weights of all predictors, gates' above experts', by inputs, and by targets where experts read them."""
        expert_EZ, gate_EP = by_rows(self.family.weights(self.experts)), by_rows(self.gate_GPO)
        weight_EZ = space_of(gate_EP).zeros((len(gate_EP) + len(expert_EZ), expert_EZ.shape[1]))
        weight_EZ[: len(gate_EP), : gate_EP.shape[1]], weight_EZ[len(gate_EP) :] = gate_EP, expert_EZ
        return weight_EZ

    def read(self, z_ZN: Floats, make: MakeRoom | None = None) -> "Reading":
        """What gates and experts say of rows, inputs above targets: all linear predictors are one matrix product."""
        weight_EZ, num_rows = self._weight_EZ, z_ZN.shape[1]
        make = make or space_of(z_ZN).room
        predictor_EN = product(weight_EZ, z_ZN[: weight_EZ.shape[1]], make(len(weight_EZ), num_rows))
        gates, free = self.tree.num_gates, self.tree.branching - 1
        gate_GON = predictor_EN[: gates * free].reshape(gates, free, num_rows)
        expert_LON = predictor_EN[gates * free :].reshape(self.tree.num_leaves, self.family.outputs, num_rows)
        return Reading(
            shares=self._shares(gate_GON, make),
            expert_LON=expert_LON,
            judged=self.family.judge(expert_LON, z_ZN[-self.family.targets :], self.experts, make),
        )

    def posterior(self, z_ZN: Floats, make: MakeRoom | None = None) -> "Posterior":
        """The E-step: how probable each leaf is given the targets, which stand below the inputs.

        `make`: where its arrays stand, all but `loglik_N`.

        Source: Jordan & Jacobs 1994, eq. 9-11, in logarithms until the likeliest leaf is known.
        """
        space = space_of(z_ZN)
        reading = self.read(z_ZN, make)
        node_EN = log_priors(self.tree, reading.shares, make)
        leaf_LN = node_EN[self.tree.num_gates :]
        leaf_LN += reading.judged.log_density_LN
        top_N = space.max(leaf_LN, axis=0)
        leaf_LN -= top_N
        space.maximum(leaf_LN, LEAST_LOG_POSTERIOR, out=leaf_LN)
        space.exp(leaf_LN, out=leaf_LN)
        sum_N = leaf_LN.sum(axis=0)
        leaf_LN *= 1.0 / sum_N
        return Posterior(node_EN=node_EN, leaf_LN=leaf_LN, loglik_N=space.log(sum_N) + top_N, reading=reading)

    def mean(self, x_PN: Floats) -> Floats:
        """Expected targets, (T, N)."""
        return space_of(x_PN).einsum("ln,ltn->tn", self.priors(x_PN), self.family.mean(x_PN, self.experts))

    def log_prior(self, ridge_P: Floats) -> float:
        """What ridge and noise prior add to the log-likelihood to make the objective of EM."""
        return ridge_log_prior(self.gate_GPO, ridge_P) + self.family.log_prior(self.experts, ridge_P)

    @property
    def num_parameters(self) -> int:
        """Free parameters, for information criteria."""
        free_branches = int(self.tree.open_GB.sum()) - self.tree.num_gates
        noise = self.family.noise_parameters * self.tree.num_leaves
        return free_branches * self.gate_GPO.shape[1] + int(np.prod(self.experts.weight_LPO.shape)) + noise


@dataclass(frozen=True, kw_only=True, eq=False)
class Reading:
    """What gates and experts say of a block of rows; their predictors stand together, and make room for scores."""

    shares: Shares
    expert_LON: Floats  # predictors of experts
    judged: Judgement


@dataclass(frozen=True, kw_only=True, eq=False)
class Posterior:
    """The E-step of a block of rows."""

    node_EN: Floats  # room for the mass of all nodes, of which only leaves are filled
    leaf_LN: Floats  # those; columns sum to 1
    loglik_N: Floats
    reading: "Reading"


def new_mixture(
    tree: Tree, family: Family, y_TN: Floats, weight_N: Floats, size: int, random: np.random.Generator
) -> Mixture:
    """Gates in random directions of a standard input space, experts that all say the same.

    A predictor has deviation about 1.5 over standardized inputs: partitions soft enough to move.
    """
    free = tree.branching - 1
    gate_GPO = random.normal(size=(tree.num_gates, size, free)) * (1.5 / np.sqrt(size))
    gate_GPO[:, -1] = random.normal(size=(tree.num_gates, free)) * 0.5
    return Mixture(
        tree=tree,
        family=family,
        gate_GPO=np.where(tree.open_GB[:, None, :-1], gate_GPO, 0.0),
        experts=family.start(y_TN, weight_N, tree.num_leaves, size),
    )
