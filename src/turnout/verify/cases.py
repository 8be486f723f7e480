"""Inputs the checks share, the per-token loop they compare with, and how far two tensors are apart."""

from collections.abc import Iterator

import torch
from torch import Tensor

from turnout import reference
from turnout.verify.subject import Layer, NotApplicable, Sizes, Subject

TOKENS = (1, 2, 5, 16, 33)
SIZES = (
    Sizes(num_experts=2, k=1),
    Sizes(num_experts=3, k=2, dim=12, hidden=8),
    Sizes(),
    Sizes(num_experts=8, k=4, dim=24, hidden=20),
)


def layers(subject: Subject, *, dtype: torch.dtype = torch.float64, least_k: int = 1) -> Iterator[tuple[Layer, str]]:
    """The subject in every size it can take, small to large, with words for it; sizes of fewer choices are left out."""
    why, any_fits = "", False
    for seed, sizes in enumerate(SIZES):
        if sizes.k < least_k:
            continue
        try:
            layer = subject.layer(sizes, seed=seed, dtype=dtype)
        except NotApplicable as reason:
            why = str(reason)
            continue
        any_fits = True
        yield layer, f"E={layer.num_experts} k={sizes.k} D={layer.dim} seed={seed}"
    if not any_fits:
        raise NotApplicable(why)


def cases(subject: Subject, *, dtype: torch.dtype = torch.float64) -> Iterator[tuple[Layer, Tensor, str]]:
    """Layer, input (1, T, D) and words for the two, small to large."""
    for layer, words in layers(subject, dtype=dtype):
        for num_tokens in TOKENS:
            yield layer, draw(layer, num_tokens, dtype=dtype), f"T={num_tokens} {words}"


def draw(layer: Layer, num_tokens: int, *, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    """Random input (1, T, D), the same numbers for every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, num_tokens, layer.dim, generator=generator).to(torch.bfloat16).to(dtype)


def loop(layer: Layer, x_TD: Tensor, gate_TE: Tensor | None = None) -> Tensor:
    """The naive layer: each expert on every token, weighted."""
    gate_TE = layer.gates(x_TD) if gate_TE is None else gate_TE
    return reference.moe(x_TD, gate_TE, layer.experts()) + layer.shared(x_TD)


def distance(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest value wanted, or over 1; infinite for NaN or another shape."""
    if got.shape != want.shape:
        return float("inf")
    if got.numel() == 0:
        return 0.0
    got, want = got.detach().double(), want.detach().double()
    worst = float((got - want).abs().max() / want.abs().max().clamp(min=1.0))
    return worst if worst == worst else float("inf")


def gradients(layer: Layer, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Gradients of a fixed random projection of y in x and every parameter; zeros where there is no path."""
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(y.dtype)
    leaves = {"x": x, **{n: p for n, p in layer.module.named_parameters() if p.requires_grad}}
    found = torch.autograd.grad((y * weight).sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def furthest(got: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[float, str]:
    """The largest distance of two sets of gradients, and whose it is."""
    return max((distance(got[name], want[name]), name) for name in want)
