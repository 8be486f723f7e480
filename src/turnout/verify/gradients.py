"""Checks of what a layer gives back in the backward pass."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from turnout.verify.cases import cases, distance, draw, furthest, gradients, layers, loop
from turnout.verify.check import Measured, check
from turnout.verify.subject import Layer, NotApplicable, Subject

WRONG = "the model trains on something else than its loss"
# a router's largest gradient over the input's: one that weighs its choices by a constant is left with the rounding of
# its gate, up to 1e-6 in float32
LEAST_MOVE = 1e-5


@check("G1", "gradients equal those of the loop", meaning=WRONG)
def _loop(subject: Subject) -> Iterable[Measured]:
    for layer, x, words in cases(subject):
        x = x.requires_grad_()
        got = gradients(layer, x, layer.forward(x))
        want = gradients(layer, x, loop(layer, x[0]).unsqueeze(0))
        error, name = furthest(got, want)
        yield Measured(error=error, tolerance=1e-12, case=f"{name}: {words}")


@check("G2", "gradients equal finite differences", meaning=WRONG)
def _differences(subject: Subject) -> Iterable[Measured]:
    """Central differences along a random direction, small enough that no choice of expert changes.

    A gate in float32 needs steps that its rounding does not drown.
    """
    step, tolerance = (1e-3, 1e-2) if subject.rounding else (1e-6, 1e-6)
    for layer, words in layers(subject):
        x = draw(layer, 7).requires_grad_()
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=x.dtype)
        slope = (gradients(layer, x, layer.forward(x))["x"] * direction).sum()
        weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        with torch.no_grad():
            ahead, behind = ((layer.forward(x + sign * step * direction) * weight).sum() for sign in (1, -1))
        error = distance((ahead - behind) / (2 * step), slope)
        yield Measured(error=error, tolerance=tolerance, case=f"T=7 {words}")


@check("G3", "the main loss moves the router", meaning="routing is not learned from the task, only from balance")
def _router_moves(subject: Subject) -> Iterable[Measured]:
    for layer, words in _of_several_choices(subject):
        names = layer.router_parameters()
        x = draw(layer, 33).requires_grad_()
        found = gradients(layer, x, layer.forward(x))
        trainable = [n for n in names if n in found]
        if not trainable:
            raise NotApplicable("the router has no parameters to learn")
        least = LEAST_MOVE * found["x"].abs().max()
        still = [name for name in trainable if not found[name].abs().max() > least]
        yield Measured(error=float(len(still)), tolerance=0, case=f"{' '.join(still)} {words}".strip())


def _of_several_choices(subject: Subject) -> Iterator[tuple[Layer, str]]:
    """Without sizes of one choice, if others fit: a router that renormalises weighs one choice 1, whatever its score.

    Some refuse to be built so (ours do), the others would be alone to be tried.
    """
    try:
        yield from layers(subject, least_k=2)
    except NotApplicable:
        yield from layers(subject)


@check("G4", "an expert without tokens has a gradient of exactly zero", meaning="unused experts drift, or turn NaN")
def _unused(subject: Subject) -> Iterable[Measured]:
    for layer, words in layers(subject):
        x = draw(layer, 1).requires_grad_()
        used_E = layer.gates(x[0]).detach().abs().sum(dim=0) > 0
        found = gradients(layer, x, layer.forward(x))
        stray = [found[name][~used_E] for name in layer.expert_parameters()]
        worst = max((float(g.abs().nan_to_num(float("inf")).max()) for g in stray if g.numel()), default=0.0)
        yield Measured(error=worst, tolerance=0, case=f"T=1 {words}")


@check("G5", "takes an expanded gradient", meaning="y.sum().backward() fails or is wrong")
def _expanded(subject: Subject) -> Iterable[Measured]:
    for layer, words in layers(subject):
        x = draw(layer, 9).requires_grad_()
        (got,) = torch.autograd.grad(layer.forward(x).sum(), x)
        y = layer.forward(x)
        (want,) = torch.autograd.grad(y, x, torch.ones_like(y))
        yield Measured(error=distance(got, want), tolerance=0, case=f"T=9 {words}")


@check("G6", "no tokens, backward", meaning="the last short batch, or a rank without tokens, ends the run")
def _no_tokens(subject: Subject) -> Iterable[Measured]:
    for layer, words in layers(subject):
        x = draw(layer, 0).requires_grad_()
        found = gradients(layer, x, layer.forward(x))
        worst = max((float(g.abs().max()) for g in found.values() if g.numel()), default=0.0)
        yield Measured(error=worst if worst == worst else float("inf"), tolerance=0, case=f"T=0 {words}")


@check("G7", "recomputed activations give the same gradients", meaning="activation checkpointing changes the training")
def _recomputed(subject: Subject) -> Iterable[Measured]:
    for layer, words in layers(subject):
        layer.module.train()
        x = torch.cat([draw(layer, 8), draw(layer, 8)], dim=1).requires_grad_()  # every token twice: near ties
        torch.manual_seed(7)
        want = gradients(layer, x, layer.forward(x))
        torch.manual_seed(7)
        y = checkpoint(layer.forward, x, use_reentrant=False)
        got = gradients(layer, x, y)  # pyright: ignore[reportArgumentType]
        error, name = furthest(got, want)
        yield Measured(error=error, tolerance=0, case=f"{name}: {words}")


@check("G8", "frozen experts leave the input's gradient as it is", meaning="fine-tuning the router alone is wrong")
def _frozen(subject: Subject) -> Iterable[Measured]:
    for layer, words in layers(subject):
        x = draw(layer, 9).requires_grad_()
        want = gradients(layer, x, layer.forward(x))["x"]
        for parameter in layer.expert_parameters().values():
            parameter.requires_grad_(False)
        got = gradients(layer, x, layer.forward(x))["x"]
        yield Measured(error=distance(got, want), tolerance=1e-14, case=f"T=9 {words}")


@check(
    "G9", "two halves of a batch give the gradient of the whole", meaning="gradient accumulation changes the training"
)
def _halves(subject: Subject) -> Iterable[Measured]:
    for layer, words in layers(subject):
        x = draw(layer, 20)
        y_grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(6), dtype=x.dtype)
        first, second = slice(0, 10), slice(10, 20)
        halves = [a + b for a, b in zip(_of(layer, x, y_grad, first), _of(layer, x, y_grad, second), strict=True)]
        whole = _of(layer, x, y_grad, slice(0, 20))
        worst = max((distance(a, b) for a, b in zip(halves, whole, strict=True)), default=0.0)
        yield Measured(error=worst, tolerance=1e-12, case=f"T=20 {words}")


def _of(layer: Layer, x: Tensor, y_grad: Tensor, part: slice) -> list[Tensor]:
    """Gradients of the parameters from one part of the batch."""
    parameters = [p for p in layer.module.parameters() if p.requires_grad]
    y = layer.forward(x[:, part])
    found = torch.autograd.grad(y, parameters, y_grad[:, part], allow_unused=True, materialize_grads=True)
    return list(found)


@check("G10", "memory that was never written is never read", meaning="now and then a NaN that nobody can repeat")
def _poisoned(subject: Subject) -> Iterable[Measured]:
    """Fresh memory is filled with NaN by torch while the layer runs."""
    for layer, x, words in cases(subject):
        x = x.requires_grad_()
        want = gradients(layer, x, layer.forward(x)) | {"y": layer.forward(x)}
        was_on = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            got = gradients(layer, x, layer.forward(x)) | {"y": layer.forward(x)}
        finally:
            torch.use_deterministic_algorithms(was_on)
        error, name = furthest(got, want)
        yield Measured(error=error, tolerance=1e-12, case=f"{name}: {words}")
