"""What Jordan & Jacobs 1994 compared with: backprop, trees with linear leaves, regression splines as in MARS."""

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import Ridge
from sklearn.tree import DecisionTreeRegressor

Floats = NDArray[np.float64]


class LinearTree:
    """CART whose leaves hold linear regressions. Source: Breiman et al. 1984, with linear leaves as in the paper."""

    def __init__(self, min_rows: int, seed: int) -> None:
        self.tree, self.leaves = DecisionTreeRegressor(min_samples_leaf=min_rows, random_state=seed), {}

    def fit(self, x_ND: Floats, y_NO: Floats) -> "LinearTree":
        leaf_N = self.tree.fit(x_ND, y_NO).apply(x_ND)
        self.leaves = {leaf: Ridge(1e-3).fit(x_ND[leaf_N == leaf], y_NO[leaf_N == leaf]) for leaf in np.unique(leaf_N)}
        return self

    def predict(self, x_ND: Floats) -> Floats:
        leaf_N = self.tree.apply(x_ND)
        y_NO = np.empty((len(x_ND), self.tree.n_outputs_))
        for leaf in np.unique(leaf_N):
            y_NO[leaf_N == leaf] = self.leaves[leaf].predict(x_ND[leaf_N == leaf])
        return y_NO


class Splines:
    """MARS without its backward pass: products of hinges, chosen greedily two at a time.

    Source: Friedman 1991, "Multivariate adaptive regression splines", algorithm 2; knots at quantiles.
    """

    def __init__(self, num_bases: int = 16, most_factors: int = 3, knots: int = 5, rows: int = 4000) -> None:
        self.num_bases, self.most_factors, self.knots, self.rows = num_bases, most_factors, knots, rows
        self.bases: list[tuple[tuple[int, float, int], ...]] = [()]  # factors (input, knot, sign) of each product

    def fit(self, x_ND: Floats, y_NO: Floats) -> "Splines":
        x, left = x_ND[: self.rows], y_NO[: self.rows] - y_NO[: self.rows].mean(axis=0)
        knots_KD = np.quantile(x, np.linspace(0.1, 0.9, self.knots), axis=0)
        basis_QN = np.full((1, len(x)), len(x) ** -0.5)
        while len(self.bases) < self.num_bases:
            options = [
                (*parent, (d, float(knot), 1))
                for parent in self.bases
                if len(parent) < self.most_factors
                for d in set(range(x.shape[1])) - {factor[0] for factor in parent}
                for knot in knots_KD[:, d]
            ]
            best = max(options, key=lambda option: self._gain(self._pair(option, x), basis_QN, left))
            pair_NB = _orthogonal(self._pair(best, x), basis_QN)
            basis_QN, left = np.vstack([basis_QN, pair_NB.T]), left - pair_NB @ (pair_NB.T @ left)
            self.bases += [best, (*best[:-1], (*best[-1][:2], -1))]
        self.linear = Ridge(1e-6).fit(self._values(x_ND), y_NO)
        return self

    def predict(self, x_ND: Floats) -> Floats:
        return self.linear.predict(self._values(x_ND))

    def _values(self, x_ND: Floats) -> Floats:
        return np.stack([_product(basis, x_ND) for basis in self.bases], axis=1)

    def _pair(self, option: tuple[tuple[int, float, int], ...], x_ND: Floats) -> Floats:
        parent_N, (d, knot, _) = _product(option[:-1], x_ND), option[-1]
        over_N = x_ND[:, d] - knot
        return np.stack([parent_N * np.maximum(over_N, 0), parent_N * np.maximum(-over_N, 0)], axis=1)

    def _gain(self, pair_NB: Floats, basis_QN: Floats, left_NO: Floats) -> float:
        return float(((_orthogonal(pair_NB, basis_QN).T @ left_NO) ** 2).sum())


def _product(factors: tuple[tuple[int, float, int], ...], x_ND: Floats) -> Floats:
    value_N = np.ones(len(x_ND))
    for d, knot, sign in factors:
        value_N = value_N * np.maximum(sign * (x_ND[:, d] - knot), 0)
    return value_N


def _orthogonal(pair_NB: Floats, basis_QN: Floats) -> Floats:
    """Orthonormal columns of what the pair adds to the basis."""
    return np.linalg.qr(pair_NB - basis_QN.T @ (basis_QN @ pair_NB))[0]


class Backprop:
    """One hidden layer of tanh units, gradient descent with momentum on half the mean squared error.

    Source: Jordan & Jacobs 1994, section 4 (60 hidden units); weights start in +-1/sqrt(fan in).
    """

    def __init__(self, sizes: tuple[int, int, int], rate: float, momentum: float, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        inputs, hidden, outputs = sizes
        self.weights = [self._uniform(inputs + 1, hidden), self._uniform(hidden + 1, outputs)]
        self.speeds = [np.zeros_like(weight) for weight in self.weights]
        self.rate, self.momentum = rate, momentum

    def _uniform(self, fan_in: int, fan_out: int) -> Floats:
        return self.random.uniform(-1, 1, (fan_in, fan_out)) / np.sqrt(fan_in)

    def run_pass(self, x_ND: Floats, y_NO: Floats, batch_size: int) -> None:
        """One pass over the rows in random order, a step a batch."""
        order_N = self.random.permutation(len(x_ND))
        for start in range(0, len(x_ND), batch_size):
            chosen = order_N[start : start + batch_size] if batch_size < len(x_ND) else slice(None)
            self._step(x_ND[chosen], y_NO[chosen])

    def _step(self, x_ND: Floats, y_NO: Floats) -> None:
        (into, out), count = self.weights, len(x_ND)
        hidden_NH = np.tanh(x_ND @ into[:-1] + into[-1])
        error_NO = hidden_NH @ out[:-1] + out[-1] - y_NO
        back_NH = (error_NO @ out[:-1].T) * (1 - hidden_NH * hidden_NH)
        slopes = (
            np.vstack([x_ND.T @ back_NH, back_NH.sum(axis=0)]) / count,
            np.vstack([hidden_NH.T @ error_NO, error_NO.sum(axis=0)]) / count,
        )
        for weight, speed, slope in zip(self.weights, self.speeds, slopes, strict=True):
            speed *= self.momentum
            speed -= self.rate * slope
            weight += speed

    def predict(self, x_ND: Floats) -> Floats:
        into, out = self.weights
        return np.tanh(x_ND @ into[:-1] + into[-1]) @ out[:-1] + out[-1]
