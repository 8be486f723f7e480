"""Soft MoE: experts work on mixtures of a sequence's tokens, so nothing is chosen, dropped or balanced."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from turnout.contracts import ExpertBackend
from turnout.errors import ConfigError, ShapeError
from turnout.experts import FFNExperts, choose_backend
from turnout.tensors import Padded, Ragged, Rows


@dataclass(frozen=True, kw_only=True)
class SoftMoEOutput:
    """The layer's result. There is no assignment: every token is in every slot, in some part."""

    y: Float[Tensor, "*batch D"]
    dispatch_BSEC: Tensor  # part of each token in each slot; over a sequence's tokens they sum to 1
    combine_BSEC: Tensor  # part of each slot in each token's output; over the slots they sum to 1, and 0 for padding


class SoftMoE(nn.Module):
    """Each of E experts has C slots; a slot is a weighted mean of its sequence's tokens, an output one of all slots.

    Every token sees every other of its sequence: not for decoders. Experts see E * C rows a sequence, however long;
    the paper takes about as many slots as tokens. The logits and the two mixtures cost 2 * S * E * C * D FLOPs a
    sequence each, and three times that in training.
    Source: Puigcerver et al. 2023, arXiv:2308.00951, section 2.1; normalisation: section 2.3, eq. 4.
    """

    causal: ClassVar[bool] = False

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        *,
        slots: int = 1,
        normalize: bool = True,
        expert: str = "swiglu",
        bias: bool = False,
        backend: str = "auto",
        init_std: float = 0.02,
    ) -> None:
        """`slots` are those of one expert; with `normalize` logits are cosines times a learned scale.

        Raises: ConfigError naming the setting and the legal values.
        """
        super().__init__()
        for name, value in (("num_experts", num_experts), ("hidden", hidden), ("slots", slots)):
            if value < 1:
                raise ConfigError(f"soft_moe.{name}={value} must be at least 1")
        self.dim, self.slots, self.backend = dim, slots, backend
        self.slot_ECD = nn.Parameter(torch.empty(num_experts, slots, dim))
        self.scale = nn.Parameter(torch.empty(())) if normalize else None
        self.experts = FFNExperts(dim, hidden, num_experts, kind=expert, bias=bias, init_std=init_std)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The experts reset themselves."""
        nn.init.normal_(self.slot_ECD, std=self.dim**-0.5)
        if self.scale is not None:
            nn.init.ones_(self.scale)

    def forward(self, x: Float[Tensor, "*batch D"], *, mask: Bool[Tensor, "*batch"] | None = None) -> SoftMoEOutput:
        """Shapes: x (..., S, D), each S tokens a sequence of their own; mask (..., S), False = padding.

        Padding is in no slot, and its output is zero.
        Raises: ShapeError if they do not fit.
        """
        self._check(x, mask)
        x_BSD = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
        mask_BS = torch.ones_like(x_BSD[..., 0], dtype=torch.bool) if mask is None else mask.reshape(x_BSD.shape[:2])
        # padding may hold NaN, which no weight of zero would stop
        x_BSD = x_BSD.masked_fill(~mask_BS.unsqueeze(2), 0)
        with torch.autocast(x.device.type, enabled=False):
            wide_BSD = x_BSD.to(torch.promote_types(x.dtype, torch.float32))
            dispatch_BSEC, combine_BSEC = slot_weights(self._logits(wide_BSD), mask_BS)
            slot_BECD = torch.einsum("bsec,bsd->becd", dispatch_BSEC, wide_BSD)
        y_BECD = self._run_experts(slot_BECD.to(x.dtype))
        with torch.autocast(x.device.type, enabled=False):
            y_BSD = torch.einsum("bsec,becd->bsd", combine_BSEC, y_BECD.to(wide_BSD.dtype))
        return SoftMoEOutput(y=y_BSD.to(x.dtype).view(x.shape), dispatch_BSEC=dispatch_BSEC, combine_BSEC=combine_BSEC)

    def _logits(self, wide_BSD: Tensor) -> Tensor:
        slot_ECD = self.slot_ECD.to(wide_BSD.dtype)
        if self.scale is not None:
            wide_BSD = F.normalize(wide_BSD, dim=2)
            slot_ECD = self.scale.to(wide_BSD.dtype) * F.normalize(slot_ECD, dim=2)
        return torch.einsum("bsd,ecd->bsec", wide_BSD, slot_ECD)

    def _run_experts(self, slot_BECD: Tensor) -> Tensor:
        """The rows of an expert are its slots of all sequences."""
        batch, num_experts, slots, dim = slot_BECD.shape
        backend = choose_backend(self.experts, self.backend, dtype=slot_BECD.dtype, device=slot_BECD.device)
        x_LCD = slot_BECD.transpose(0, 1).reshape(num_experts, batch * slots, dim)
        y_LCD = _run(backend, self.experts, x_LCD)
        return y_LCD.view(num_experts, batch, slots, dim).transpose(0, 1)

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        if x.ndim < 2 or x.shape[-1] != self.dim:
            raise ShapeError(f"x has shape {tuple(x.shape)}; the layer needs (..., sequence, dim={self.dim})")
        if mask is not None and (mask.shape != x.shape[:-1] or mask.dtype != torch.bool):
            raise ShapeError(
                f"mask has shape {tuple(mask.shape)} and {mask.dtype}; needs {tuple(x.shape[:-1])} torch.bool"
            )


def slot_weights(logits_BSEC: Tensor, mask_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Dispatch weights, a softmax over a sequence's tokens; and combine weights, one over all slots; 0 for padding.

    A sequence of nothing but padding has only zeros.
    Shapes: logits_BSEC (B, S, E, C); mask_BS (B, S) bool; returns two of (B, S, E, C).
    """
    padding_BS11 = ~mask_BS[:, :, None, None]
    # not -inf: a softmax over nothing else would be NaN, in its gradient too
    lowest = torch.finfo(logits_BSEC.dtype).min
    dispatch_BSEC = logits_BSEC.masked_fill(padding_BS11, lowest).softmax(dim=1)
    combine_BSEC = logits_BSEC.flatten(2).softmax(dim=2).view_as(logits_BSEC)
    return dispatch_BSEC.masked_fill(padding_BS11, 0), combine_BSEC.masked_fill(padding_BS11, 0)


def _run(backend: ExpertBackend, experts: FFNExperts, x_LCD: Tensor) -> Tensor:
    """Equally many rows for each expert, in the layout the backend takes."""
    num_experts, num_rows, dim = x_LCD.shape
    counts_L = torch.full((num_experts,), num_rows, dtype=torch.int64, device=x_LCD.device)
    rows: Rows = Padded(x_LCD=x_LCD, counts_L=counts_L)
    if backend.layout == "ragged":
        rows = Ragged(x_MD=x_LCD.reshape(num_experts * num_rows, dim), counts_L=counts_L)
    done = backend.run(experts, rows)
    return done.x_MD.view_as(x_LCD) if isinstance(done, Ragged) else done.x_LCD
