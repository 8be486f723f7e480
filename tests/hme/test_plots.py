"""Pictures name what was fitted, and refuse what they cannot draw."""

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from turnout.errors import ConfigError
from turnout.hme import HMERegressor, plot_fit, plot_tree

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(80, 2))
Y = np.abs(X[:, 0])


def test_a_tree_is_drawn_with_the_names_it_was_fitted_with() -> None:
    fitted = HMERegressor(2, random_state=0, max_iter=5).fit(X, Y)
    fitted.feature_names_in_ = np.array(["bend", "idle"], dtype=object)
    for names, legal in ((None, {"bend", "idle"}), (np.array(["a", "b"]), {"a", "b"})):
        axes = plot_tree(fitted, names)
        assert {text.get_text() for text in axes.texts} - legal == {f"expert {leaf}" for leaf in range(4)}
        assert len(axes.patches) == 2 * fitted.mixture_.tree.num_gates
    assert "bend" in fitted.export_text()
    with pytest.raises(ValueError, match="3 feature_names for 2 features"):
        plot_tree(fitted, ["a", "b", "c"])


def test_a_fit_is_drawn_along_one_input_with_missing_ones_left_out() -> None:
    holes = np.where(RANDOM.random(X.shape) < 0.2, np.nan, X)
    axes = plot_fit(HMERegressor(1, missing="mean", random_state=0, max_iter=5).fit(holes, Y), holes, Y, feature=1)
    for line in axes.lines:
        assert line.get_xdata().min() == np.nanmin(holes[:, 1])
    assert np.isfinite(axes.lines[-1].get_ydata()).all()


def test_what_has_no_picture_is_refused() -> None:
    with pytest.raises(ConfigError, match="draws one output, not 2"):
        plot_fit(HMERegressor(1, max_iter=2).fit(X, X), X, X)
    with pytest.raises(ConfigError, match="feature=2 must be 0 to 1"):
        plot_fit(HMERegressor(1, max_iter=2).fit(X, Y), X, Y, feature=2)
