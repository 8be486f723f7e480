"""The squared coefficient of variation: how uneven a load is, whatever its size."""

from torch import Tensor

# floor of the squared mean; the authors' code adds it, which would make the value depend on the number of tokens
LEAST_SQUARED_MEAN = 1e-10


def cv_squared(load_E: Tensor) -> Tensor:
    """Variance over squared mean, the variance that of the E values themselves; 0 if all are equal, or all 0.

    Shapes: load_E (E,), at least 0; returns ().
    Source: Shazeer et al. 2017, arXiv:1701.06538, eq. 7 and 11.
    """
    mean = load_E.mean()
    return (load_E - mean).square().mean() / mean.square().clamp(min=LEAST_SQUARED_MEAN)
