"""Trees that grow where the fit is worst, and lose what does not pay for its parameters."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from turnout.hme.algebra import diagonals
from turnout.hme.em import EMConfig, Fit, fit_em
from turnout.hme.families import Experts
from turnout.hme.gaussian import Gaussian
from turnout.hme.mixture import Mixture
from turnout.hme.rows import Rows
from turnout.hme.sweep import sweep
from turnout.hme.tree import Floats

TRIALS = 3  # random gates tried for a split
TRIAL_ITERATIONS = 8  # of EM for each of them


def grow(
    fit: Fit,
    rows: Rows,
    config: EMConfig,
    most_leaves: int,
    random: np.random.Generator,
    watch: Callable[[int, float], None] | None = None,
) -> Fit:
    """Splits the leaf with the worst fit again and again, while the information criterion falls.

    Returns the fit of the last tree that paid for itself, with the paths of all accepted fits in one.
    """
    while fit.mixture.tree.num_leaves + fit.mixture.tree.branching - 1 <= most_leaves:
        leaf = worst_leaf(fit.mixture, rows)
        trials = [split(fit.mixture, leaf, random) for _ in range(TRIALS)]
        starts = [fit_em(trial, rows, replace(config, max_iter=TRIAL_ITERATIONS)) for trial in trials]
        best = max(starts, key=lambda start: start.objective_path[-1])
        larger = joined(best, fit_em(best.mixture, rows, config, watch))
        if criterion(larger, rows) >= criterion(fit, rows):
            return fit
        fit = joined(fit, larger)
    return fit


def prune(fit: Fit, rows: Rows, config: EMConfig, watch: Callable[[int, float], None] | None = None) -> Fit:
    """Removes the leaf with the least posterior mass again and again, while the information criterion falls."""
    while fit.mixture.tree.num_leaves > 1:
        leaf = int(sweep(rows, fit.mixture).experts.weight_L.argmin())
        smaller = fit_em(without(fit.mixture, leaf), rows, config, watch)
        if criterion(smaller, rows) >= criterion(fit, rows):
            return fit
        fit = joined(fit, smaller)
    return fit


def criterion(fit: Fit, rows: Rows) -> float:
    """Schwarz's information criterion: -2 log-likelihood + parameters * log(rows); less is better."""
    return -2 * fit.loglik + fit.mixture.num_parameters * float(np.log(rows.weight_N.sum()))


def worst_leaf(mixture: Mixture, rows: Rows) -> int:
    """The leaf with the most squared error left (Gaussian), or the most negative log-likelihood."""
    experts = sweep(rows, mixture).experts
    if isinstance(mixture.family, Gaussian):
        return int(diagonals(experts.square_LOO).sum(axis=1).argmax())
    return int(_deviance(mixture, rows).argmax())


def split(mixture: Mixture, leaf: int, random: np.random.Generator) -> Mixture:
    """A gate in a random direction in place of `leaf`, over experts that all start as it was."""
    tree, size = mixture.tree.split(leaf), mixture.gate_GPO.shape[1]
    free = tree.branching - 1
    gate_1PO = random.normal(size=(1, size, free)) * (1.5 / np.sqrt(size))
    from_L = np.concatenate([np.arange(mixture.tree.num_leaves), np.full(free, leaf)])
    return replace(
        mixture, tree=tree, gate_GPO=np.concatenate([mixture.gate_GPO, gate_1PO]), experts=mixture.experts[from_L]
    )


def without(mixture: Mixture, leaf: int) -> Mixture:
    """The mixture without `leaf`: the other branches of its gate share what it had."""
    pruned = mixture.tree.without(leaf)
    full_GPB = np.concatenate([mixture.gate_GPO, np.zeros((*mixture.gate_GPO.shape[:2], 1))], axis=2)
    moved_GPB = np.take_along_axis(full_GPB[pruned.gate_G], pruned.branch_GB[:, None, :], axis=2)
    # predictors count relative to the last branch, which may be another one now
    gate_GPO = (moved_GPB - moved_GPB[:, :, -1:])[:, :, :-1]
    open_G1O = pruned.tree.open_GB[:, None, :-1]
    experts: Experts = mixture.experts[pruned.leaf_L]
    return replace(mixture, tree=pruned.tree, gate_GPO=np.where(open_G1O, gate_GPO, 0.0), experts=experts)


def joined(first: Fit, second: Fit) -> Fit:
    """The second fit, with the path of the first before its own."""
    return replace(
        second,
        loglik_path=first.loglik_path + second.loglik_path,
        objective_path=first.objective_path + second.objective_path,
        passes=first.passes + second.passes,
    )


def _deviance(mixture: Mixture, rows: Rows) -> Floats:
    mixture, total_L = mixture.on(rows.space), rows.space.zeros((mixture.tree.num_leaves,))
    for block in rows.blocks(mixture):
        posterior = mixture.posterior(block.z_ZN)
        total_L -= (posterior.leaf_LN * posterior.reading.judged.log_density_LN) @ block.weight_N
    return total_L
