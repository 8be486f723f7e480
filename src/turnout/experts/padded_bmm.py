"""All experts in one batched matmul over blocks padded to the fullest expert: static shapes, wasted rows."""

import torch
from torch import nn

from turnout.contracts import ExpertBackend, Refusal
from turnout.experts.weights import FFNExperts
from turnout.tensors import Padded, Rows


class PaddedBMM(ExpertBackend):
    """Two `torch.bmm` over (E, C, D); any dtype and device."""

    layout = "padded"

    def refusal(self, experts: nn.Module, *, dtype: torch.dtype, device: torch.device) -> Refusal | None:
        if not isinstance(experts, FFNExperts):
            return Refusal(reason="padded_bmm computes feed-forward experts; modules of your own need backend='loop'")
        return None

    def run(self, experts: nn.Module, rows: Rows) -> Rows:
        assert isinstance(rows, Padded)
        assert isinstance(experts, FFNExperts)
        dtype = rows.x_LCD.dtype
        up_LCG = torch.bmm(rows.x_LCD, experts.up_EDG.to(dtype))
        if experts.up_bias_EG is not None:
            up_LCG = up_LCG + experts.up_bias_EG.to(dtype).unsqueeze(1)
        y_LCD = torch.bmm(experts.activation(up_LCG), experts.down_EFD.to(dtype))
        if experts.added_bias_ED is not None:
            y_LCD = y_LCD + experts.added_bias_ED.to(dtype).unsqueeze(1)
        return Padded(x_LCD=y_LCD, counts_L=rows.counts_L)


ExpertBackend.TABLE.register("padded_bmm")(PaddedBMM())
