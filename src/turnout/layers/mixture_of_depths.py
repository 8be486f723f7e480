"""Mixture-of-Depths: a block computes only the tokens its router picks; the others pass it by."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from turnout.errors import ConfigError, ShapeError
from turnout.routers.pieces import LinearScore
from turnout.tensors import LossTerm

# a product such as 0.07 * 100 must not be lifted to the next integer by its last bits
LAST_BITS = 1 - 4 * sys.float_info.epsilon


@dataclass(frozen=True, kw_only=True)
class MixtureOfDepthsOutput:
    """The block's result, the predictor's loss, and which tokens went through."""

    y: Float[Tensor, "B S D"]
    losses: tuple[LossTerm, ...]
    chosen_BS: Bool[Tensor, "B S"]


class MixtureOfDepths(nn.Module):
    """y_t = x_t + r_t * f(x)_t for the tokens of a sequence with the greatest r_t = w . x_t; y_t = x_t for the others.

    f is the residual branch of `block`, that is block(x) - x; the block gets the chosen tokens alone, in their order.
    Whether a token is among the greatest depends on later ones, so a predictor learns to say it from the token alone:
    its cross-entropy is a term of the losses, and moves nothing but the predictor.
    Source: Raposo et al. 2024, arXiv:2404.02258, section 3.4 eq. 1, section 3.5; its predictor is a small MLP, here
        linear.
    """

    def __init__(
        self,
        block: Callable[..., Tensor],
        dim: int,
        *,
        capacity: float = 0.125,
        evaluation: str = "predictor",
        block_takes_positions: bool = False,
        predictor_coefficient: float = 0.01,
        init_std: float = 0.02,
    ) -> None:
        """capacity: share of a sequence's tokens that go through, rounded up.

        evaluation: who goes through in evaluation; predictor: those it gives more than a half, which is causal; top:
        as in training. block_takes_positions: the block is called as block(x_BCD, position_BC=..., mask_BC=...), where
        C is the most tokens chosen of a sequence and the mask is False on rows past a sequence's own, which are zero;
        else as block(x_BCD), and with padding it must be causal or work row by row, so as not to see those.
        Raises: ConfigError naming the setting and the legal values.
        """
        super().__init__()
        if not 0 < capacity <= 1:
            raise ConfigError(f"mixture_of_depths.capacity={capacity} must be above 0 and at most 1, a share of tokens")
        if evaluation not in ("predictor", "top"):
            raise ConfigError(f"mixture_of_depths.evaluation={evaluation!r} must be one of: predictor, top")
        if not predictor_coefficient >= 0:
            raise ConfigError(f"mixture_of_depths.predictor_coefficient={predictor_coefficient} must be at least 0")
        self.block = block
        self.dim, self.capacity, self.evaluation = dim, capacity, evaluation
        self.block_takes_positions, self.predictor_coefficient = block_takes_positions, predictor_coefficient
        self.score = LinearScore(dim, 1, bias=False, init_std=init_std)
        self.predictor = LinearScore(dim, 1, bias=True, init_std=init_std)

    def forward(self, x: Float[Tensor, "B S D"], *, mask: Bool[Tensor, "B S"] | None = None) -> MixtureOfDepthsOutput:
        """Shapes: x (B, S, D); mask (B, S), False = padding: it takes no capacity and passes by.

        Raises: ShapeError if they do not fit.
        """
        self._check(x, mask)
        mask_BS = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        with torch.autocast(x.device.type, enabled=False):
            wide_BSD = x.to(torch.promote_types(x.dtype, torch.float32)).masked_fill(~mask_BS.unsqueeze(2), 0)
            score_BS = self.score(wide_BSD).squeeze(2)
            guess_BS = self.predictor(wide_BSD.detach()).squeeze(2)
        top_BS = top_of_sequence(score_BS.detach(), mask_BS, self.capacity)
        if self.training or self.evaluation == "top":
            chosen_BS, width = top_BS, most_of(x.shape[1], self.capacity)
        else:
            chosen_BS = mask_BS & (guess_BS > 0)
            width = int(chosen_BS.sum(dim=1).max()) if chosen_BS.numel() else 0
        return MixtureOfDepthsOutput(
            y=self._through(x, score_BS, chosen_BS, width),
            losses=(self._predictor_term(guess_BS, top_BS, mask_BS),),
            chosen_BS=chosen_BS,
        )

    def _through(self, x_BSD: Tensor, score_BS: Tensor, chosen_BS: Tensor, width: int) -> Tensor:
        position_BC, mask_BC = chosen_first(chosen_BS, width)
        first_B1 = torch.arange(len(x_BSD), device=x_BSD.device).unsqueeze(1) * x_BSD.shape[1]
        row_M = (first_B1 + position_BC).flatten()
        x_TD = x_BSD.flatten(0, 1)
        padding_BC1 = ~mask_BC.unsqueeze(2)
        x_BCD = x_TD[row_M].view(*position_BC.shape, self.dim).masked_fill(padding_BC1, 0)
        if self.block_takes_positions:
            y_BCD = self.block(x_BCD, position_BC=position_BC, mask_BC=mask_BC)
        else:
            y_BCD = self.block(x_BCD)
        weight_BC1 = score_BS.flatten()[row_M].view(*position_BC.shape, 1)
        change_BCD = (weight_BC1 * (y_BCD - x_BCD)).masked_fill(padding_BC1, 0)
        return x_TD.index_add(0, row_M, change_BCD.flatten(0, 1).to(x_TD.dtype)).view_as(x_BSD)

    def _predictor_term(self, guess_BS: Tensor, top_BS: Tensor, mask_BS: Tensor) -> LossTerm:
        """Mean over real tokens of the cross-entropy of "is among the greatest"."""
        each_BS = F.binary_cross_entropy_with_logits(guess_BS, top_BS.to(guess_BS.dtype), reduction="none")
        value = each_BS.masked_fill(~mask_BS, 0).sum() / mask_BS.sum().clamp(min=1)
        return LossTerm(
            name="depth_predictor", value=value, coefficient=self.predictor_coefficient, scope="micro_batch"
        )

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        if x.ndim != 3 or x.shape[2] != self.dim:
            raise ShapeError(f"x has shape {tuple(x.shape)}; the wrapper needs (batch, sequence, dim={self.dim})")
        if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != torch.bool):
            raise ShapeError(
                f"mask has shape {tuple(mask.shape)} and {mask.dtype}; needs {tuple(x.shape[:2])} torch.bool"
            )


def most_of(num_tokens: int, capacity: float) -> int:
    """The share of that many tokens, rounded up."""
    return math.ceil(num_tokens * capacity * LAST_BITS)


def top_of_sequence(score_BS: Tensor, mask_BS: Tensor, capacity: float) -> Tensor:
    """Which tokens are among the best `capacity` of their sequence's real ones, ties broken by the earlier place.

    Shapes: score_BS (B, S); mask_BS (B, S) bool; returns (B, S) bool.
    """
    length = score_BS.shape[1]
    limit_B1 = (mask_BS.sum(dim=1, keepdim=True).double() * capacity * LAST_BITS).ceil()
    order_BS = score_BS.masked_fill(~mask_BS, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    within_BS = (torch.arange(length, device=score_BS.device) < limit_B1).expand_as(mask_BS)
    return torch.zeros_like(mask_BS).scatter(1, order_BS, within_BS)


def chosen_first(chosen_BS: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Positions of a sequence's chosen tokens in their order, then of others up to `width`; and which are chosen.

    Shapes: chosen_BS (B, S) bool, at most `width` true in a row; returns position_BC and mask_BC (B, width).
    """
    length = chosen_BS.shape[1]
    place_S = torch.arange(length, device=chosen_BS.device)
    key_BC = torch.where(chosen_BS, place_S, place_S + length).sort(dim=1).values[:, :width]
    mask_BC = key_BC < length
    return torch.where(mask_BC, key_BC, key_BC - length), mask_BC
