"""From a fitted tree to a `MoE` layer: the same function, as weights that training can go on from.

A linear expert U x is a network of two layers, for relu and gelu alike: act(a) - act(-a) = a. The gate of a flat
mixture is a linear router with a bias, and a tree of two levels is the hierarchical router; a deeper tree's
responsibilities are fitted by one linear router (posterior routing as a warm start).
"""

from typing import cast

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted

from turnout.contracts import Loss, RouterConfig
from turnout.errors import ConfigError
from turnout.hme.algebra import pair_products
from turnout.hme.gaussian import Gaussian
from turnout.hme.glim import climbed, moments, spread
from turnout.hme.regressor import HMERegressor
from turnout.hme.shares import predictors, softmax_slopes, softmax_with_last_zero
from turnout.hme.text import in_units
from turnout.hme.tree import CLOSED, Floats, Tree
from turnout.layers import MoE
from turnout.routers import Hierarchical, TopK
from turnout.routers.hierarchical import HierarchicalRouter

ROUTER_RIDGE = 1e-2  # of the linear router that stands for a deep tree, in rows
ROUTER_STEPS = 50  # of Newton, for it


def hidden_for(estimator: HMERegressor) -> int:
    """Hidden width an expert of a `MoE` needs to be a linear expert of this tree: twice the rank, at most 2 D."""
    weight_LPO = estimator.mixture_.experts.weight_LPO
    return 2 * min(weight_LPO.shape[1] - 1, weight_LPO.shape[2])


def to_moe(
    estimator: HMERegressor,
    X: Floats | None = None,
    y: Floats | None = None,
    *,
    top_k: int | None = None,
    hidden: int | None = None,
    expert: str = "relu",
    losses: tuple[Loss, ...] = (),
    dtype: torch.dtype = torch.float32,
) -> MoE:
    """A `MoE` layer over the inputs of `estimator`, whose first O outputs start as the tree's.

    With `top_k` None every expert answers, and for depth 1 and 2 the layer's output is the tree's prediction; deeper
    trees need rows `X` to fit a router to their responsibilities, to the posteriors where `y` is given.
    Raises: ConfigError for experts that are not Gaussian, more outputs than inputs, a hidden width that is too small,
    a gated expert, rows that are missing or targets of another shape; ValueError for rows X that the tree refuses.
    """
    check_is_fitted(estimator)
    mixture = estimator.mixture_
    _check(estimator, hidden, expert)
    num_experts, dim = mixture.tree.num_leaves, estimator.n_features_in_
    moe = MoE(
        dim,
        hidden_for(estimator) if hidden is None else hidden,
        num_experts,
        router=_router(estimator, top_k),
        expert=expert,
        bias=True,
        losses=losses,
    ).to(dtype)
    with torch.no_grad():
        _set_experts(moe, estimator)
        _set_router(moe, estimator, X, y)
    return moe


def _check(estimator: HMERegressor, hidden: int | None, expert: str) -> None:
    mixture = estimator.mixture_
    if not isinstance(mixture.family, Gaussian):
        raise ConfigError("a MoE layer mixes outputs: only a tree of Gaussian experts is the same function")
    if mixture.family.outputs > estimator.n_features_in_:
        raise ConfigError(
            f"the tree has {mixture.family.outputs} outputs and {estimator.n_features_in_} inputs; a MoE layer gives "
            "as many numbers as it takes"
        )
    if mixture.tree.num_leaves < 2:
        raise ConfigError("a tree of one expert needs no router; fit one of depth 1 or more")
    if expert not in ("relu", "gelu"):
        raise ConfigError(f"expert={expert!r} must be one of: relu, gelu (act(a) - act(-a) = a makes them linear)")
    if hidden is not None and hidden < hidden_for(estimator):
        raise ConfigError(f"hidden={hidden} must be at least {hidden_for(estimator)} for experts of this tree")


def _is_tree_of_two_levels(estimator: HMERegressor) -> bool:
    """Whether gates and leaves stand in the order of `Tree.complete`, which is that of the hierarchical router."""
    tree = estimator.mixture_.tree
    return np.array_equal(tree.child_GB, Tree.complete(2, tree.branching).child_GB)


def _router(estimator: HMERegressor, top_k: int | None) -> RouterConfig:
    tree = estimator.mixture_.tree
    if top_k is None and _is_tree_of_two_levels(estimator):
        each = TopK(k=tree.branching, bias=True)
        return Hierarchical(groups=tree.branching, outer=each, inner=each)
    k = tree.num_leaves if top_k is None else top_k
    return TopK(k=k, bias=True, renormalize=k > 1)


