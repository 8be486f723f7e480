"""What LocMoE's locality loss saves between nodes, on a simulated mesh of 4 nodes with 2 ranks each.

Usage: python -m benchmarks.locality [--steps 300] [--seeds 3] [--coefficients 0,0.01,0.1,1] > RESULT.json

Every node trains one model on text of its own, in one process: a step is one micro-batch of each node, whose locality
loss knows where it is, and the balance loss counts over all of them. `own`: node i has the i-th quarter of the text, in
the order of its files; `mixed`: every node has windows from anywhere, so that no node's tokens differ from another's.
Reported on windows that were kept aside: the share of rows that leave the node, and their bytes a token and layer,
there and back, in float32. Source of the loss: Li et al. 2024, arXiv:2401.13920.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from turnout.cache import default_cache
from turnout.data.prepare import Dataset, prepare
from turnout.data.sampler import Batch, count_windows, gather
from turnout.data.shards import TokenShard
from turnout.losses import LoadBalance, Locality
from turnout.models import Decoder
from turnout.models.decoder import DecoderLoss
from turnout.placement import Placement, Site
from turnout.routers import LocMoE
from turnout.tensors import Assignment
from turnout.topology import Mesh
from turnout.train.device import autocast_for
from turnout.train.optimizer import build_optimizer, lr_factor, set_lr
from turnout.train.recipe import Recipe
from turnout.train.recipes import load_recipe
from turnout.train.step import train_step

MESH = Mesh(nodes=4, local=2)
EXPERTS = 8  # one a rank
PLACEMENT = Placement.even(EXPERTS, MESH.size)
BATCH = 4  # sequences of a node in a step
KEPT = 64  # windows of each node's text that are kept aside
BALANCE = 0.01  # coefficient, as the paper's
Text = Literal["own", "mixed"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One training run."""

    text: Text
    coefficient: float
    seed: int
    steps: int
    val_loss: float  # nats a token on the windows kept aside
    leaving_share: float  # rows whose expert is on another node
    inter_bytes_per_token: float  # of one layer, there and back
    intra_bytes_per_token: float  # to the other rank of the node
    max_violation: float  # greatest load over the fair share, minus 1, all nodes together, mean over layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--coefficients", default="0,0.01,0.1,1")
    asked = parser.parse_args()
    recipe = _recipe()
    dataset = prepare(recipe.data, default_cache(), say=lambda line: print(line, file=sys.stderr))
    rows = []
    for text in ("own", "mixed"):
        for coefficient in map(float, asked.coefficients.split(",")):
            for seed in range(asked.seeds):
                row = run(recipe, dataset, text, coefficient, seed, asked.steps)
                print(row, file=sys.stderr, flush=True)
                rows.append(asdict(row))
    print(json.dumps({"command": " ".join(["python -m benchmarks.locality", *sys.argv[1:]]), "rows": rows}, indent=1))


def run(recipe: Recipe, dataset: Dataset, text: Text, coefficient: float, seed: int, steps: int) -> Row:
    """Train for `steps` and measure."""
    torch.manual_seed(seed)
    losses = LoadBalance(coefficient=BALANCE, scope="global"), Locality(coefficient=coefficient)
    assert recipe.model.moe is not None
    model = Decoder(replace(recipe.model, moe=replace(recipe.model.moe, losses=losses)))
    optimizer = build_optimizer(model, recipe.optimizer)
    windows = node_windows(count_windows(dataset.train, recipe.loop.seq_len), text, seed)
    for step in range(steps):
        set_lr(optimizer, lr_factor(step / steps, recipe.schedule))
        batches = [_batch(dataset.train, kept[KEPT:], step, recipe.loop.seq_len) for kept in windows]
        train_step(
            model,
            _NodeLoss(model),
            optimizer,
            batches,
            max_norm=recipe.optimizer.max_norm,
            autocast=autocast_for(torch.device("cpu"), torch.float32),
        )
    found = _measured(model, dataset.train, windows, recipe)
    return Row(text=text, coefficient=coefficient, seed=seed, steps=steps, **found)


