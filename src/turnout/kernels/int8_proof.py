"""The pass with weights of 8 bits is trusted once its whole numbers are exact, and its real ones near the oracle's."""

import functools
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional

from turnout import reference
from turnout.kernels.arguments import FEW_ROWS, KINDS, Int8Weights, Routing
from turnout.kernels.few_proof import few_error
from turnout.kernels.int8_codes import GROUP, decode_ffn, encode_ffn
from turnout.kernels.kernel import Kernel
from turnout.tensors import Assignment

# rounding of float sums; of activations to 14 bits and a sign; and, by the matrix unit, to bfloat16
EXACT, NEAR, NEAR_HALF, NEAR_LOGITS = 1e-6, 1e-3, 2**-8, 1e-5
# few rows and many; whole groups and panels, parts of them, nearly nothing: tokens, dim, hidden, experts, choices
SIZES = ((90, 131, 200, 4, 2), (70, 64, 96, 2, 1), (5, 70, 33, 3, 2), (1, 5, 3, 2, 1))


def prove_int8(kernel: Kernel) -> str:
    """Why not to trust the kernel's pass with weights of 8 bits, or nothing."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
        exact = [whole_number_error(kernel, sizes, digits) for sizes, digits in product(SIZES, (1, 2))]
        near = [_error(kernel, kind, sizes, bias=bias) for kind, sizes, bias in product(KINDS, SIZES, (False, True))]
        few = [_few_error(kernel, digits) for digits in (1, 2)]
    # torch's max keeps NaN, Python's would drop it; not <: NaN is no proof
    for errors, tolerance in (
        (exact, EXACT),
        (near, NEAR_HALF if kernel.matrix_unit else NEAR),
        (few, NEAR_LOGITS),
    ):
        worst = float(torch.tensor(errors).max())
        if not worst < tolerance:
            return f"the compiled kernel's 8-bit pass is off its oracle by {worst:.1e} on this machine"
    return ""


def whole_number_error(kernel: Kernel, sizes: tuple[int, ...], digits: int) -> float:
    """Off whole numbers, where the codes of weights and tokens are the numbers themselves, relative to the largest."""
    num_tokens, dim, hidden, num_experts, k = sizes
    generator = torch.Generator().manual_seed(sum(sizes))
    draw = functools.partial(torch.randint, generator=generator, dtype=torch.float32)
    up_EDF, down_EFD = draw(-4, 5, (num_experts, dim, hidden)), draw(-127, 128, (num_experts, hidden, dim))
    # so wide a range has codes of whole numbers: scale = 1, zero = 127
    for weight in (up_EDF, down_EFD):
        _per_group(weight, 0, -127.0)
        _per_group(weight, 1, 127.0)
    x_TD = draw(-9, 10, (num_tokens, dim))
    _per_group(x_TD.T.unsqueeze(0), 2, 127.0)
    own = encode_ffn(up_EDF, down_EFD)
    weights = Int8Weights(**own._asdict(), up_bias_EG=None, down_bias_ED=None, hidden=hidden, kind="relu")
    assignment = _drawn(num_tokens, num_experts, k, generator)
    got_TD = kernel.infer_int8(x_TD, assignment.weight_N, weights, kernel.sort(assignment, None), digits=digits)
    halves = in_halves(kernel, assignment)
    want_TD = torch.zeros(num_tokens, dim, dtype=torch.float64)
    for expert in range(num_experts):
        sent_N = assignment.expert_N == expert
        token_M = assignment.token_N[sent_N]
        h_MF = (x_TD[token_M].double() @ up_EDF[expert].double()).clamp(min=0)
        rounded_MF = h_MF.bfloat16().double() if halves else as_codes(h_MF, digits)
        y_MD = rounded_MF @ down_EFD[expert].double()
        want_TD.index_add_(0, token_M, assignment.weight_N[sent_N].double().unsqueeze(1) * y_MD)
    return _relative(got_TD, want_TD)


def in_halves(kernel: Kernel, assignment: Assignment) -> bool:
    """Whether the matrix unit computes, in bfloat16: some expert has more than a few rows."""
    counts_E = torch.bincount(assignment.expert_N, minlength=1)
    return kernel.matrix_unit and int(counts_E.max()) > FEW_ROWS


def as_codes(h_MF: Tensor, digits: int) -> Tensor:
    """What the kernel makes of activations, group by group: by definition, not by its formulas."""
    groups = functional.pad(h_MF.float(), (0, -h_MF.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    largest = groups.abs().amax(dim=2, keepdim=True)
    scale = largest / 127 if digits == 1 else 2.0 ** (torch.floor(torch.log2(largest)) - 13)
    # in double: the kernel multiplies and rounds in one step
    codes = (groups.double() * (1 / scale).double()).nan_to_num(0.0).round()
    return (codes * scale.double()).nan_to_num(0.0).flatten(1)[:, : h_MF.shape[1]]


def _error(kernel: Kernel, kind: str, sizes: tuple[int, ...], *, bias: bool) -> float:
    """Off the oracle in float64 of what the codes stand for, where they are widened to bfloat16 of that."""
    num_tokens, dim, hidden, num_experts, k = sizes
    generator = torch.Generator().manual_seed(sum(sizes))
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float32)
    width = 2 * hidden if kind.startswith("swiglu") else hidden
    up_EDG, down_EFD = draw(num_experts, dim, width) * dim**-0.5, draw(num_experts, hidden, dim) * hidden**-0.5
    biases = (draw(num_experts, width), draw(num_experts, dim)) if bias else (None, None)
    own = encode_ffn(up_EDG, down_EFD)
    weights = Int8Weights(**own._asdict(), up_bias_EG=biases[0], down_bias_ED=biases[1], hidden=hidden, kind=kind)
    x_TD, assignment = draw(num_tokens, dim), _drawn(num_tokens, num_experts, k, generator)
    got_TD = kernel.infer_int8(x_TD, assignment.weight_N, weights, kernel.sort(assignment, None), digits=2)
    gate_TE = torch.zeros(num_tokens, num_experts, dtype=torch.float64)
    gate_TE[assignment.token_N, assignment.expert_N] = assignment.weight_N.double()
    matrices = decode_ffn(own, dim=dim, hidden=hidden)
    if in_halves(kernel, assignment):
        x_TD, *matrices = (tensor.bfloat16() for tensor in (x_TD, *matrices))
    experts = [
        functools.partial(
            reference.ffn,
            up_DG=up.double(),
            down_FD=down.double(),
            kind=kind,
            up_bias_G=0.0 if biases[0] is None else biases[0][e].double(),
            down_bias_D=0.0 if biases[1] is None else biases[1][e].double(),
        )
        for e, (up, down) in enumerate(zip(*matrices, strict=True))
    ]
    return _relative(got_TD, reference.moe(x_TD.double(), gate_TE, experts))


def _few_error(kernel: Kernel, digits: int) -> float:
    """Of the call for few tokens."""
    generator, hidden = torch.Generator().manual_seed(0), 24

    def draw(num_experts: int, dim: int) -> Int8Weights:
        sizes = ((num_experts, dim, 2 * hidden), (num_experts, hidden, dim))
        own = encode_ffn(*(torch.randn(size, generator=generator) for size in sizes))
        bias_ED = torch.randn(num_experts, dim, generator=generator)
        return Int8Weights(**own._asdict(), up_bias_EG=None, down_bias_ED=bias_ED, hidden=hidden, kind="swiglu")

    def computed(x_TD: Tensor, weight_N: Tensor, weights: Int8Weights, routing: Routing) -> Tensor:
        return kernel.infer_int8(x_TD, weight_N, weights, routing, digits=digits)

    return few_error(kernel, draw, computed, digits=digits)


def _per_group(weight_EIO: Tensor, offset: int, value: float) -> None:
    """One value in each group of rows, while there is room."""
    weight_EIO[:, offset::GROUP] = value


def _drawn(num_tokens: int, num_experts: int, k: int, generator: torch.Generator) -> Assignment:
    expert_TK = torch.rand(num_tokens, num_experts, generator=generator, dtype=torch.float32).topk(k).indices
    return Assignment(
        token_N=torch.arange(num_tokens).repeat_interleave(k),
        expert_N=expert_TK.flatten(),
        weight_N=torch.randn(num_tokens * k, generator=generator, dtype=torch.float32),
        choice_N=torch.arange(k).repeat(num_tokens),
        num_tokens=num_tokens,
        num_experts=num_experts,
    )


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).abs().max() / want.abs().max().clamp(min=1))
