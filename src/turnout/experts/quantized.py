"""Experts with weights of 8 bits, for inference: a quarter of the memory, and of what decoding reads of it."""

import torch
from torch import Tensor

from turnout.errors import ConfigError, NonFiniteError
from turnout.experts.rounded import RoundedExperts
from turnout.experts.weights import FFNExperts
from turnout.kernels.int8_codes import GROUP, PANEL, QUAD, FFNCodes, decode_ffn, encode_ffn
from turnout.kernels.pages import on_large_pages

INT8_BITS = {"int8": 16, "int8-a8": 8}  # precision of weights of 8 bits -> bits of the activations


class QuantizedFFNExperts(RoundedExperts):
    """E feed-forward networks whose weights are codes of 8 bits, a scale for each 32 inner columns of each column.

    Codes and scales have the experts as their first axis and lie in the kernel's order, the same on every machine
    (`turnout.kernels.int8_codes`), so a checkpoint holds what is computed with. Nothing in here learns.

    `activation_bits` is what rows are rounded to before each product: 16 (14 and a sign, at scales of their own for
    each row and 32 columns, so that outliers cost nothing: the error is that of the weights), or 8, which is faster
    and less exact. A processor with AMX has bfloat16 for either, where some expert has more than 16 rows: faster than
    8 bits, and nearly as exact as 16.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        *,
        kind: str = "swiglu",
        bias: bool = False,
        activation_bits: int = 16,
    ) -> None:
        """Room for the codes, to be loaded; `quantize_experts` makes them from weights.

        Raises: ConfigError if `activation_bits` is neither 16 nor 8.
        """
        if activation_bits not in INT8_BITS.values():
            raise ConfigError(f"activation_bits={activation_bits} must be 16 or 8")
        super().__init__(dim, hidden, num_experts, kind=kind, bias=bias)
        self.activation_bits = activation_bits
        up = (num_experts, self.parts, _up(hidden, GROUP) // PANEL, _up(dim, GROUP) // GROUP)
        down = (num_experts, _up(dim, PANEL) // PANEL, _up(hidden, GROUP) // GROUP)
        for name, sizes in (("up", up), ("down", down)):
            codes = torch.empty(*sizes, GROUP // QUAD, PANEL, QUAD, dtype=torch.uint8)
            scales = torch.empty(*sizes, 2, PANEL, dtype=torch.uint8)
            self.register_buffer(f"{name}_codes", on_large_pages(codes).zero_())
            self.register_buffer(f"{name}_scales", on_large_pages(scales).zero_())
            # the bits of bfloat16: no cast of the model may change or widen them
            self.register_buffer(f"{name}_bases", torch.zeros(*sizes[:-1], PANEL, dtype=torch.int16))
        self.up_codes: Tensor
        self.up_scales: Tensor
        self.up_bases: Tensor
        self.down_codes: Tensor
        self.down_scales: Tensor
        self.down_bases: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, experts: FFNExperts, *, activation_bits: int = 16) -> "QuantizedFFNExperts":
        """The experts with their weights rounded.

        Raises: NonFiniteError if a weight is NaN or infinite.
        """
        made = cls(
            experts.dim,
            experts.hidden,
            experts.num_experts,
            kind=experts.kind,
            bias=experts.up_bias_EG is not None,
            activation_bits=activation_bits,
        )
        for name, weight in experts.named_parameters(recurse=False):
            if not weight.isfinite().all():
                raise NonFiniteError(f"experts.{name} has NaN or infinite values; 8 bits have no code for them")
        for e in range(experts.num_experts):
            for name, found in encode_ffn(experts.up_EDG[e : e + 1], experts.down_EFD[e : e + 1])._asdict().items():
                own = getattr(made, name)
                own[e] = found[0].view(own.dtype)
        for own, bias in ((made.up_bias_EG, experts.up_bias_EG), (made.down_bias_ED, experts.added_bias_ED)):
            if own is not None and bias is not None:
                own.copy_(bias)
        return made.to(experts.up_EDG.device).train(experts.training)

    @property
    def digits(self) -> int:
        """Bytes of an activation."""
        return self.activation_bits // 8

    def weights_of(self, expert: int) -> tuple[Tensor, Tensor]:
        """up_DG and down_FD of one expert as the codes have them, in float32."""
        one = slice(expert, expert + 1)
        codes = FFNCodes(
            up_codes=self.up_codes[one],
            up_scales=self.up_scales[one],
            up_bases=self.up_bases[one].view(torch.bfloat16),
            down_codes=self.down_codes[one],
            down_scales=self.down_scales[one],
            down_bases=self.down_bases[one].view(torch.bfloat16),
        )
        up_EDG, down_EFD = decode_ffn(codes, dim=self.dim, hidden=self.hidden)
        return up_EDG[0], down_EFD[0]

    def extra_repr(self) -> str:
        return (
            f"{self.num_experts} of dim={self.dim}, hidden={self.hidden}, kind={self.kind!r}, "
            f"activation_bits={self.activation_bits}"
        )


def _up(size: int, step: int) -> int:
    return size + -size % step
