"""Checks of the auxiliary loss: the most repeated bug of the field is its scale."""

from collections.abc import Iterable

import torch
from torch import Tensor

from turnout.verify.cases import distance, draw, layers
from turnout.verify.check import Measured, check
from turnout.verify.subject import Layer, NotApplicable, Subject

# a router's largest gradient over the loss: one that follows from rounding alone is below it, also in float32
LEAST_MOVE = 1e-5
SCALE = "the balance coefficient means something else at another batch size, number of ranks or share of padding"


@check("A1", "twice the same tokens, the same loss", meaning=SCALE)
def _intensive(subject: Subject) -> Iterable[Measured]:
    for layer, words in layers(subject):
        x = draw(layer, 14)
        for times in (2, 4):
            got, want = layer.auxiliary_loss(torch.cat([x] * times, dim=1)), layer.auxiliary_loss(x)
            yield Measured(error=distance(got, want), tolerance=1e-6, case=f"T=14 x {times} {words}")


@check("A2", "padding does not change the loss", meaning=SCALE)
def _padding(subject: Subject) -> Iterable[Measured]:
    for layer, words in layers(subject):
        x = draw(layer, 30)
        for real in (27, 15):
            mask = torch.arange(30).unsqueeze(0) < real
            got, want = layer.auxiliary_loss(x, mask), layer.auxiliary_loss(x[:, :real])
            yield Measured(error=distance(got, want), tolerance=1e-6, case=f"T=30 real={real} {words}")


@check("A3", "the loss moves the router and nothing else", meaning="balance bends the experts, or does nothing at all")
def _reach(subject: Subject) -> Iterable[Measured]:
    for layer, words in layers(subject):
        x = draw(layer, 25)
        if layer.num_experts < 3 or _takes_all(layer, x):
            continue
        value = layer.auxiliary_loss(x)
        leaves = {n: p for n, p in layer.module.named_parameters() if p.requires_grad}
        router = set(layer.router_parameters()) & set(leaves)
        if not router:
            raise NotApplicable("the router has no parameters to learn")
        if not value.requires_grad:
            yield Measured(error=float("inf"), tolerance=0, case=f"no gradient at all: {words}")
            continue
        found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
        moves = {name: float(gradient.abs().max()) for name, gradient in zip(leaves, found, strict=True)}
        strays = sorted(name for name, most in moves.items() if name not in router and most != 0)
        if not any(moves[name] > LEAST_MOVE * abs(value.item()) for name in router):
            strays += sorted(router)
        yield Measured(error=float(len(strays)), tolerance=0, case=f"{' '.join(strays)} {words}".strip())


def _takes_all(layer: Layer, x: Tensor) -> bool:
    """Whether every token goes to every expert, so that the load is even and a balance loss has nothing to move."""
    try:
        return bool((layer.gates(x[0]) != 0).all())
    except NotApplicable:
        return False


@check("A4", "another call in between does not change the loss", meaning="two models in one process share their losses")
def _not_stored(subject: Subject) -> Iterable[Measured]:
    for layer, words in layers(subject):
        x, other = draw(layer, 11), draw(layer, 29, seed=8)
        want = layer.auxiliary_loss(x)
        layer.forward(other)
        yield Measured(error=distance(layer.auxiliary_loss(x), want), tolerance=0, case=f"T=11 {words}")


@check("A5", "an even load has the lowest loss", meaning="the balance loss rewards imbalance")
def _direction(subject: Subject) -> Iterable[Measured]:
    """All tokens the same, so a few experts take everything, against random tokens."""
    for layer, words in layers(subject):
        if layer.num_experts < 3:
            continue
        even = layer.auxiliary_loss(draw(layer, 256))
        crowded = layer.auxiliary_loss(draw(layer, 1).expand(1, 256, layer.dim) * 3)
        yield Measured(error=float((even - crowded).detach().clamp(min=0)), tolerance=0, case=f"T=256 {words}")
