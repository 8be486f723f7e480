"""A MoE layer made from a tree is the same function, and can be trained on."""

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from turnout.errors import ConfigError
from turnout.hme import HMEClassifier, HMERegressor, hidden_for, to_moe


def _data(num_rows: int = 500) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    x_ND = random.normal(size=(num_rows, 4)) * (1, 3, 0.5, 1) + (0, 2, -1, 0)
    y_NO = np.column_stack([np.abs(x_ND[:, 0]) + x_ND[:, 1], x_ND[:, 2] * np.sign(x_ND[:, 3]), x_ND[:, 3]])
    return x_ND, y_NO + 0.05 * random.normal(size=y_NO.shape)


@pytest.mark.parametrize("expert", ["relu", "gelu"])
@pytest.mark.parametrize(("depth", "branching"), [(1, 2), (1, 5), (2, 2), (2, 3)])
def test_the_layer_gives_what_the_tree_predicts(depth: int, branching: int, expert: str) -> None:
    x_ND, y_NO = _data()
    fitted = HMERegressor(depth, branching, random_state=0, max_iter=20).fit(x_ND, y_NO)
    moe = to_moe(fitted, expert=expert, dtype=torch.float64)
    with torch.no_grad():
        got = moe(torch.as_tensor(x_ND)).y.numpy()
    np.testing.assert_allclose(got[:, :3], fitted.predict(x_ND), rtol=1e-8, atol=1e-8)
    np.testing.assert_array_equal(got[:, 3], 0)


def test_a_deep_tree_starts_a_flat_router_near_its_own_predictions() -> None:
    x_ND, y_NO = _data()
    fitted = HMERegressor(3, random_state=0, max_iter=30).fit(x_ND, y_NO)
    moe = to_moe(fitted, x_ND, y_NO, dtype=torch.float64)
    with torch.no_grad():
        got = moe(torch.as_tensor(x_ND)).y.numpy()[:, :3]
    left = ((got - y_NO) ** 2).sum() / ((y_NO - y_NO.mean(axis=0)) ** 2).sum()
    slope = np.linalg.lstsq(np.column_stack([x_ND, np.ones(500)]), y_NO, rcond=None)[0]
    linear = ((np.column_stack([x_ND, np.ones(500)]) @ slope - y_NO) ** 2).sum()
    assert left < 0.5 * linear / ((y_NO - y_NO.mean(axis=0)) ** 2).sum()
    with pytest.raises(ConfigError, match="needs rows X"):
        to_moe(fitted)


def test_rows_for_the_router_are_read_as_the_tree_reads_them() -> None:
    x_ND, y_NO = _data()
    holes_ND = np.where(np.random.default_rng(1).random(x_ND.shape) < 0.1, np.nan, x_ND)
    fitted = HMERegressor(3, missing="mean", random_state=0, max_iter=5).fit(holes_ND, y_NO)
    assert all(parameter.isfinite().all() for parameter in to_moe(fitted, holes_ND).parameters())
    with pytest.raises(ValueError, match="X has 2 features, but HMERegressor is expecting 4"):
        to_moe(fitted, x_ND[:, :2])
    with pytest.raises(ConfigError, match=r"y has shape \(500, 2\); 500 rows of 3 targets are needed"):
        to_moe(fitted, x_ND, y_NO[:, :2])


def test_training_goes_on_from_the_tree() -> None:
    x_ND, y_NO = _data()
    fitted = HMERegressor(1, 4, random_state=0, max_iter=20).fit(x_ND, y_NO)
    moe = to_moe(fitted, top_k=2, hidden=hidden_for(fitted) + 8, dtype=torch.float64)
    x, y = torch.as_tensor(x_ND), torch.as_tensor(y_NO)
    losses = []
    for _ in range(12):
        loss = (moe(x).y[:, :3] - y).square().mean()
        moe.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in moe.parameters():
                parameter -= 1e-3 * parameter.grad
        losses.append(loss.item())
    assert losses[-1] < losses[0] < y.var()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"expert": "swiglu"}, r"must be one of: relu, gelu"),
        ({"hidden": 2}, "hidden=2 must be at least 6"),
    ],
)
def test_what_a_layer_cannot_be_is_refused(settings: dict, message: str) -> None:
    x_ND, y_NO = _data(60)
    fitted = HMERegressor(1, random_state=0, max_iter=3).fit(x_ND, y_NO)
    with pytest.raises(ConfigError, match=message):
        to_moe(fitted, **settings)


def test_only_gaussian_experts_become_a_layer() -> None:
    x_ND, y_NO = _data(60)
    with pytest.raises(ConfigError, match="only a tree of Gaussian experts"):
        to_moe(HMEClassifier(1, max_iter=2).fit(x_ND, y_NO[:, 0] > 1))  # type: ignore[arg-type]
    wide = HMERegressor(1, max_iter=2).fit(x_ND[:, :2], y_NO)
    with pytest.raises(ConfigError, match="3 outputs and 2 inputs"):
        to_moe(wide)
