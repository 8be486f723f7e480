"""Checks of what a layer keeps between calls, and of running it the usual ways."""

from collections.abc import Iterable
from copy import deepcopy

import torch
from torch import Tensor, nn

from turnout.verify.cases import distance, draw, layers
from turnout.verify.check import Measured, check
from turnout.verify.subject import Layer, Subject


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in [*module.named_parameters(), *module.named_buffers()]}


def _changes(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    same = before.keys() == after.keys()
    return [n for n in before if not torch.equal(before[n], after[n])] if same else ["its set of tensors"]


def _keeps_state(subject: Subject, *, training: bool) -> Iterable[Measured]:
    for layer, words in layers(subject):
        layer.module.train(training)
        before = _state(layer.module)
        layer.forward(draw(layer, 13))
        changed = _changes(before, _state(layer.module))
        yield Measured(error=float(len(changed)), tolerance=0, case=f"{' '.join(changed)} {words}".strip())


@check("S1", "a forward pass in evaluation changes no state", meaning="serving changes the model")
def _evaluation(subject: Subject) -> Iterable[Measured]:
    yield from _keeps_state(subject, training=False)


@check("S2", "a forward pass in training changes no state", meaning="recomputation counts every token twice")
def _training(subject: Subject) -> Iterable[Measured]:
    yield from _keeps_state(subject, training=True)


@check("S3", "two layers in one process do not mix", meaning="teacher and student, or two runs, disturb each other")
def _two(subject: Subject) -> Iterable[Measured]:
    for (layer, words), (other, _) in zip(layers(subject), layers(subject), strict=True):
        x = draw(layer, 10).requires_grad_()
        with torch.no_grad():
            for parameter in other.module.parameters():
                parameter.mul_(-0.5)
        (want,) = torch.autograd.grad(layer.forward(x).sum(), x)
        y = layer.forward(x)
        other.forward(draw(other, 21, seed=9))
        (got,) = torch.autograd.grad(y.sum(), x)
        yield Measured(error=distance(got, want), tolerance=0, case=f"T=10 {words}")


@check("S4", "weights saved and loaded give the same output", meaning="a checkpoint loses part of the layer")
def _round_trip(subject: Subject) -> Iterable[Measured]:
    for (layer, words), (other, _) in zip(layers(subject), layers(subject), strict=True):
        x = draw(layer, 10)
        with torch.no_grad():
            for parameter in other.module.parameters():
                parameter.zero_()
            other.module.load_state_dict(layer.module.state_dict())
            yield Measured(error=distance(other.forward(x), layer.forward(x)), tolerance=0, case=f"T=10 {words}")


@check("S5", "the same seed gives the same run, bit for bit", meaning="no result can be repeated")
def _repeatable(subject: Subject) -> Iterable[Measured]:
    for (layer, words), (again, _) in zip(layers(subject), layers(subject), strict=True):
        _train(layer)
        _train(again)
        changed = _changes(_state(layer.module), _state(again.module))
        yield Measured(error=float(len(changed)), tolerance=0, case=f"20 steps, {' '.join(changed)} {words}")


def _train(layer: Layer) -> None:
    layer.module.train()
    torch.manual_seed(11)
    optimizer = torch.optim.SGD(layer.module.parameters(), lr=0.05)
    for step in range(20):
        optimizer.zero_grad()
        layer.forward(draw(layer, 15, seed=step)).square().mean().backward()
        optimizer.step()


@check("S6", "learns: twenty steps lower a simple loss", meaning="the layer does not train at all")
def _learns(subject: Subject) -> Iterable[Measured]:
    for layer, words in layers(subject):
        x, target = draw(layer, 32), draw(layer, 32, seed=12)
        optimizer = torch.optim.Adam(layer.module.parameters(), lr=0.01)
        values = []
        for _ in range(21):
            loss = (layer.forward(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        yield Measured(error=values[-1] / values[0], tolerance=0.99, case=f"last over first loss; T=32 {words}")


@check("S7", "autocast to bfloat16 stays near float32", meaning="mixed precision breaks the layer")
def _autocast(subject: Subject) -> Iterable[Measured]:
    for layer, words in layers(subject, dtype=torch.float32):
        x = draw(layer, 24, dtype=torch.float32)
        with torch.no_grad():
            want = layer.forward(x)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                got = layer.forward(x)
        # a token whose two best experts tie may go to the other one
        error_T = (got.float() - want).abs().amax(dim=2) / want.abs().max().clamp(min=1)
        yield Measured(error=float(error_T.median()), tolerance=0.02, case=f"median over tokens; T=24 {words}")


@check("S8", "inference mode equals evaluation", meaning="a served model answers otherwise than it was evaluated")
def _inference(subject: Subject) -> Iterable[Measured]:
    for layer, words in layers(subject):
        x = draw(layer, 17)
        want = layer.forward(x)
        with torch.inference_mode():
            got = layer.forward(x)
        yield Measured(error=distance(got.clone(), want), tolerance=0, case=f"T=17 {words}")


@check("S9", "a copy trains without touching the original", meaning="averaged or rolled-back weights share memory")
def _copy(subject: Subject) -> Iterable[Measured]:
    for layer, words in layers(subject):
        before = _state(layer.module)
        _train(deepcopy(layer))
        changed = _changes(before, _state(layer.module))
        yield Measured(error=float(len(changed)), tolerance=0, case=f"{' '.join(changed)} {words}".strip())
