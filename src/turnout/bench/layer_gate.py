"""The gate of the case layer: what everybody gives at the very shape, dtype and threads, before anybody is timed.

Ours are compared with `loop` in float32 on the same weights, experts of 8 bits on their codes. transformers' experts
are compared with `loop` on their weights and on what their own router decided, since a router that computes in bfloat16
decides otherwise here and there.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from turnout.bench.layer_peers import OURS, THEIRS, Forward, batch, run_experts
from turnout.bench.routers import Shape
from turnout.bench.run import red_gate
from turnout.contracts import ExpertBackend
from turnout.experts import INT8_BITS, FFNExperts
from turnout.layers import MoE

Answers = dict[str, Tensor]  # the output, in training every gradient too
OUTPUT = "the output"
# of the largest value; what tests/contracts allows
TOLERANCE = 1e-5
# bfloat16 keeps 8 bits: one step of it at the largest output, two for gradients
HALF_TOLERANCE, HALF_GRADIENT_TOLERANCE = 2**-7, 2**-6
# theirs add the rows of a token's experts in it, one after another: up to 0.011 was seen with 8
HALF_TOLERANCE_OF_THEIRS = 2**-5
# of what rounds activations: to bfloat16 or 14 bits, and to 7 bits
INT8_TOLERANCE = {"int8": 2**-7, "int8-a8": 2**-5}


class Gate:
    """Of the layers of one shape, dtype and mode, which have the same weights; what `loop` gives is computed once."""

    def __init__(self, shape: Shape, dtype: torch.dtype, *, train: bool) -> None:
        self.shape, self.dtype, self.train = shape, dtype, train
        self._of_loop: dict[bool, Answers] = {}

    def check(self, name: str, layer: Forward) -> None:
        """Run a layer that has experts once; leaves no gradient behind.

        Raises: TurnoutError naming the layer, and what of its output and gradients is furthest off.
        """
        if not name.startswith((OURS, THEIRS)):
            return
        assert isinstance(layer, nn.Module)
        precision = name.removeprefix(OURS)
        if name.startswith(THEIRS):
            got, want = _of_both(layer, self.shape, self.dtype, train=self.train)
        else:
            got = _answers(layer, *batch(self.shape, self.dtype), train=self.train)
            want = self._own(layer, quantized=precision in INT8_BITS)
        half = HALF_TOLERANCE_OF_THEIRS if name.startswith(THEIRS) and self.dtype == torch.bfloat16 else None
        words = _difference(got, want, self.dtype, INT8_TOLERANCE.get(precision, half))
        if words:
            where = f"{self.shape}, {'train' if self.train else 'forward'}, {self.dtype}"
            threads = torch.get_num_threads()
            raise red_gate(f"{name} at {where}, {threads} threads: {words}")

    def _own(self, layer: nn.Module, *, quantized: bool) -> Answers:
        if quantized not in self._of_loop:
            x_TD, y_grad_TD = batch(self.shape, self.dtype)
            with _by_loop(layer):
                self._of_loop[quantized] = _answers(layer, x_TD.float(), y_grad_TD.float(), train=self.train)
        return self._of_loop[quantized]


@contextmanager
def _by_loop(layer: Any) -> Iterator[None]:
    """The same layer, whose experts `loop` computes."""
    if isinstance(moe := getattr(layer, "layer", None), MoE):
        holder, name, loop = moe, "config", replace(moe.config, backend="loop")
    else:
        holder, name, loop = layer, "backend", ExpertBackend.TABLE["loop"]
    own = getattr(holder, name)
    setattr(holder, name, loop)
    try:
        yield
    finally:
        setattr(holder, name, own)


def _difference(got: Answers, want: Answers, dtype: torch.dtype, legal: float | None) -> str:
    """What is furthest beyond its bound, in words; nothing if nothing is."""
    worst, words = 1.0, ""
    for part, wanted in want.items():
        if part not in got:
            return f"{part} is missing"
        most = legal or _tolerance(part, dtype)
        off = float((got[part].float() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))
        beyond = math.inf if math.isnan(off) else off / most
        if beyond > worst:
            worst, words = beyond, f"{part} is off loop's by {off:.1e} of its largest value, legal {most:.1e}"
    return words


def _tolerance(part: str, dtype: torch.dtype) -> float:
    if dtype == torch.float32:
        return TOLERANCE
    return HALF_TOLERANCE if part == OUTPUT else HALF_GRADIENT_TOLERANCE


def _answers(layer: nn.Module, x_TD: Tensor, y_grad_TD: Tensor, *, train: bool) -> Answers:
    with torch.set_grad_enabled(train):
        y_TD = layer(x_TD.requires_grad_(train))
    if not train:
        return {OUTPUT: y_TD}
    y_TD.backward(y_grad_TD)
    found = {OUTPUT: y_TD.detach()} | _gradients({"tokens": x_TD, **dict(layer.named_parameters())})
    layer.zero_grad()
    return found


def _gradients(tensors: dict[str, Tensor]) -> Answers:
    """Of those that have one: choices and weights that are given have none."""
    return {_gradient(name): each.grad for name, each in tensors.items() if each.grad is not None}


def _gradient(name: str) -> str:
    return f"the gradient of {name}"


def _of_both(layer: nn.Module, shape: Shape, dtype: torch.dtype, *, train: bool) -> tuple[Answers, Answers]:
    """Of transformers' block, and of `loop` in float32 with its weights on what its experts were given."""
    bank: Any = layer.get_submodule("block.experts")
    given: list[Tensor] = []

    def remember(_: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        # tensors of their own: into their gradients comes what experts send back, and nothing of a router
        given.extend(tensor.view_as(tensor) for tensor in args)
        for tensor in given:
            if tensor.requires_grad:
                tensor.retain_grad()
        return tuple(given)

    x_TD, y_grad_TD = batch(shape, dtype)
    hook = bank.register_forward_pre_hook(remember)
    theirs = _answers(layer, x_TD, y_grad_TD, train=train)
    hook.remove()
    rows_TD, choices_TK, weight_TK = given
    ups = "gate_up_proj" if hasattr(bank, "gate_up_proj") else "up_proj"
    rows, weights = (tensor.detach().float().requires_grad_(tensor.requires_grad) for tensor in (rows_TD, weight_TK))
    experts = FFNExperts(shape.dim, shape.hidden, shape.experts, kind=shape.expert)
    with torch.no_grad():
        experts.up_EDG.copy_(getattr(bank, ups).mT)
        experts.down_EFD.copy_(bank.down_proj.mT)
    with torch.set_grad_enabled(train):
        want_TD = run_experts(experts, ExpertBackend.TABLE["loop"], rows, choices_TK, weights)
    if not train:
        return theirs, {OUTPUT: want_TD}
    want_TD.backward(y_grad_TD.float())
    got = {OUTPUT: theirs[OUTPUT]} | _gradients({"tokens": rows_TD, "weights": weight_TK})
    for name in (ups, "down_proj"):
        got[_gradient(name)] = theirs[_gradient(f"block.experts.{name}")].mT
    own = {"tokens": rows, "weights": weights, ups: experts.up_EDG, "down_proj": experts.down_EFD}
    return got, {OUTPUT: want_TD.detach()} | _gradients(own)
