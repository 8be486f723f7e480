"""Trees of any shape: paths, splits, pruning."""

import numpy as np
import pytest

from tests.hme.problems import random_problem, random_tree, stirred

pytest.importorskip("sklearn")

from turnout.errors import ConfigError
from turnout.hme.growth import split, without
from turnout.hme.paths import branch_mass, leaf_nodes, log_priors
from turnout.hme.shares import softmax_with_last_zero
from turnout.hme.tree import Tree


@pytest.mark.parametrize("branching", [2, 3, 4])
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_a_complete_tree_has_every_leaf_once_under_every_level(depth: int, branching: int) -> None:
    tree = Tree.complete(depth, branching)
    assert tree.num_leaves == branching**depth
    np.testing.assert_array_equal(tree.under_GBL.sum(axis=(0, 1)), depth)
    if depth:
        np.testing.assert_array_equal(tree.under_GBL[0].sum(axis=0), 1)


@pytest.mark.parametrize("seed", range(12))
def test_a_split_leaf_says_what_it_said(seed: int) -> None:
    """Both halves are copies: the density of every row is the same, whatever the new gate asks."""
    mixture, rows = random_problem(seed)
    mixture = stirred(mixture, seed)
    leaf = seed % mixture.tree.num_leaves
    larger = split(mixture, leaf, np.random.default_rng(seed))
    assert larger.tree.num_leaves == mixture.tree.num_leaves + mixture.tree.branching - 1
    got, want = (m.posterior(np.hstack([rows.x_NP, rows.y_NT]).T).loglik_N for m in (larger, mixture))
    np.testing.assert_allclose(got, want, rtol=1e-10)


@pytest.mark.parametrize("seed", range(18))
def test_without_a_leaf_the_others_keep_their_proportions(seed: int) -> None:
    mixture, rows = random_problem(seed)
    mixture = stirred(mixture, seed)
    if mixture.tree.num_leaves == 1:
        with pytest.raises(ConfigError, match="last expert"):
            without(mixture, 0)
        return
    leaf = seed % mixture.tree.num_leaves
    before_LN, after_LN = mixture.priors(rows.x_NP.T), without(mixture, leaf).priors(rows.x_NP.T)
    np.testing.assert_allclose(after_LN.sum(axis=0), 1, rtol=1e-12)
    # siblings of the leaf share what it had; all other leaves have what they had
    gate = int(np.nonzero((mixture.tree.child_GB == ~leaf).any(axis=1))[0][0])
    beside_L = np.delete(mixture.tree.under_GBL[gate].any(axis=0), leaf)
    kept_LN = np.delete(before_LN, leaf, axis=0)
    np.testing.assert_allclose(after_LN[~beside_L], kept_LN[~beside_L], rtol=1e-9)
    want_LN = kept_LN[beside_L] * (kept_LN[beside_L].sum(axis=0) + before_LN[leaf]) / kept_LN[beside_L].sum(axis=0)
    np.testing.assert_allclose(after_LN[beside_L], want_LN, rtol=1e-9)


@pytest.mark.parametrize("seed", range(40))
def test_a_tree_numbered_anew_is_the_same_mixture(seed: int) -> None:
    mixture, rows = random_problem(seed)
    mixture, z_ZN = stirred(mixture, seed), np.hstack([rows.x_NP, rows.y_NT]).T
    tree, gate_G, leaf_L = mixture.tree.abreast()
    other = mixture.renumbered(tree, gate_G, leaf_L)
    got, want = other.posterior(z_ZN), mixture.posterior(z_ZN)
    np.testing.assert_allclose(got.leaf_LN, want.leaf_LN[leaf_L], rtol=1e-12)
    np.testing.assert_allclose(got.loglik_N, want.loglik_N, rtol=1e-12)
    parent = {int(child): gate for gate, child_B in enumerate(tree.child_GB) for child in child_B if child >= 0}
    assert all(gate < child for child, gate in parent.items())
    back = other.renumbered(mixture.tree, np.argsort(gate_G), np.argsort(leaf_L))
    np.testing.assert_array_equal(back.gate_GPO, mixture.gate_GPO)
    np.testing.assert_array_equal(back.experts.weight_LPO, mixture.experts.weight_LPO)


@pytest.mark.parametrize(("depth", "branching"), [(1, 4), (3, 2), (2, 3), (4, 2)])
def test_levels_of_a_complete_tree_numbered_abreast_are_unbroken(depth: int, branching: int) -> None:
    tree, _, _ = Tree.complete(depth, branching).abreast()
    for fork in (fork for level in tree.levels for fork in level):
        for nodes in (fork.gates, fork.children, fork.beside):
            assert isinstance(nodes, slice)
            assert nodes.step == 1


def test_trees_too_large_or_too_small_are_refused() -> None:
    for depth, branching in ((-1, 2), (2, 1), (17, 2)):
        with pytest.raises(ConfigError, match="branching \\*\\* depth at most 65536"):
            Tree.complete(depth, branching)


@pytest.mark.parametrize("seed", range(40))
def test_sums_along_paths_are_those_of_the_tree(seed: int) -> None:
    """Of complete trees, whose levels are slices, and of split and pruned ones, whose levels are lists."""
    random = np.random.default_rng(seed)
    tree = random_tree(random)
    gates, free = tree.num_gates, tree.branching - 1
    predictor_GON = np.where(tree.open_GB[:, :-1, None], random.normal(size=(gates, free, 7)), -np.inf)
    shares = softmax_with_last_zero(predictor_GON)
    leaf_LN = random.uniform(size=(tree.num_leaves, 7))
    log_share_GBN = np.where(tree.open_GB[:, :, None], shares.log_MBN, 0.0)
    want_LN = np.einsum("gbl,gbn->ln", tree.under_GBL.astype(float), log_share_GBN)
    np.testing.assert_allclose(log_priors(tree, shares)[gates:], want_LN, rtol=1e-12, atol=1e-12)
    mass_GON, mass_G1N = branch_mass(tree, leaf_nodes(tree, leaf_LN))
    want_GBN = np.einsum("gbl,ln->gbn", tree.under_GBL.astype(float), leaf_LN)
    np.testing.assert_allclose(mass_GON, want_GBN[:, :-1], rtol=1e-12)
    np.testing.assert_allclose(mass_G1N[:, 0], want_GBN.sum(axis=1), rtol=1e-12)
    assert (gates > 0) == bool(tree.levels)


@pytest.mark.parametrize("branching", [2, 3])
def test_levels_of_a_complete_tree_are_slices(branching: int) -> None:
    forks = [fork for level in Tree.complete(3, branching).levels for fork in level]
    assert len(forks) == 3 * branching
    assert all(isinstance(nodes, slice) for fork in forks for nodes in (fork.gates, fork.children, fork.beside))
