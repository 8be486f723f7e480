"""What routers learn from a run's text before its first step: the same on any layout, as initial weights are."""

import torch
from torch import nn

from turnout.contracts import Router
from turnout.data.prepare import Dataset
from turnout.models import Decoder


def show_text_to_routers(model: Decoder, dataset: Dataset) -> None:
    """Tell the router of every layer in turn how often the text has each token id.

    Every rank calls it, while all have the generator of one process. What the layers of other ranks draw is drawn here
    too, and forgotten: those after them then draw as they do in one process.
    Raises: ConfigError if the text does not fit a router.
    """
    found = (_router(model, layer) for layer in model.config.moe_layers())
    routers = [router for router in found if isinstance(router, Router)]
    if all(type(router).before_training is Router.before_training for router in routers):
        return
    token_counts_V = torch.from_numpy(dataset.train.token_counts())
    for router in routers:
        router.before_training(token_counts_V)


def _router(model: Decoder, layer: int) -> nn.Module:
    """The layer's; of one that another rank has one that draws as much."""
    here = dict(model.moe_blocks()).get(f"blocks.{layer}")
    if here is not None:
        return here.router
    moe = model.config.moe
    assert moe is not None
    with torch.random.fork_rng(devices=[]):
        return moe.router.build(model.config.dim, moe.num_experts)
