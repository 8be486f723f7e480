"""Products fused with the collectives at the ends of a tensor-parallel layer: each hides behind the other.

What ranks gather is multiplied as it arrives, their own rows first; what they scatter leaves as it is computed, their
own rows last. The layer's input is kept as a rank's own rows and gathered anew for the gradient of the weights, while
the gradient of the input is computed: memory as Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2.
Source: MindSpeed's communication over computation, as LocMoE+ uses it, arXiv:2406.00023; torch's async tensor parallel.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from turnout.comm.ledger import Phase
from turnout.tensors import first_order


class FusedProducts(ABC):
    """Products of rows that lie on ranks: `lengths` says how many each has, one rank's after another's."""

    @abstractmethod
    def gathered(
        self, x_ND: Tensor, matrices: Sequence[Tensor], lengths: tuple[int, ...], phase: Phase, *, keep: bool
    ) -> tuple[list[Tensor], Tensor | None]:
        """The rows of all ranks times each of these, and with `keep` those rows. Shapes: x_ND (own, D), (D, G)."""

    @abstractmethod
    def scattered(self, parts: Sequence[tuple[Tensor, Tensor]], lengths: tuple[int, ...], phase: Phase) -> Tensor:
        """Own rows of the sum over parts and ranks of h M. Shapes: h (rows of all, G), M (G, D); returns (own, D)."""

    @abstractmethod
    def gather(self, x_ND: Tensor, lengths: tuple[int, ...], phase: Phase) -> Callable[[], Tensor]:
        """Begin to gather the rows of all ranks; the call waits for them."""

    def into(self, x_ND: Tensor, weights: Sequence[Tensor], lengths: tuple[int, ...]) -> tuple[Tensor, ...]:
        """All ranks' rows times each W^T, differentiable. Shapes: x_ND (own, D); weights (G, D); each (all, G)."""
        return _Into.apply(_Call(products=self, lengths=lengths), x_ND, *weights)

    def out_of(self, h_NG: Tensor, weight_DG: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Own rows of the ranks' sum of h W^T, differentiable. Shapes: h_NG (all, G); returns (own, D)."""
        return _OutOf.apply(_Call(products=self, lengths=lengths), h_NG, weight_DG)


@dataclass(frozen=True, kw_only=True)
class _Call:
    products: FusedProducts
    lengths: tuple[int, ...]


class _Into(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, x_ND: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.save_for_backward(x_ND, *weights)
        matrices = [weight.t() for weight in weights]
        outs, _ = call.products.gathered(x_ND, matrices, call.lengths, "forward", keep=False)
        return tuple(outs)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        call: _Call = ctx.call
        x_ND, *weights = ctx.saved_tensors
        # begun before the products that it hides behind
        coming = call.products.gather(x_ND, call.lengths, "backward") if any(ctx.needs_input_grad[2:]) else None
        parts = list(zip(grads, weights, strict=True))
        x_grad = call.products.scattered(parts, call.lengths, "backward") if ctx.needs_input_grad[1] else None
        whole = None if coming is None else coming()
        weight_grads = [None if whole is None else grad.t() @ whole for grad in grads]
        return None, x_grad, *weight_grads


class _OutOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, h_NG: Tensor, weight_DG: Tensor) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(h_NG, weight_DG)
        return call.products.scattered([(h_NG, weight_DG.t())], call.lengths, "forward")

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        call: _Call = ctx.call
        h_NG, weight_DG = ctx.saved_tensors
        (h_grad,), grad_ND = call.products.gathered(
            grads[0], [weight_DG], call.lengths, "backward", keep=ctx.needs_input_grad[2]
        )
        return None, h_grad, None if grad_ND is None else grad_ND.t() @ h_NG
