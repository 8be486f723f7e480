"""Checks of padding, for layers that take a mask."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from turnout.verify.cases import distance, draw, furthest, gradients, layers
from turnout.verify.check import Measured, check
from turnout.verify.subject import Layer, Subject

BATCH_MATTERS = "a text's result depends on how long its neighbours in the batch are"


def _padded(subject: Subject) -> Iterator[tuple[Layer, Tensor, Tensor, str]]:
    """Layer, input, mask, words: a half, then nine tenths, of the places are padding."""
    for layer, words in layers(subject):
        for num_tokens, share in ((4, 0.5), (31, 0.5), (40, 0.9)):
            x = draw(layer, num_tokens)
            mask = torch.rand((1, num_tokens), generator=torch.Generator().manual_seed(4)) >= share
            mask[:, 0] = True
            yield layer, x, mask, f"T={num_tokens} padding={share:.0%} {words}"


@check("P1", "padding changes no real token's output", meaning=BATCH_MATTERS)
def _outputs(subject: Subject) -> Iterable[Measured]:
    for layer, x, mask, words in _padded(subject):
        with torch.no_grad():
            got, want = layer.forward(x, mask)[mask], layer.forward(x[mask].unsqueeze(0))[0]
        yield Measured(error=distance(got, want), tolerance=0, case=words)


@check("P2", "padding changes no gradient", meaning=BATCH_MATTERS)
def _gradients(subject: Subject) -> Iterable[Measured]:
    for layer, x, mask, words in _padded(subject):
        x = x.requires_grad_()
        y = layer.forward(x, mask)
        got = gradients(layer, x, y[mask])
        want = gradients(layer, x, layer.forward(x[mask].unsqueeze(0))[0])
        error, name = furthest(got, want)
        yield Measured(error=error, tolerance=0, case=f"{name}: {words}")


@check("P3", "NaN in padding does no harm", meaning="what stands in unused memory reaches the loss")
def _nan(subject: Subject) -> Iterable[Measured]:
    for layer, x, mask, words in _padded(subject):
        with torch.no_grad():
            want = layer.forward(x, mask)[mask]
            got = layer.forward(x.masked_fill(~mask.unsqueeze(2), float("nan")), mask)[mask]
        yield Measured(error=distance(got, want), tolerance=0, case=words)


@check("P4", "padding is not counted as load", meaning="balance is measured, and learned, on padding")
def _counts(subject: Subject) -> Iterable[Measured]:
    for layer, x, mask, words in _padded(subject):
        got, want = layer.counts(x, mask), layer.counts(x[mask].unsqueeze(0))
        yield Measured(error=float((got - want).abs().sum()), tolerance=0, case=words)


@check("P5", "a batch of padding alone gives finite output", meaning="an empty rank or request ends in NaN")
def _only_padding(subject: Subject) -> Iterable[Measured]:
    for layer, words in layers(subject):
        x = draw(layer, 6)
        y = layer.forward(x, torch.zeros(1, 6, dtype=torch.bool))
        yield Measured(error=0.0 if y.isfinite().all() else float("inf"), tolerance=0, case=f"T=6 {words}")
