"""A hierarchical mixture of experts: its parameters, its densities and posteriors."""

from dataclasses import dataclass

import numpy as np

from turnout.hme.algebra import log_sum_exp
from turnout.hme.families import Experts, Family, Gaussian, Judgement, log_softmax_with_last_zero
from turnout.hme.tree import Floats, Tree


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixture:
    """A tree, the predictors of its gates and its experts. The last branch of a gate has the predictor zero.

    Source: Jordan & Jacobs 1994, "Hierarchical mixtures of experts and the EM algorithm", eq. 1-8.
    """

    tree: Tree
    family: Family
    gate_GPO: Floats  # O: all branches but the last
    experts: Experts

    def log_shares(self, x_NP: Floats) -> Floats:
        """Log probability of each branch at its gate, (N, G, B); -inf for a closed branch."""
        gates, size, free = self.gate_GPO.shape
        predictor_NGO = (x_NP @ self.gate_GPO.transpose(1, 0, 2).reshape(size, -1)).reshape(len(x_NP), gates, free)
        if not self.tree.open_GB.all():
            predictor_NGO = np.where(self.tree.open_GB[:, :-1], predictor_NGO, -np.inf)
        return log_softmax_with_last_zero(predictor_NGO)

    def log_priors(self, log_share_NGB: Floats) -> Floats:
        """Log probability of each leaf before y is seen, (N, L): the sum along its path."""
        flat_NE = log_share_NGB.reshape(len(log_share_NGB), -1)
        if not self.tree.open_GB.all():
            flat_NE = np.where(self.tree.open_GB.ravel(), flat_NE, 0.0)
        return flat_NE @ self.tree.path_EL

    def priors(self, x_NP: Floats) -> Floats:
        """Probability of each leaf before y is seen, (N, L)."""
        return np.exp(self.log_priors(self.log_shares(x_NP)))

    def posterior(self, x_NP: Floats, y_NT: Floats) -> "Posterior":
        """The E-step: how probable each leaf is given the targets.

        Source: Jordan & Jacobs 1994, eq. 9-11, in logarithms.
        """
        log_share_NGB = self.log_shares(x_NP)
        judged = self.family.judge(x_NP, y_NT, self.experts)
        joint_NL = self.log_priors(log_share_NGB) + judged.log_density_NL
        loglik_N = log_sum_exp(joint_NL)
        return Posterior(
            leaf_NL=np.exp(joint_NL - loglik_N[:, None]),
            loglik_N=loglik_N,
            log_share_NGB=log_share_NGB,
            judged=judged,
        )

    def mean(self, x_NP: Floats) -> Floats:
        """Expected targets, (N, T)."""
        return np.einsum("nl,nlt->nt", self.priors(x_NP), self.family.mean(x_NP, self.experts))

    def log_prior(self, ridge_P: Floats) -> float:
        """What ridge and noise prior add to the log-likelihood to make the objective of EM."""
        gates = -0.5 * float((ridge_P[:, None] * self.gate_GPO**2).sum())
        if isinstance(self.family, Gaussian):
            return gates + self.family.log_prior(self.experts, ridge_P)
        return gates - 0.5 * float((ridge_P[:, None] * self.experts.weight_LPO**2).sum())

    @property
    def num_parameters(self) -> int:
        """Free parameters, for information criteria."""
        branches = int(self.tree.open_GB.sum()) - self.tree.num_gates
        noise = {"unit": 0, "scalar": 1, "diagonal": self.family.outputs}
        full = self.family.outputs * (self.family.outputs + 1) // 2
        spread = noise.get(self.family.noise, full) if isinstance(self.family, Gaussian) else 0
        return branches * self.gate_GPO.shape[1] + self.experts.weight_LPO.size + spread * self.tree.num_leaves


@dataclass(frozen=True, kw_only=True, eq=False)
class Posterior:
    """The E-step of a block of rows."""

    leaf_NL: Floats  # rows sum to 1
    loglik_N: Floats
    log_share_NGB: Floats
    judged: Judgement


def new_mixture(
    tree: Tree, family: Family, y_NT: Floats, weight_N: Floats, size: int, random: np.random.Generator
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
        experts=family.start(y_NT, weight_N, tree.num_leaves, size),
    )
