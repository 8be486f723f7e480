"""What the compiled functions are given and give, and how."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from turnout.errors import ShapeError, TurnoutError

# everything by one operator: of few tokens the first use of each takes 50 to 100 us, since weights have pushed what is
# not in use out of the caches; and whatever torch's default device is
room = partial(torch.empty, device="cpu")
# numbers in activation.h
KINDS = {"relu": 0, "gelu": 1, "swiglu": 2, "swiglu_clamped": 3}
PARTS = {"relu": 1, "gelu": 1, "swiglu": 2, "swiglu_clamped": 2}  # of the first product: a gate, and what it gates
# up to so many rows of every expert are computed as few: FEW_ROWS in job.h
FEW_ROWS = 16


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Of all experts: matrices in float32 or bfloat16, biases in float32; contiguous."""

    up_EDG: Tensor
    down_EFD: Tensor
    up_bias_EG: Tensor | None
    down_bias_ED: Tensor | None
    kind: str

    @property
    def is_half(self) -> bool:
        return self.up_EDG.dtype == torch.bfloat16

    @property
    def hidden(self) -> int:
        return self.down_EFD.shape[1]

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """What the two products multiply with."""
        return self.up_EDG, self.down_EFD

    @property
    def scales(self) -> tuple[Tensor | None, ...]:
        """There are none."""
        return (None,) * 4


@dataclass(frozen=True, kw_only=True)
class Int8Weights:
    """Of all experts, as int8_codes.py lays them out; those of the first product have an axis of parts after E."""

    up_codes: Tensor
    up_scales: Tensor
    up_bases: Tensor
    down_codes: Tensor
    down_scales: Tensor
    down_bases: Tensor
    up_bias_EG: Tensor | None
    down_bias_ED: Tensor | None
    hidden: int
    kind: str

    is_half = False

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """What the two products multiply with."""
        return self.up_codes, self.down_codes

    @property
    def scales(self) -> tuple[Tensor, ...]:
        """In the order of Int8Job."""
        return self.up_scales, self.down_scales, self.up_bases, self.down_bases

    @property
    def matrices(self) -> tuple[Tensor, ...]:
        """Codes, scales and bases of the first product, then of the second."""
        up = (self.up_codes, self.up_scales, self.up_bases)
        return (*up, self.down_codes, self.down_scales, self.down_bases)


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Assignments in the order of the experts, as routes.h lays them out."""

    routes: Tensor
    num_rows: int
    num_tokens: int
    num_experts: int
    num_assignments: int


class Chosen(NamedTuple):
    """Of R tokens and E experts: every score, and K choices of each token side by side."""

    scores_RE: Tensor
    weight_N: Tensor
    expert_N: Tensor
    token_N: Tensor
    choice_N: Tensor


class Gradients(NamedTuple):
    """Of whatever was wanted; the order is that of the autograd function's inputs."""

    x_TD: Tensor | None
    weight_N: Tensor | None
    up_EDG: Tensor | None
    down_EFD: Tensor | None
    up_bias_EG: Tensor | None
    down_bias_ED: Tensor | None


def check_fit(weights: Weights | Int8Weights, num_experts: int, dim: int) -> None:
    """The kernel would read past the end of weights that somebody replaced by smaller ones, or where there are none.

    Raises: ShapeError if they are not of so many experts for rows so wide.
    """
    up, down = weights.ends
    width = PARTS[weights.kind] * weights.hidden
    fits = len(up) == len(down) == num_experts
    if isinstance(weights, Weights):
        fits = fits and up.shape[1] == down.shape[2] == dim and up.shape[2] == width
    biases = ((weights.up_bias_EG, width), (weights.down_bias_ED, dim))
    fits = fits and all(bias is None or bias.shape == (num_experts, size) for bias, size in biases)
    if not fits:
        raise ShapeError(
            f"the experts' weights have shapes {tuple(up.shape)} and {tuple(down.shape)}, their biases "
            f"{[None if bias is None else tuple(bias.shape) for bias, _ in biases]}; there are {num_experts} experts "
            f"for rows of width {dim}"
        )
    for tensor in (up, down, weights.up_bias_EG, weights.down_bias_ED):
        if tensor is not None and tensor.numel() > 0 and tensor.data_ptr() == 0:
            raise ShapeError(f"the experts' weights on {tensor.device} have no memory to read; materialise them first")


def like_first(first: Tensor, *_: object) -> Tensor:
    """What an operator gives that has the sizes and dtype of its first input, contiguous, without its values."""
    return torch.empty_like(first, memory_format=torch.contiguous_format)


def at(tensor: Tensor | None) -> int:
    """Where its numbers begin; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def check(failed: int) -> None:
    """Raises: TurnoutError if a compiled function failed."""
    if failed:
        raise TurnoutError("the kernel found no memory for its workspace")
