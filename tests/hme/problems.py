"""Random problems: any tree, any family, any number of rows."""

from dataclasses import replace

import numpy as np

from turnout.hme.families import Family, Poisson, Softmax
from turnout.hme.gaussian import Gaussian
from turnout.hme.mixture import Mixture, new_mixture
from turnout.hme.rows import Block, Rows
from turnout.hme.tree import Tree

NOISES = ("unit", "scalar", "diagonal", "full")


def random_tree(random: np.random.Generator) -> Tree:
    """Complete, or with a leaf split or taken away."""
    tree = Tree.complete(int(random.integers(0, 4)), int(random.integers(2, 4)) if random.random() < 0.4 else 2)
    leaf = int(random.integers(tree.num_leaves))
    change = random.integers(3)
    if change == 1 and tree.num_leaves > 1:
        return tree.without(leaf).tree
    return tree.split(leaf) if change == 2 else tree


def random_problem(seed: int, family: str = "any") -> tuple[Mixture, Rows]:
    random = np.random.default_rng(seed)
    num_rows, inputs = int(random.integers(20, 90)), int(random.integers(1, 5))
    name = family if family != "any" else ("gaussian", "softmax", "poisson")[seed % 3]
    x_NP = np.column_stack([random.normal(size=(num_rows, inputs)), np.ones(num_rows)])
    kind: Family
    if name == "gaussian":
        kind = Gaussian(targets=int(random.integers(1, 4)), noise=NOISES[random.integers(4)])
        y_NT = random.normal(size=(num_rows, kind.targets)) + np.abs(x_NP[:, :1]) * random.normal()
    elif name == "softmax":
        kind = Softmax(targets=int(random.integers(2, 5)))
        y_NT = np.eye(kind.targets)[random.integers(kind.targets, size=num_rows)]
    else:
        kind = Poisson()
        y_NT = random.poisson(np.exp(x_NP[:, :1].clip(-2, 2)), size=(num_rows, 1)).astype(float)
    rows = Rows(x_NP=x_NP, y_NT=y_NT, weight_N=random.uniform(0.2, 3, num_rows))
    return new_mixture(random_tree(random), kind, y_NT.T, rows.weight_N, inputs + 1, random), rows


def stirred(mixture: Mixture, seed: int) -> Mixture:
    """The same with experts that differ."""
    random = np.random.default_rng(seed)
    weight_LPO = mixture.experts.weight_LPO + 0.5 * random.normal(size=mixture.experts.weight_LPO.shape)
    spread_L = random.uniform(0.5, 2, mixture.tree.num_leaves)
    covariance_LOO = mixture.experts.covariance_LOO
    if not (isinstance(mixture.family, Gaussian) and mixture.family.noise == "unit"):
        covariance_LOO = covariance_LOO * spread_L[:, None, None]
    return replace(mixture, experts=replace(mixture.experts, weight_LPO=weight_LPO, covariance_LOO=covariance_LOO))


def as_block(rows: Rows) -> Block:
    return Block(z_ZN=np.hstack([rows.x_NP, rows.y_NT]).T, inputs=rows.x_NP.shape[1], weight_N=rows.weight_N)
