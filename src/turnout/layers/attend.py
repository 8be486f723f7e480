"""softmax(q k^T) v under every mask the models need: causal, sliding window, padding, attention sinks."""

import torch
from torch import Tensor
from torch.nn import functional as F

from turnout.errors import RequestError

_SINK_WIDTH = 8  # columns added for the sink; fused kernels want head widths in multiples of 8


def attend(
    q_BHSX: Tensor,
    k_BHSX: Tensor,
    v_BHSX: Tensor,
    *,
    scale: float,
    past: int = 0,
    window: int = 0,
    mask_BS: Tensor | None = None,
    sink_H: Tensor | None = None,
) -> Tensor:
    """Causal attention of the queries, which are the last S of the past + S tokens of the keys.

    window: keys a query sees, its own included, 0 for all; sink_H: logit per head that takes weight and gives nothing.
    Shapes: q_BHSX (B, H, S, X); k_BHSX and v_BHSX of past + S tokens, with a divisor of H heads, the values at most
        as wide as the keys; mask_BS (B, S), False = padding; returns (B, H, S, width of the values).
    Raises: RequestError for padding together with a past.
    """
    length, width = q_BHSX.shape[2], v_BHSX.shape[3]
    first = max(0, past + 1 - window) if window else 0
    k_BHSX, v_BHSX, past = k_BHSX[:, :, first:], v_BHSX[:, :, first:], past - first
    allowed = _allowed(length, past, window, mask_BS, q_BHSX.device)
    if sink_H is not None:
        q_BHSX, k_BHSX, v_BHSX = _with_sink(q_BHSX, k_BHSX, v_BHSX, sink_H / scale)
        if allowed is None:
            allowed = _visible(length, past, window, q_BHSX.device)
        allowed = F.pad(allowed, (0, 1), value=True)
    # the fused kernels take values as wide as keys
    v_BHSX = F.pad(v_BHSX, (0, q_BHSX.shape[3] - v_BHSX.shape[3])) if v_BHSX.shape[3] < q_BHSX.shape[3] else v_BHSX
    y_BHSX = F.scaled_dot_product_attention(
        q_BHSX,
        k_BHSX,
        v_BHSX,
        attn_mask=allowed,
        is_causal=allowed is None and length > 1,
        scale=scale,
        enable_gqa=q_BHSX.shape[1] != k_BHSX.shape[1],
    )
    return y_BHSX if y_BHSX.shape[3] == width else y_BHSX[..., :width]


def _with_sink(q_BHSX: Tensor, k_BHSX: Tensor, v_BHSX: Tensor, sink_H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One more key, whose value is zero: a new coordinate holds the sink in queries, 1 in that key, 0 in others."""
    batch, _, length, width = q_BHSX.shape
    column = sink_H.to(q_BHSX.dtype).view(1, -1, 1, 1).expand(batch, -1, length, 1)
    q_BHSX = F.pad(torch.cat([q_BHSX, column], dim=3), (0, _SINK_WIDTH - 1))
    sink_key = k_BHSX.new_zeros(*k_BHSX.shape[:2], 1, width + _SINK_WIDTH)
    sink_key[..., width] = 1
    k_BHSX = torch.cat([F.pad(k_BHSX, (0, _SINK_WIDTH)), sink_key], dim=2)
    return q_BHSX, k_BHSX, F.pad(v_BHSX, (0, 0, 0, 1))


def _allowed(length: int, past: int, window: int, mask_BS: Tensor | None, device: torch.device) -> Tensor | None:
    """Which keys each query may see, or None where plain causal attention says it all."""
    beyond_window = window and past + length > window
    if mask_BS is None and not beyond_window and (past == 0 or length == 1):
        return None
    visible_SS = _visible(length, past, window, device)
    if mask_BS is None:
        return visible_SS
    if past:
        raise RequestError("a padding mask together with a filled key-value cache is not supported; pad nothing")
    # a padding query may see itself: a row with no key at all would be NaN
    diagonal_SS = torch.eye(length, dtype=torch.bool, device=device)
    return (visible_SS & mask_BS[:, None, None, :]) | diagonal_SS


def _visible(length: int, past: int, window: int, device: torch.device) -> Tensor:
    """(S, past + S) bool: causal, and no further back than the window."""
    visible_SS = torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past)
    return visible_SS.triu(past + 1 - window) if window else visible_SS
