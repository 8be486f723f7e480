"""The three error functions of the adaptive mixture of local experts, for a tree of any depth.

Source: Jacobs, Jordan, Nowlan & Hinton 1991, "Adaptive mixtures of local experts", eq. 1.1-1.3.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from turnout.errors import ConfigError
from turnout.hme.families import Poisson
from turnout.hme.gaussian import Gaussian
from turnout.hme.mixture import Mixture
from turnout.hme.rows import Block
from turnout.hme.shares import Shares
from turnout.hme.tree import Floats
from turnout.registry import Table


@dataclass(frozen=True, kw_only=True, eq=False)
class Pull:
    """Minus an error summed over rows, and its derivatives by what the gates and the experts say."""

    value: float
    shares: Shares  # of the branches, which the gates' own derivatives need
    log_prior_LN: Floats  # by the log prior of each leaf
    predictor_LON: Floats  # by each linear predictor of each expert
    log_noise_L: Floats  # by the log deviation of each expert's noise


ERRORS: Table[Callable[[Mixture, Block], Pull]] = Table("error function")


@ERRORS.register("cooperation")
def cooperation(mixture: Mixture, block: Block) -> Pull:
    """E1 = |y - sum_l p_l mu_l|^2: experts together make the output."""
    mean_LON, prior_LN, shares = _outputs(mixture, block)
    error_ON = block.y_TN - np.einsum("ln,lon->on", prior_LN, mean_LON)
    weighted_ON = 2 * block.weight_N * error_ON
    return Pull(
        value=-float((block.weight_N * error_ON**2).sum()),
        shares=shares,
        log_prior_LN=prior_LN * np.einsum("on,lon->ln", weighted_ON, mean_LON),
        predictor_LON=prior_LN[:, None] * weighted_ON,
        log_noise_L=np.zeros(len(prior_LN)),
    )


@ERRORS.register("competition")
def competition(mixture: Mixture, block: Block) -> Pull:
    """E2 = sum_l p_l |y - mu_l|^2: each expert is asked for the whole output."""
    mean_LON, prior_LN, shares = _outputs(mixture, block)
    error_LON = block.y_TN - mean_LON
    weighted_LN = block.weight_N * prior_LN
    square_LN = weighted_LN * (error_LON**2).sum(axis=1)
    return Pull(
        value=-float(square_LN.sum()),
        shares=shares,
        log_prior_LN=-square_LN,
        predictor_LON=2 * weighted_LN[:, None] * error_LON,
        log_noise_L=np.zeros(len(prior_LN)),
    )


@ERRORS.register("mixture")
def mixture_likelihood(mixture: Mixture, block: Block) -> Pull:
    """E3 = -log sum_l p_l P_l(y): the negative log-likelihood, of any family."""
    posterior = mixture.posterior(block.z_ZN)
    weight_LN = block.weight_N * posterior.leaf_LN
    signal_LON, log_noise_L = posterior.reading.judged.signal_LON, np.zeros(len(weight_LN))
    if isinstance(mixture.family, Gaussian):
        root_LOO, _ = mixture.experts.roots
        score_LON = 2 * np.linalg.solve(root_LOO.swapaxes(1, 2), signal_LON)
        log_noise_L = (weight_LN * (2 * (signal_LON**2).sum(axis=1) - mixture.family.outputs)).sum(axis=1)
    elif isinstance(mixture.family, Poisson):
        score_LON = block.y_TN - signal_LON
    else:
        score_LON = block.y_TN[:-1] - signal_LON
    return Pull(
        value=float(block.weight_N @ posterior.loglik_N),
        shares=posterior.reading.shares,
        log_prior_LN=weight_LN,
        predictor_LON=weight_LN[:, None] * score_LON,
        log_noise_L=log_noise_L,
    )


def _outputs(mixture: Mixture, block: Block) -> tuple[Floats, Floats, Shares]:
    if not isinstance(mixture.family, Gaussian):
        raise ConfigError("the errors 'cooperation' and 'competition' compare outputs: they need Gaussian experts")
    shares = mixture.shares(block.x_PN)
    prior_LN = np.exp(mixture.log_priors(shares))
    return mixture.family.mean(block.x_PN, mixture.experts), prior_LN, shares
