"""Experts with weights of 8 bits in floating point (e4m3), for inference on a GPU whose matrix units multiply them."""

import torch
from torch import Tensor

from turnout.errors import NonFiniteError
from turnout.experts.rounded import RoundedExperts
from turnout.experts.weights import FFNExperts
from turnout.kernels.fp8_codes import CODES, SIDE, decode_matrix, encode_matrix


class Float8FFNExperts(RoundedExperts):
    """E feed-forward networks in e4m3, a scale for each 128 x 128 weights; rows are rounded too, in blocks of 128.

    Codes lie as the matrix units read them, the inner size last, each half of a gated kind a matrix of its own. They
    and the scales are kept as whole numbers, bit for bit: no cast of the model changes or widens them.
    """

    up_codes: Tensor
    up_scales: Tensor
    down_codes: Tensor
    down_scales: Tensor

    def __init__(self, dim: int, hidden: int, num_experts: int, *, kind: str = "swiglu", bias: bool = False) -> None:
        """Room for the codes, to be loaded; `quantize_experts` makes them from weights."""
        super().__init__(dim, hidden, num_experts, kind=kind, bias=bias)
        inner, outer = -(-dim // SIDE), -(-hidden // SIDE)
        for name, codes, scales in (
            ("up", (self.parts, hidden, dim), (self.parts, outer, inner)),
            ("down", (dim, hidden), (inner, outer)),
        ):
            self.register_buffer(f"{name}_codes", torch.zeros(num_experts, *codes, dtype=torch.uint8))
            # the bits of float32
            self.register_buffer(f"{name}_scales", torch.zeros(num_experts, *scales, dtype=torch.int32))

    @classmethod
    @torch.no_grad()
    def of(cls, experts: FFNExperts) -> "Float8FFNExperts":
        """The experts with their weights rounded, on their device.

        Raises: NonFiniteError if a weight is NaN or infinite.
        """
        for name, weight in experts.named_parameters(recurse=False):
            if not weight.isfinite().all():
                raise NonFiniteError(f"experts.{name} has NaN or infinite values; no scale brings them into 8 bits")
        sizes = (experts.dim, experts.hidden, experts.num_experts)
        made = cls(*sizes, kind=experts.kind, bias=experts.up_bias_EG is not None).to(experts.up_EDG.device)
        for e in range(experts.num_experts):
            ups = experts.up_EDG[e].chunk(made.parts, dim=1)
            for part, up_DF in enumerate(ups):
                _put(made.up_codes[e, part], made.up_scales[e, part], up_DF)
            _put(made.down_codes[e], made.down_scales[e], experts.down_EFD[e])
        for own, bias in ((made.up_bias_EG, experts.up_bias_EG), (made.down_bias_ED, experts.added_bias_ED)):
            if own is not None and bias is not None:
                own.copy_(bias)
        return made.train(experts.training)

    def weights_of(self, expert: int) -> tuple[Tensor, Tensor]:
        ups = zip(self.up_codes[expert], self.up_scales[expert], strict=True)
        up_DG = torch.cat([_wide(*up).t() for up in ups], dim=1)
        return up_DG, _wide(self.down_codes[expert], self.down_scales[expert]).t()

    def extra_repr(self) -> str:
        return f"{self.num_experts} of dim={self.dim}, hidden={self.hidden}, kind={self.kind!r}, e4m3"


def _put(codes: Tensor, scales: Tensor, weight_IJ: Tensor) -> None:
    """The inner size, that of the rows, is last in the codes."""
    found, own = encode_matrix(weight_IJ.t())
    codes.copy_(found.view(torch.uint8))
    scales.copy_(own.view(torch.int32))


def _wide(codes: Tensor, scales: Tensor) -> Tensor:
    return decode_matrix(codes.view(CODES), scales.view(torch.float32))
