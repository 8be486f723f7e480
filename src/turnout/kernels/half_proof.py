"""The pass in bfloat16 is trusted once whole numbers come out exact, and real ones as near as rounding lets them."""

import functools

import torch
from torch import Tensor

from turnout.kernels.arguments import KINDS
from turnout.kernels.kernel import Kernel
from turnout.kernels.proof import by_kernel, by_oracle, drawn, largest_error

NEAR = 2**-7  # of the largest output: the step from a bfloat16 to the next
# many rows of an expert, and so few that they are widened; whole tiles and chunks, parts of them, nearly nothing
SIZES = ((90, 131, 200, 4, 2), (70, 64, 96, 2, 1), (150, 40, 1100, 3, 1), (33, 20, 12, 5, 2), (1, 5, 3, 2, 1))


def prove_half(kernel: Kernel) -> str:
    """Why not to trust the kernel's pass in bfloat16, or nothing."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
        exact = [whole_number_error(kernel, sizes) for sizes in SIZES]
        near = [real_number_error(kernel, kind, sizes, bias) for kind in KINDS for sizes in SIZES for bias in (0, 1)]
        # torch's max keeps NaN, Python's would drop it; not >: NaN is no proof
        off, far = float(torch.stack(exact).max()), float(torch.stack(near).max())
    if off == 0 and far < NEAR:
        return ""
    return f"the compiled kernel's pass in bfloat16 is off the oracle by {off:.1e} and {far:.1e} on this machine"


def whole_number_error(kernel: Kernel, sizes: tuple[int, ...]) -> Tensor:
    """Off whole numbers and their gradients, of which bfloat16 holds all that occur before the last rounding."""
    num_tokens, dim, hidden, num_experts, k = sizes
    generator = torch.Generator().manual_seed(sum(sizes))
    draw = functools.partial(torch.randint, generator=generator, dtype=torch.float32)
    x_TD, up_EDF, down_EFD, y_grad_TD = (
        draw(-1, 2, shape)
        for shape in (
            (num_tokens, dim),
            (num_experts, dim, hidden),
            (num_experts, hidden, dim),
            (num_tokens, dim),
        )
    )
    expert_TK = torch.rand(num_tokens, num_experts, generator=generator).topk(k).indices
    weight_N = 2.0 ** draw(-1, 2, (num_tokens * k,))
    got, want = _passes(kernel, "relu", [x_TD, weight_N, up_EDF, down_EFD], expert_TK, y_grad_TD)
    return largest_error(got, [b.to(a.dtype).double() for a, b in zip(got, want, strict=True)])


def real_number_error(kernel: Kernel, kind: str, sizes: tuple[int, ...], bias: int) -> Tensor:
    """Off the oracle in float64, relative to its largest output; half of it relative to its largest gradient.

    What gradients are made of is itself rounded: the values before the activation, h, and their gradients.
    """
    got, want = _passes(kernel, kind, *drawn(kind, sizes, bias=bool(bias)))
    return torch.maximum(largest_error(got[:2], want[:2]), largest_error(got[2:], want[2:]) / 2)


def _passes(
    kernel: Kernel, kind: str, leaves: list[Tensor], expert_TK: Tensor, y_grad_TD: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """The kernel's, and the oracle's in float64 of the same rounded tokens, matrices and gradient.

    That is the output as in inference, as in training, and the gradients of all leaves.
    """
    x_TD, weight_N, up_EDG, down_EFD, *biases = leaves
    x_TD, up_EDG, down_EFD, y_grad_TD = (tensor.bfloat16() for tensor in (x_TD, up_EDG, down_EFD, y_grad_TD))
    want_TD, *grads = by_oracle(kind, [x_TD, weight_N, up_EDG, down_EFD, *biases], expert_TK, y_grad_TD)
    got = by_kernel(kernel, kind, [x_TD, weight_N, up_EDG, down_EFD, *biases], expert_TK, y_grad_TD)
    return got, [want_TD, want_TD, *grads]
