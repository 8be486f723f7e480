"""From logits to the next token: temperature, top-k, top-p, and a draw."""

import torch
from torch import Tensor

from turnout.errors import NonFiniteError


def probabilities(logits_V: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Probability of each token: softmax(logits / temperature), cut to the top_k best, then to the top_p nucleus.

    top_k: tokens that stay, 0 for all; top_p: the fewest best tokens that together have at least this probability
    stay. What stays is renormalised. Temperature 0 puts everything on the best token, the first of equals.
    Shapes: logits_V (V,); returns (V,) in at least float32, sum 1.
    Raises: NonFiniteError if there is no best logit to speak of.
    Source: top-p: Holtzman et al. 2019, arXiv:1904.09751, section 3.1.
    """
    logits_V = logits_V.to(torch.promote_types(logits_V.dtype, torch.float32))
    best = logits_V.max()
    if not torch.isfinite(best):
        raise NonFiniteError(f"the largest of the model's logits is {best.item()}: its weights or activations overflow")
    if temperature == 0:
        return torch.zeros_like(logits_V).index_fill_(0, logits_V.argmax(), 1.0)
    # the best logit at 0: a small temperature cannot overflow
    scaled_V = (logits_V - best) / temperature
    num_tokens = len(scaled_V)
    kept = min(top_k or num_tokens, num_tokens)
    if kept == num_tokens and top_p == 1:
        return scaled_V.softmax(dim=0)
    scaled_K, token_K = scaled_V.topk(kept)
    share_K = _nucleus(scaled_K.softmax(dim=0), top_p)
    return torch.zeros_like(scaled_V).scatter_(0, token_K, share_K)


def draw(share_V: Tensor, generator: torch.Generator) -> int:
    """A token, drawn with these probabilities."""
    return int(torch.multinomial(share_V, 1, generator=generator))


def _nucleus(share_K: Tensor, top_p: float) -> Tensor:
    """The fewest of these shares, best first, that reach top_p together; the rest are 0."""
    if top_p == 1:
        return share_K
    before_K = share_K.cumsum(dim=0) - share_K
    kept_K = share_K * (before_K < top_p)
    return kept_K / kept_K.sum()
