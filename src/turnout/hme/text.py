"""A fitted tree in words: what each gate asks, and what each expert says, in the units of the data."""

import numpy as np

from turnout.hme.checks import Scale
from turnout.hme.families import Poisson, Softmax
from turnout.hme.mixture import Mixture
from turnout.hme.tree import CLOSED, Floats, Tree

MOST_TERMS = 4  # inputs named in a formula, the strongest first


def tree_text(mixture: Mixture, scale: Scale, target_scale: Scale, inputs: list[str], targets: list[str]) -> str:
    """The tree, a line for each gate's branch and each expert's output, children indented below their branch."""
    return "\n".join(_lines(mixture, scale, target_scale, inputs, targets, 0 if mixture.tree.num_gates else ~0, 0))


def in_units(weight_P: Floats, scale: Scale) -> Floats:
    """Weights of standardized inputs as weights of the inputs themselves, the constant last."""
    slope_D = weight_P[:-1] / scale.deviation_D
    return np.append(slope_D, weight_P[-1] - slope_D @ scale.mean_D)


def placed(tree: Tree) -> tuple[dict[int, tuple[float, int]], int]:
    """Each node's place (gate, or ~leaf) and the depth: leaves side by side, gates above the middle of theirs."""
    place: dict[int, tuple[float, int]] = {}

    def put(node: int, level: int, leaves_before: int) -> int:
        if node < 0:
            place[node] = (float(leaves_before), level)
            return leaves_before + 1
        children = [int(child) for child in tree.child_GB[node] if child != CLOSED]
        for child in children:
            leaves_before = put(child, level + 1, leaves_before)
        place[node] = (sum(place[child][0] for child in children) / len(children), level)
        return leaves_before

    put(0 if tree.num_gates else ~0, 0, 0)
    return place, max(level for _, level in place.values())


def _lines(
    mixture: Mixture, scale: Scale, target_scale: Scale, inputs: list[str], targets: list[str], node: int, depth: int
) -> list[str]:
    margin = "|   " * depth
    if node < 0:
        return [f"{margin}|-- {line}" for line in _expert_lines(mixture, ~node, scale, target_scale, inputs, targets)]
    lines = []
    last = mixture.tree.branching - 1
    for branch, child in enumerate(mixture.tree.child_GB[node]):
        if child == CLOSED:
            continue
        asks = "otherwise (0)"
        if branch != last:
            asks = f"log odds {_formula(mixture.gate_GPO[node, :, branch], scale, inputs)}"
        lines.append(f"{margin}|-- gate {node}, branch {branch}: {asks}")
        lines += _lines(mixture, scale, target_scale, inputs, targets, int(child), depth + 1)
    return lines


def _expert_lines(
    mixture: Mixture, leaf: int, scale: Scale, target_scale: Scale, inputs: list[str], targets: list[str]
) -> list[str]:
    lines = []
    for output in range(mixture.family.outputs):
        weight_P = mixture.experts.weight_LPO[leaf, :, output] * target_scale.deviation_D[output]
        weight_P = np.append(weight_P[:-1], weight_P[-1] + target_scale.mean_D[output])
        lines.append(f"expert {leaf}: {_said(mixture, output, targets)} = {_formula(weight_P, scale, inputs)}")
    return lines


def _said(mixture: Mixture, output: int, targets: list[str]) -> str:
    """What a linear predictor of an expert is."""
    if isinstance(mixture.family, Softmax):
        return f"log odds of {targets[output]} to {targets[-1]}"
    return f"log of {targets[output]}" if isinstance(mixture.family, Poisson) else targets[output]


def _formula(weight_P: Floats, scale: Scale, inputs: list[str]) -> str:
    """The strongest terms by their effect over a deviation of their input."""
    own_P = in_units(weight_P, scale)
    strongest = np.argsort(-np.abs(weight_P[:-1]), kind="stable")[:MOST_TERMS]
    terms = "".join(f" {own_P[d]:+.3g} {inputs[d]}" for d in strongest if weight_P[d] != 0)
    more = sum(weight_P[:-1] != 0) - len(strongest)
    return f"{own_P[-1]:.3g}{terms}{f' (+ {more} more)' if more > 0 else ''}"