class _NodeLoss:
    """The loss of each node in turn: its micro-batch is all that a call sees, and so is its place."""

    def __init__(self, model: Decoder) -> None:
        self.model, self.node = model, 0

    def __call__(self, *args: Tensor, **named: object) -> DecoderLoss:
        for _, layer in self.model.moe_blocks():
            layer.stand(Site(placement=PLACEMENT, node_size=MESH.local, rank=MESH.rank(self.node, 0)))
        self.node += 1
        return self.model.loss(*args, **named)  # pyright: ignore[reportArgumentType]


def node_windows(num_windows: int, text: Text, seed: int) -> list[NDArray[np.int64]]:
    """For each node the windows it has, in random order; the first KEPT are for measuring.

    The text of a node is the same at every seed, and so is what is kept aside of it.
    """
    order = np.arange(num_windows)
    if text == "mixed":
        order = np.random.RandomState(0).permutation(order)
    quarters = np.array_split(order, MESH.nodes)
    shuffled = [np.random.RandomState(0).permutation(quarter) for quarter in quarters]
    return [np.concatenate([w[:KEPT], np.random.RandomState(seed).permutation(w[KEPT:])]) for w in shuffled]


def _batch(shard: TokenShard, windows: NDArray[np.int64], step: int, seq_len: int) -> Batch:
    return gather(shard, windows[np.arange(step * BATCH, (step + 1) * BATCH) % len(windows)], seq_len)


@torch.inference_mode()
def _measured(
    model: Decoder, shard: TokenShard, windows: Sequence[NDArray[np.int64]], recipe: Recipe
) -> dict[str, float]:
    """Rows that leave, by node and layer, over all windows kept aside."""
    model.eval()
    layers = len(model.moe_blocks())
    loads, away, beside, tokens, loss = torch.zeros(layers, EXPERTS), 0, 0, 0, 0.0
    for node, kept in enumerate(windows):
        for step in range(KEPT // BATCH):
            batch = _batch(shard, kept[:KEPT], step, recipe.loop.seq_len)
            out = model(batch.tokens_BS)
            loss += float(model.loss(batch.tokens_BS, batch.targets_BS).main) * batch.targets_BS.numel()
            tokens += batch.tokens_BS.numel()
            for layer, assignment in enumerate(out.assignments):
                loads[layer] += assignment.counts_E
                left, stayed = _rows_away(assignment, node)
                away, beside = away + left, beside + stayed
    row_bytes = 2 * 4 * recipe.model.dim / (tokens * layers)
    return {
        "val_loss": loss / tokens,
        "leaving_share": away / float(loads.sum()),
        "inter_bytes_per_token": away * row_bytes,
        "intra_bytes_per_token": beside * row_bytes,
        "max_violation": float((loads.amax(dim=1) / loads.mean(dim=1) - 1).mean()),
    }


def _rows_away(assignment: Assignment, node: int) -> tuple[int, int]:
    """Rows for experts of other nodes, and for the other rank of this one; tokens stand in equal runs on its ranks."""
    expert_rank_N = assignment.expert_N * MESH.size // EXPERTS
    token_rank_N = node * MESH.local + assignment.token_N * MESH.local // assignment.num_tokens
    leaves_N = expert_rank_N // MESH.local != node
    return int(leaves_N.sum()), int((~leaves_N & (expert_rank_N != token_rank_N)).sum())


def _recipe() -> Recipe:
    """`tiny` with a few experts of LocMoE's, two a node."""
    recipe = load_recipe("tiny")
    assert recipe.model.moe is not None
    moe = replace(recipe.model.moe, num_experts=EXPERTS, hidden=256, router=LocMoE(floor="none"))
    return replace(recipe, model=replace(recipe.model, moe=moe))


if __name__ == "__main__":
    main()
