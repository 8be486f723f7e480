"""A run whose experts move between ranks: what it prices rows and moves by."""

import torch

from turnout.balance import Machine
from turnout.clusters import load_cluster
from turnout.models import Decoder
from turnout.parallel import Parallel
from turnout.parallel.probe import probe
from turnout.parallel.rebalancer import Rebalancer, Rebalancing
from turnout.train.device import compute_dtype
from turnout.train.recipe import Recipe


def open_rebalancer(recipe: Recipe, model: Decoder, parallel: Parallel, device: torch.device) -> Rebalancer | None:
    """The rebalancer of a run; None where the recipe wants none, or no rank has experts of another.

    Every rank calls it.
    Raises: ConfigError if the experts of this layout cannot move, or the machine does not compute in this precision.
    """
    loop, group = recipe.loop, parallel.groups.experts
    if not loop.rebalance_every or group is None or parallel.strategy.ep == 1:
        return None
    dtype = compute_dtype(device, recipe)
    if loop.rebalance_on:
        precision = "bf16" if dtype == torch.bfloat16 else "fp32"
        machine = Machine.of(load_cluster(loop.rebalance_on), precision, nodes=group.mesh.nodes)
    else:
        found = probe(parallel.world, group, device)
        # all ranks were measured at once; processors of a host have its cards between them, accelerators each their own
        machine = Machine(
            flops_per_s=found.flops_per_s, intra=found.intra, inter=found.inter, shares_card=device.type == "cpu"
        )
    config = Rebalancing(
        every=loop.rebalance_every,
        spare=loop.rebalance_spare,
        element_bytes=dtype.itemsize,
        machine=machine,
        is_measured=not loop.rebalance_on,
    )
    return Rebalancer(model, parallel, config)
