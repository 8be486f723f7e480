"""A comparison is read off curves: margins, time to the other's loss, break-even."""

from collections.abc import Sequence

import pytest

from turnout.errors import ConfigError
from turnout.train.compare import Curve, ahead_from, check_comparable, seconds_to, verdicts
from turnout.train.recipes import load_recipe


def curve(recipe: str, losses: Sequence[float], seed: int = 0) -> Curve:
    seconds = tuple(10.0 * (i + 1) for i in range(len(losses)))
    return Curve(
        recipe=recipe,
        seed=seed,
        seconds=seconds,
        tokens=tuple(int(100 * s) for s in seconds),
        val_loss=tuple(losses),
        tokens_per_s=100.0,
        params_total=2,
        params_active=1,
    )


def test_time_to_a_loss_is_interpolated_between_evaluations() -> None:
    falling = curve("a", [5.0, 4.0, 3.0])
    assert seconds_to(falling, 4.5) == pytest.approx(15.0)
    assert seconds_to(falling, 3.0) == pytest.approx(30.0)
    assert seconds_to(falling, 2.0) is None
    assert seconds_to(falling, 6.0) == pytest.approx(10.0)


def test_break_even_is_where_the_lead_is_kept_to_the_end() -> None:
    dense = curve("dense", [5.0, 4.0, 3.5, 3.2])
    assert ahead_from(curve("moe", [5.5, 3.9, 3.6, 3.0]), dense) == 40.0
    assert ahead_from(curve("moe", [5.5, 3.9, 3.4, 3.0]), dense) == 20.0
    assert ahead_from(curve("moe", [4.0, 3.9, 3.4, 3.3]), dense) is None


def test_a_verdict_takes_the_mean_margin_and_the_worst_seed() -> None:
    curves = [
        curve("moe", [5.0, 3.0], seed=0),
        curve("dense", [5.5, 3.4], seed=0),
        curve("moe", [5.0, 3.1], seed=1),
        curve("dense", [4.9, 3.3], seed=1),
    ]
    (verdict,) = verdicts(curves)
    assert verdict.margin == pytest.approx(0.3)
    assert verdict.margins == pytest.approx((0.4, 0.2))
    assert verdict.time_ratio == pytest.approx((10 + 10 * (5.0 - 3.3) / 1.9) / 20)
    assert verdict.break_even_s == 20.0


def test_one_seed_that_never_reaches_the_loss_means_not_reached() -> None:
    curves = [
        curve("moe", [5.0, 3.0], 0),
        curve("dense", [5, 3.4], 0),
        curve("moe", [5, 3.5], 1),
        curve("dense", [5, 3.4], 1),
    ]
    (verdict,) = verdicts(curves)
    assert verdict.time_ratio is None
    assert verdict.break_even_s is None


def test_recipes_on_different_text_are_not_compared() -> None:
    with pytest.raises(ConfigError, match="do not use the same data or evaluation text"):
        check_comparable([load_recipe("tiny"), load_recipe("tiny-dense", ["data.val_fraction=0.1"])])
