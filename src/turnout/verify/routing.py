"""Checks of the choice of experts."""

from collections.abc import Iterable
from copy import deepcopy

import torch

from turnout.verify.cases import cases, distance, draw, layers
from turnout.verify.check import Measured, check
from turnout.verify.subject import NotApplicable, Subject


@check("R1", "a bfloat16 model chooses as its weights would in float32", meaning="rounding in the router moves tokens")
def _precision(subject: Subject) -> Iterable[Measured]:
    for layer, x, words in cases(subject, dtype=torch.bfloat16):
        with torch.no_grad():
            got = layer.gates(x[0]) != 0
            layer.module.float()
            want = layer.gates(x[0].float()) != 0
            layer.module.bfloat16()
        moved = (got != want).any(dim=1).double().mean()
        yield Measured(error=float(moved), tolerance=0, case=f"share of tokens that moved; {words}")


@check("R2", "the same input is routed the same way twice", meaning="answers change from call to call")
def _repeats(subject: Subject) -> Iterable[Measured]:
    for layer, x, words in cases(subject):
        yield Measured(error=distance(layer.gates(x[0]), layer.gates(x[0])), tolerance=0, case=words)


@check("R3", "equal scores go to the lower index", meaning="ties are broken differently on each machine")
def _ties(subject: Subject) -> Iterable[Measured]:
    for layer, words in layers(subject):
        weights = [p for p in layer.router_parameters().values() if p.ndim == 2]
        if not weights:
            raise NotApplicable("no linear router to tie")
        with torch.no_grad():
            for weight in weights:
                weight.zero_()
            chosen_TE = layer.gates(draw(layer, 5)[0]) != 0
        num_chosen = chosen_TE.sum(dim=1)
        first_TE = torch.arange(chosen_TE.shape[1]).expand_as(chosen_TE) < num_chosen.unsqueeze(1)
        wrong = float((chosen_TE != first_TE).sum())
        yield Measured(error=wrong, tolerance=0, case=f"T=5 all scores equal {words}")


@check("R4", "extreme scores give finite weights", meaning="a confident router ends in NaN")
def _extreme(subject: Subject) -> Iterable[Measured]:
    for layer, words in layers(subject, dtype=torch.float32):
        for weight in layer.router_parameters().values():
            with torch.no_grad():
                weight.mul_(1e5)
        gate_TE = layer.gates(draw(layer, 9, dtype=torch.float32)[0])
        yield Measured(error=0.0 if gate_TE.isfinite().all() else float("inf"), tolerance=0, case=f"T=9 {words}")


@check(
    "R5", "training and evaluation choose the same experts", meaning="a model is served otherwise than it was trained"
)
def _modes(subject: Subject) -> Iterable[Measured]:
    for layer, x, words in cases(subject):
        with torch.no_grad():
            want = layer.gates(x[0]) != 0
            layer.module.train()
            got = layer.gates(x[0]) != 0
            layer.module.eval()
        moved = (got != want).any(dim=1).double().mean()
        yield Measured(error=float(moved), tolerance=0, case=f"share of tokens that moved; {words}")


@check("R6", "weights are not negative", meaning="an expert's answer is taken away instead of added")
def _signs(subject: Subject) -> Iterable[Measured]:
    for layer, x, words in cases(subject):
        yield Measured(error=float(layer.gates(x[0]).detach().min().clamp(max=0).abs()), tolerance=0, case=words)


@check("R7", "the load reported is the load there was", meaning="balance is steered by numbers that are not true")
def _load(subject: Subject) -> Iterable[Measured]:
    for layer, x, words in cases(subject):
        told_E, seen_E = layer.counts(x), (layer.gates(x[0]) != 0).sum(dim=0)
        # dropped choices are counted and not seen
        yield Measured(error=float((seen_E - told_E).clamp(min=0).sum()), tolerance=0, case=words)


@check("R8", "a copy routes like the original", meaning="averaged weights, or a served copy, are another model")
def _copy(subject: Subject) -> Iterable[Measured]:
    for layer, words in layers(subject):
        x = draw(layer, 12)
        twin = deepcopy(layer)
        with torch.no_grad():
            yield Measured(error=distance(twin.forward(x), layer.forward(x)), tolerance=0, case=f"T=12 {words}")