def _set_experts(moe: MoE, estimator: HMERegressor) -> None:
    """Expert l gets up = [A, -A] and down = [B, -B] with A B its slopes; hidden units beyond these start silent."""
    experts, outputs = moe.experts, estimator.mixture_.family.outputs
    slope_LDO, constant_LO = _in_own_units(estimator)
    left_LDR, size_LR, right_LRO = np.linalg.svd(slope_LDO, full_matrices=False)
    root_LR = np.sqrt(size_LR)
    up_LDR, down_LRO = left_LDR * root_LR[:, None], root_LR[:, :, None] * right_LRO
    used = 2 * root_LR.shape[1]
    up, down = _tensor(experts, "up_EDG"), _tensor(experts, "down_EFD")
    down.zero_()
    up[:, :, :used] = torch.as_tensor(np.concatenate([up_LDR, -up_LDR], axis=2), dtype=up.dtype)
    down[:, :used, :outputs] = torch.as_tensor(np.concatenate([down_LRO, -down_LRO], axis=1), dtype=down.dtype)
    _tensor(experts, "up_bias_EG").zero_()
    _tensor(experts, "down_bias_ED").zero_()[:, :outputs] = torch.as_tensor(constant_LO, dtype=down.dtype)


def _in_own_units(estimator: HMERegressor) -> tuple[Floats, Floats]:
    """Slopes and constants of all experts in the units of X and y: (L, D, O) and (L, O)."""
    scale, target = estimator.scale_, estimator.target_scale_
    weight_LPO = estimator.mixture_.experts.weight_LPO * target.deviation_D
    slope_LDO = weight_LPO[:, :-1] / scale.deviation_D[:, None]
    return slope_LDO, weight_LPO[:, -1] - scale.mean_D @ slope_LDO + target.mean_D


def _set_router(moe: MoE, estimator: HMERegressor, X: Floats | None, y: Floats | None) -> None:
    mixture = estimator.mixture_
    if isinstance(moe.router, HierarchicalRouter):
        # gates stand in the same order
        for router, gate_PO in zip([moe.router.outer, *moe.router.inner], mixture.gate_GPO, strict=True):
            _set_score(router, gate_PO, estimator)
    elif mixture.tree.num_gates == 1:
        _set_score(moe.router, mixture.gate_GPO[0], estimator, mixture.tree.child_GB[0])
    else:
        _set_score(moe.router, _flat_gate(estimator, X, y), estimator)


def _set_score(
    router: torch.nn.Module, gate_PO: Floats, estimator: HMERegressor, child_B: np.ndarray | None = None
) -> None:
    """A linear score from a gate's predictors; the last branch's is zero. `child_B` says which leaf a branch is."""
    gate_PB = np.concatenate([gate_PO, np.zeros((len(gate_PO), 1))], axis=1)
    own_PB = np.stack([in_units(gate_P, estimator.scale_) for gate_P in gate_PB.T], axis=1)
    if child_B is not None:
        open_B = (child_B < 0) & (child_B != CLOSED)
        own_PB = own_PB[:, open_B][:, np.argsort(~child_B[open_B])]
    score = cast(torch.nn.Module, router.score)
    weight_ED, bias_E = _tensor(score, "weight_ED"), _tensor(score, "bias_E")
    weight_ED.copy_(torch.as_tensor(own_PB[:-1].T.copy()))
    bias_E.copy_(torch.as_tensor(own_PB[-1]))


def _flat_gate(estimator: HMERegressor, X: Floats | None, y: Floats | None) -> Floats:
    """Predictors of one softmax over all leaves, fitted to responsibilities, or to posteriors given y; (P, L - 1)."""
    if X is None:
        raise ConfigError("one linear router for a tree of several levels needs rows X, to be fitted to its gates")
    mixture = estimator.mixture_
    x_PN = estimator.standard_inputs(X)
    target_LN = mixture.priors(x_PN)
    if y is not None:
        y_NT = np.asarray(y, dtype=np.float64)
        if len(y_NT) != x_PN.shape[1] or y_NT.size != len(y_NT) * mixture.family.targets:
            raise ConfigError(
                f"y has shape {y_NT.shape}; {x_PN.shape[1]} rows of {mixture.family.targets} targets are needed"
            )
        y_NT = estimator.target_scale_.standard(y_NT.reshape(x_PN.shape[1], -1))
        target_LN = mixture.posterior(np.vstack([x_PN, y_NT.T])).leaf_LN
    return _softmax_regression(x_PN, target_LN)


def _softmax_regression(x_PN: Floats, target_LN: Floats) -> Floats:
    product_QN, ridge_P = pair_products(x_PN), np.full(len(x_PN), ROUTER_RIDGE)
    weight_1PO = np.zeros((1, len(x_PN), len(target_LN) - 1))
    for _ in range(ROUTER_STEPS):
        share_1ON = softmax_with_last_zero(predictors(x_PN, weight_1PO)).free_MON
        slopes = softmax_slopes(share_1ON, target_LN[None, :-1], target_LN.sum(axis=0)[None, None])
        (found,) = moments(x_PN, product_QN, slopes)
        weight_1PO, promise = climbed(
            weight_1PO, found, ridge_P, lambda step_1PO: spread(predictors(x_PN, step_1PO)), 1e-9 * x_PN.shape[1]
        )
        if promise == 0:
            break
    return weight_1PO[0]


def _tensor(module: torch.nn.Module, name: str) -> torch.Tensor:
    value = getattr(module, name)
    assert isinstance(value, torch.Tensor), name
    return value
