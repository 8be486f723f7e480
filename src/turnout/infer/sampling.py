"""From logits to the next token: temperature, top-k, top-p, and a draw."""

import torch
from torch import Tensor

from turnout.errors import NonFiniteError


def probabilities(logits_V: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Probability of each token: softmax(logits / temperature), cut to the top_k best, then to the top_p nucleus.

    top_k: tokens that stay, 0 for all; top_p: the fewest best tokens that together have at least this probability
    stay. What stays is renormalised. Temperature 0, or one too small to divide by, puts everything on the best token,
    the first of equals.
    Shapes: logits_V (V,); returns (V,) in at least float32, sum 1.
    Raises: NonFiniteError if there is no best logit to speak of.
    Source: top-p: Holtzman et al. 2019, arXiv:1904.09751, section 3.1.
    """
    logits_V = logits_V.to(torch.promote_types(logits_V.dtype, torch.float32))
    best = logits_V.max()
    if not torch.isfinite(best):
        raise NonFiniteError(f"the largest of the model's logits is {best.item()}: its weights or activations overflow")
    least = torch.finfo(logits_V.dtype).tiny
    if temperature < least:
        return torch.zeros_like(logits_V).index_fill_(0, logits_V.argmax(), 1.0)
    # the best logit at 0: a small temperature cannot overflow
    share_V = ((logits_V - best) / temperature).softmax(dim=0)
    if 0 < top_k < len(share_V):
        share_V = _only(share_V, share_V.topk(top_k).indices)
    return share_V if top_p == 1 else _only(share_V, _nucleus(share_V, max(top_p, least)))


def draw(share_V: Tensor, generator: torch.Generator) -> int:
    """A token, drawn with these probabilities, never one of probability 0."""
    # by inverting the distribution: torch.multinomial draws a number for every token
    reached_V = share_V.cumsum(dim=0, dtype=torch.float64)
    point = torch.rand((), dtype=torch.float64, device=share_V.device, generator=generator) * reached_V[-1]
    return int(torch.searchsorted(reached_V, point, right=True))


def _nucleus(share_V: Tensor, top_p: float) -> Tensor:
    """The fewest tokens, best first, that have top_p together."""
    # the rest, each below this, have less than 1 - top_p together: sorting them would change nothing
    likely_K = (share_V >= (1 - top_p) / len(share_V)).nonzero().squeeze(1)
    share_K, order_K = share_V[likely_K].sort(descending=True)
    before_K = share_K.cumsum(dim=0) - share_K
    return likely_K[order_K[before_K < top_p]]


def _only(share_V: Tensor, token_K: Tensor) -> Tensor:
    """These tokens' shares, renormalised; 0 for all others."""
    share_K = share_V[token_K]
    return torch.zeros_like(share_V).scatter_(0, token_K, share_K / share_K.sum())
