"""The usual way without a capacity, in plain torch: rows sorted by expert, products, rows added to their tokens."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from turnout.bench.routers import Shape
from turnout.experts.activations import Activation


class Sorted(nn.Module):
    """A layer of (T, D): one grouped product for each weight, or one product for each expert.

    Adding rows by `index_add` is faster here than sorting them back and summing each token's.
    """

    def __init__(self, shape: Shape, router_ED: Tensor, *, grouped: bool, choices_TK: Tensor | None = None) -> None:
        super().__init__()
        self.k, self.grouped, self.choices_TK = shape.k, grouped, choices_TK
        self.gated = Activation.TABLE[shape.expert].gated
        width = shape.hidden * (2 if self.gated else 1)
        self.router_ED = nn.Parameter(router_ED.clone())
        self.up_EGD = nn.Parameter(0.02 * torch.randn(shape.experts, width, shape.dim))
        self.down_EDF = nn.Parameter(0.02 * torch.randn(shape.experts, shape.dim, shape.hidden))

    def forward(self, x_TD: Tensor) -> Tensor:
        weight_TK, choices_TK = self._route(x_TD)
        expert_N, order_N = choices_TK.flatten().sort(stable=True)
        token_N = order_N // self.k
        counts_E = torch.bincount(expert_N, minlength=len(self.router_ED))
        y_ND = self._experts(x_TD.index_select(0, token_N), counts_E)
        weighted_ND = y_ND * weight_TK.flatten().index_select(0, order_N).unsqueeze(1)
        return torch.zeros_like(x_TD).index_add(0, token_N, weighted_ND.to(x_TD.dtype))

    def _route(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        if self.choices_TK is not None:
            return x_TD.new_full(self.choices_TK.shape, 1 / self.k), self.choices_TK
        weight_TK, choices_TK = F.linear(x_TD, self.router_ED).float().softmax(dim=1).topk(self.k, dim=1)
        if self.k > 1:
            weight_TK = weight_TK / weight_TK.sum(dim=1, keepdim=True)
        return weight_TK, choices_TK

    def _experts(self, x_ND: Tensor, counts_E: Tensor) -> Tensor:
        if self.grouped:
            end_E = counts_E.cumsum(0).to(torch.int32)
            h_NF = activated(F.grouped_mm(x_ND, self.up_EGD.transpose(1, 2), offs=end_E), gated=self.gated)
            return F.grouped_mm(h_NF, self.down_EDF.transpose(1, 2), offs=end_E)
        # unbound at once: indexing one expert would make a gradient as large as all for each
        each = zip(x_ND.split(counts_E.tolist()), self.up_EGD.unbind(), self.down_EDF.unbind(), strict=True)
        outputs = [activated(x_MD @ up_GD.t(), gated=self.gated) @ down_DF.t() for x_MD, up_GD, down_DF in each]
        return torch.cat(outputs)


def activated(up: Tensor, *, gated: bool) -> Tensor:
    """gelu, or silu of the first half of the columns times the other, by torch's own functions as others write it."""
    if not gated:
        return F.gelu(up)
    gate, up = up.chunk(2, dim=-1)
    return F.silu(gate) * up
