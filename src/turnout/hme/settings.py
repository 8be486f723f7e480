"""From an estimator's settings to the configuration of its solver, checked once."""

from typing import Any

from turnout.errors import ConfigError
from turnout.hme.ascent import AscentConfig
from turnout.hme.checks import check_choice, check_positive, check_whole
from turnout.hme.em import EMConfig
from turnout.hme.online import OnlineConfig
from turnout.hme.solve import SOLVERS, SolveConfig

MOST_ITERATIONS, ONLINE_PASSES = 100, 3  # where max_iter is left open


def solve_config(settings: Any) -> SolveConfig:
    """How an `HMERegressor` or `HMEClassifier` of these settings is fitted.

    Raises: ValueError for a setting that is no number, out of range, or not for this solver.
    """
    check_choice("solver", settings.solver, SOLVERS)
    check_positive("ridge", settings.ridge)
    own_iter = ONLINE_PASSES if settings.solver == "online" else MOST_ITERATIONS
    max_iter = own_iter if settings.max_iter is None else settings.max_iter
    for name, whole in (
        ("max_iter", max_iter), ("newton_steps", settings.newton_steps), ("n_init", settings.n_init),
        ("batch_size", settings.batch_size), ("hold_noise", settings.hold_noise),
    ):  # fmt: skip
        check_whole(name, whole)
    check_positive("max_iter", max_iter, 1)
    check_positive("hold_noise", settings.hold_noise)
    for name in ("tol", "learning_rate", "momentum", "forgetting"):
        check_positive(name, getattr(settings, name))
    try:
        return SolveConfig(
            solver=settings.solver,
            em=EMConfig(
                algorithm=2 if settings.solver == "least_squares" else 1, max_iter=max_iter, tol=settings.tol,
                newton_steps=settings.newton_steps, ridge=settings.ridge, hold_noise=settings.hold_noise,
            ),
            ascent=AscentConfig(
                error=settings.error, learning_rate=settings.learning_rate, momentum=settings.momentum,
                batch_size=settings.batch_size, max_iter=max_iter, tol=settings.tol, ridge=settings.ridge,
            ),
            online=OnlineConfig(forgetting=settings.forgetting, block_rows=settings.batch_size),
            online_passes=max_iter,
            restarts=settings.n_init, most_leaves=settings.max_experts or 0, prune=settings.prune,
        )  # fmt: skip
    except ConfigError as error:
        raise ValueError(str(error)) from error
