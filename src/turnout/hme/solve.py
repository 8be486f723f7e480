"""From standardized rows to a fitted mixture: the solvers by name, restarts, growth and pruning."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from turnout.errors import ConfigError
from turnout.hme.ascent import AscentConfig, fit_ascent
from turnout.hme.em import EMConfig, Fit, fit_em
from turnout.hme.families import Family
from turnout.hme.growth import grow, prune
from turnout.hme.mixture import Mixture, new_mixture
from turnout.hme.online import OnlineConfig, Recursion, learn_rows
from turnout.hme.sweep import Rows, loglik
from turnout.hme.tree import Tree

SOLVERS = ("em", "least_squares", "gradient", "online")
Watch = Callable[[int, float], None]


@dataclass(frozen=True, kw_only=True)
class SolveConfig:
    """Everything that decides how a mixture is fitted."""

    solver: Literal["em", "least_squares", "gradient", "online"] = "em"  # algorithms 1, 2, ascent, recursive
    em: EMConfig = EMConfig()
    ascent: AscentConfig = AscentConfig()
    online: OnlineConfig = OnlineConfig()
    online_passes: int = 2  # of the on-line solver over the rows
    restarts: int = 1  # random starts, of which the likeliest fit is kept
    most_leaves: int = 0  # grow to at most this many experts; 0: keep the tree
    prune: bool = False  # remove experts that do not pay for their parameters

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ConfigError(f"solver={self.solver!r} must be one of: {', '.join(SOLVERS)}")
        if self.restarts < 1:
            raise ConfigError(f"n_init={self.restarts} must be at least 1")
        if (self.most_leaves or self.prune) and self.solver in ("gradient", "online"):
            raise ConfigError(f"growth and pruning need solver='em' or 'least_squares', not {self.solver!r}")
        if self.ascent.error != "mixture" and self.solver != "gradient":
            raise ConfigError(f"error={self.ascent.error!r} is what solver='gradient' can climb, not {self.solver!r}")
        if self.em.hold_noise and self.solver in ("gradient", "online"):
            raise ConfigError(
                f"hold_noise={self.em.hold_noise} needs solver='em' or 'least_squares', not {self.solver!r}"
            )


def solve(
    tree: Tree, family: Family, rows: Rows, config: SolveConfig, random: np.random.Generator, watch: Watch | None = None
) -> Fit:
    """The likeliest of `restarts` fits, then grown and pruned if asked."""
    fits = []
    for _ in range(config.restarts):
        start = new_mixture(tree, family, rows.y_NT.T, rows.weight_N, rows.num_inputs, random)
        fits.append(_fitted(start, rows, config, random, watch))
    fit = max(fits, key=lambda one: loglik(rows, one.mixture)) if len(fits) > 1 else fits[0]
    # a fit has noise of its own by now, from which growth and pruning go on
    later = replace(config.em, hold_noise=0)
    if config.most_leaves:
        fit = grow(fit, rows, later, config.most_leaves, random, watch)
    return prune(fit, rows, later, watch) if config.prune else fit


def _fitted(start: Mixture, rows: Rows, config: SolveConfig, random: np.random.Generator, watch: Watch | None) -> Fit:
    if config.solver in ("em", "least_squares"):
        return fit_em(start, rows, config.em, watch)
    if config.solver == "gradient":
        return fit_ascent(start, rows, config.ascent, random, watch)
    state, path = Recursion.start(start, config.online), [loglik(rows, start)]
    for _ in range(config.online_passes):
        shuffled = rows.taken(random.permutation(len(rows)))
        state = learn_rows(state, shuffled, config.online)
        path.append(loglik(rows, state.mixture))
    return Fit(
        mixture=state.mixture, loglik_path=tuple(path), objective_path=tuple(path), passes=config.online_passes,
        converged=False,
    )  # fmt: skip
