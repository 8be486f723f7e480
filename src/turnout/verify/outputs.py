"""Checks of what a layer returns."""

from collections.abc import Iterable
from dataclasses import replace

import torch

from turnout.verify.cases import SIZES, cases, distance, draw, layers, loop
from turnout.verify.check import Measured, check
from turnout.verify.subject import Subject

LOSES_TOKENS = "tokens get another layer's answer than the formula says: results cannot be compared with anybody's"


def _equals_loop(subject: Subject, dtype: torch.dtype, tolerance: float) -> Iterable[Measured]:
    for layer, x, words in cases(subject, dtype=dtype):
        with torch.no_grad():
            y = layer.forward(x)
            gate_TE = layer.gates(x[0])
            layer.module.double()
            want = loop(layer, x[0].double(), gate_TE.double())
            layer.module.to(dtype)
        yield Measured(error=distance(y[0], want), tolerance=tolerance, case=words)


@check("O1", "equals the per-token loop in float64", meaning=LOSES_TOKENS)
def _loop64(subject: Subject) -> Iterable[Measured]:
    yield from _equals_loop(subject, torch.float64, 1e-12)


@check("O2", "equals the per-token loop in float32", meaning=LOSES_TOKENS)
def _loop32(subject: Subject) -> Iterable[Measured]:
    yield from _equals_loop(subject, torch.float32, 1e-5)


@check("O3", "equals the per-token loop in bfloat16, to 2 units in the last place", meaning=LOSES_TOKENS)
def _loop16(subject: Subject) -> Iterable[Measured]:
    yield from _equals_loop(subject, torch.bfloat16, 2 * 2**-8)


@check("O4", "takes a batch of no tokens", meaning="the last short batch, or a rank without tokens, ends the run")
def _no_tokens(subject: Subject) -> Iterable[Measured]:
    for layer, words in layers(subject):
        y = layer.forward(draw(layer, 0))
        yield Measured(error=0.0 if y.shape == (1, 0, layer.dim) else float("inf"), tolerance=0, case=f"T=0 {words}")


@check("O5", "equals the loop when all tokens are the same", meaning="one expert takes everything, the others nothing")
def _one_expert_takes_all(subject: Subject) -> Iterable[Measured]:
    for layer, words in layers(subject):
        x = draw(layer, 1).expand(1, 40, layer.dim)
        with torch.no_grad():
            yield Measured(error=distance(layer.forward(x)[0], loop(layer, x[0])), tolerance=1e-12, case=words)


@check("O6", "the order of tokens does not matter", meaning="a token's answer depends on where it stands in the batch")
def _order(subject: Subject) -> Iterable[Measured]:
    for layer, x, words in cases(subject):
        order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            got, want = layer.forward(x[:, order]), layer.forward(x)[:, order]
        yield Measured(error=distance(got, want), tolerance=1e-12, case=words)


@check("O7", "a token alone gets what it gets among others", meaning="served answers change with the other requests")
def _alone(subject: Subject) -> Iterable[Measured]:
    for layer, x, words in cases(subject):
        with torch.no_grad():
            want = layer.forward(x)
            got = torch.cat([layer.forward(x[:, t : t + 1]) for t in range(x.shape[1])], dim=1)
        yield Measured(error=distance(got, want), tolerance=1e-12, case=words)


@check("O8", "the shape of the batch does not matter", meaning="(B, S, D) and (1, B*S, D) train different models")
def _batch_shape(subject: Subject) -> Iterable[Measured]:
    for layer, words in layers(subject):
        x = draw(layer, 24)
        with torch.no_grad():
            got = layer.forward(x.view(4, 6, layer.dim)).reshape_as(x)
            yield Measured(error=distance(got, layer.forward(x)), tolerance=1e-12, case=f"4x6 {words}")


@check("O9", "takes input that is not contiguous", meaning="a transpose before the layer breaks it or its answer")
def _strided(subject: Subject) -> Iterable[Measured]:
    for layer, words in layers(subject):
        x = draw(layer, 18)
        strided = x.transpose(1, 2).contiguous().transpose(1, 2)
        with torch.no_grad():
            got, want = layer.forward(strided), layer.forward(x)
        yield Measured(error=distance(got, want), tolerance=1e-12, case=f"T=18 {words}")


@check("O10", "does not write to its input", meaning="the residual stream is changed behind the model's back")
def _input_untouched(subject: Subject) -> Iterable[Measured]:
    for layer, x, words in cases(subject):
        layer.module.train()
        before = x.clone()
        layer.forward(x)
        layer.module.eval()
        yield Measured(error=float((x - before).abs().max()), tolerance=0, case=words)


@check("O11", "one expert equals the dense network", meaning="a Mixture-of-Experts cannot be compared with its twin")
def _single(subject: Subject) -> Iterable[Measured]:
    layer = subject.layer(replace(SIZES[2], num_experts=1, k=1))
    for num_tokens in (1, 17):
        x = draw(layer, num_tokens)
        with torch.no_grad():
            gate_T1 = layer.gates(x[0])
            (expert,) = layer.experts()
            want = gate_T1 * expert(x[0]) + layer.shared(x[0])
            yield Measured(error=distance(layer.forward(x)[0], want), tolerance=1e-12, case=f"T={num_tokens} E=1")


@check("O12", "identical experts equal the dense network", meaning="upcycled models do not start from their source")
def _identical(subject: Subject) -> Iterable[Measured]:
    for layer, words in layers(subject):
        with torch.no_grad():
            for stacked in layer.expert_parameters().values():
                stacked.copy_(stacked[:1].expand_as(stacked).clone())
            x = draw(layer, 21)
            total_T1 = layer.gates(x[0]).sum(dim=1, keepdim=True)
            want = total_T1 * layer.experts()[0](x[0]) + layer.shared(x[0])
            yield Measured(error=distance(layer.forward(x)[0], want), tolerance=1e-12, case=f"T=21 {words}")


@check("O13", "float64 in, float64 out", meaning="what is meant to be exact is rounded to float32 somewhere inside")
def _dtype(subject: Subject) -> Iterable[Measured]:
    for layer, words in layers(subject):
        y = layer.forward(draw(layer, 3))
        yield Measured(error=0.0 if y.dtype == torch.float64 else float("inf"), tolerance=0, case=words)


@check("O14", "large input gives finite output", meaning="a spike in the residual stream becomes NaN in the layer")
def _large(subject: Subject) -> Iterable[Measured]:
    for layer, words in layers(subject, dtype=torch.float32):
        y = layer.forward(draw(layer, 9, dtype=torch.float32) * 1e4)
        yield Measured(error=0.0 if y.isfinite().all() else float("inf"), tolerance=0, case=f"T=9 x*1e4 {words}")
