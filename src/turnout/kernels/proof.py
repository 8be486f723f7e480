"""A kernel is trusted once it has computed what the dense oracle computes, on this machine."""

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from turnout import reference
from turnout.kernels.arguments import KINDS, Routing, Weights
from turnout.kernels.few_proof import few_error
from turnout.kernels.kernel import Kernel
from turnout.tensors import Assignment

TOLERANCE = 1e-5
# whole tiles and chunks, parts of them, and nearly nothing; tokens, dim, hidden, experts, choices
SIZES = ((70, 288, 320, 4, 2), (33, 20, 12, 5, 2), (9, 64, 96, 3, 1), (1, 5, 3, 2, 1))


def prove(kernel: Kernel) -> str:
    """Why not to trust the kernel, or nothing."""
    worst = worst_error(kernel)
    # not <: NaN is no proof
    return "" if worst < TOLERANCE else f"the compiled kernel is off the oracle by {worst:.1e} on this machine"


def once(prove: Callable[[], str], proof: Path) -> str:
    """What `prove` says, or nothing if it said nothing on this machine before: a proof that succeeded is kept."""
    if proof.exists():
        return ""
    doubt = prove()
    if not doubt:
        # a cache that cannot be written is proven anew by each process
        with contextlib.suppress(OSError):
            proof.parent.mkdir(parents=True, exist_ok=True)
            proof.touch()
    return doubt


def worst_error(kernel: Kernel) -> float:
    """Largest difference from the oracle in float64 over kinds and sizes, relative to the largest value or 1."""
    # whatever the caller is in the middle of
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
        errors = [_error(kernel, kind, sizes, bias=bias) for kind in KINDS for sizes in SIZES for bias in (False, True)]
        errors += [_picks_error(kernel, num_experts) for num_experts in (1, 5, 16, 40)]
        errors += [
            _gates_error(kernel, num_experts, renormalize=renormalize, wanted=wanted)
            for num_experts in (1, 5, 16, 40)
            for renormalize in (False, True)
            for wanted in ((1, 0), (0, 1), (1, 1))
        ]
        errors += [_few_error(kernel, dtype) for dtype in (torch.float32, torch.bfloat16)]
        # torch's max keeps NaN, Python's would drop it
        return float(torch.stack(errors).max())


def _error(kernel: Kernel, kind: str, sizes: tuple[int, ...], *, bias: bool) -> Tensor:
    leaves, expert_TK, y_grad_TD = drawn(kind, sizes, bias=bias)
    got = by_kernel(kernel, kind, leaves, expert_TK, y_grad_TD)
    y_TD, *grads = by_oracle(kind, leaves, expert_TK, y_grad_TD)
    return largest_error(got, [y_TD, y_TD, *grads])


def drawn(kind: str, sizes: tuple[int, ...], *, bias: bool) -> tuple[list[Tensor], Tensor, Tensor]:
    """Leaves in float32 (x, weights of assignments, both matrices, both biases), choices, and the gradient of y."""
    num_tokens, dim, hidden, num_experts, k = sizes
    generator = torch.Generator().manual_seed(sum(sizes))
    draw = partial(torch.randn, generator=generator, dtype=torch.float32)
    expert_TK = torch.rand(num_tokens, num_experts, generator=generator, dtype=torch.float32).topk(k).indices
    width = 2 * hidden if kind.startswith("swiglu") else hidden
    leaves = [
        draw(num_tokens, dim),
        draw(num_tokens * k),
        draw(num_experts, dim, width) * dim**-0.5,
        draw(num_experts, hidden, dim) * hidden**-0.5,
        *([draw(num_experts, width), draw(num_experts, dim)] if bias else []),
    ]
    return leaves, expert_TK, draw(num_tokens, dim)


def largest_error(got: list[Tensor], want: list[Tensor]) -> Tensor:
    """Of all pairs, relative to the largest value of each or 1; NaN where there is one."""
    pairs = zip(got, want, strict=True)
    return torch.stack([(a.double() - b).abs().max() / b.abs().max().clamp(min=1) for a, b in pairs]).max()


def by_kernel(kernel: Kernel, kind: str, leaves: list[Tensor], expert_TK: Tensor, y_grad_TD: Tensor) -> list[Tensor]:
    """Output as in inference and as in training, and the gradients of all leaves."""
    x_TD, weight_N, up_EDG, down_EFD, *biases = leaves
    up_bias, down_bias = biases or (None, None)
    weights = Weights(up_EDG=up_EDG, down_EFD=down_EFD, up_bias_EG=up_bias, down_bias_ED=down_bias, kind=kind)
    routing = kernel.sort(assignment_of(weight_N, expert_TK, len(up_EDG)), None)
    inferred_TD, _ = kernel.forward(x_TD, weight_N, weights, routing, saved_rows=None)
    y_TD, saved = kernel.forward(x_TD, weight_N, weights, routing, saved_rows=routing.num_rows)
    assert saved is not None
    wanted = (True,) * len(leaves) + (False,) * (6 - len(leaves))
    grads = kernel.backward(y_grad_TD, x_TD, weight_N, weights, routing, saved, wanted=wanted)
    return [inferred_TD, y_TD, *(grad for grad in grads if grad is not None)]


def assignment_of(weight_N: Tensor, expert_TK: Tensor, num_experts: int) -> Assignment:
    """Choices of each token side by side, as routers by top-k give them."""
    num_tokens, k = expert_TK.shape
    return Assignment(
        token_N=torch.arange(num_tokens).repeat_interleave(k),
        expert_N=expert_TK.flatten(),
        weight_N=weight_N,
        choice_N=torch.arange(k).repeat(num_tokens),
        num_tokens=num_tokens,
        num_experts=num_experts,
        top_k=k,
    )


def by_oracle(kind: str, leaves: list[Tensor], expert_TK: Tensor, y_grad_TD: Tensor) -> list[Tensor]:
    """Output, and the gradients of all leaves."""
    wide = [leaf.double().requires_grad_() for leaf in leaves]
    x_TD, weight_N, up_EDG, down_EFD, *biases = wide
    num_tokens, num_experts = len(x_TD), len(up_EDG)
    gate_TE = torch.zeros(num_tokens, num_experts, dtype=torch.float64)
    gate_TE = gate_TE.scatter(1, expert_TK, weight_N.view_as(expert_TK))
    up_biases, down_biases = [bias.unbind() for bias in biases] or [[0.0] * num_experts] * 2
    experts = [
        partial(reference.ffn, up_DG=up, down_FD=down, kind=kind, up_bias_G=up_bias, down_bias_D=down_bias)
        for up, down, up_bias, down_bias in zip(up_EDG.unbind(), down_EFD.unbind(), up_biases, down_biases, strict=True)
    ]
    y_TD = reference.moe(x_TD, gate_TE, experts)
    return [y_TD.detach(), *torch.autograd.grad(y_TD, wide, y_grad_TD.double())]


def _picks_error(kernel: Kernel, num_experts: int) -> Tensor:
    """0 if the best experts are the right ones, else infinite; scores on a lattice, so that there are ties."""
    generator = torch.Generator().manual_seed(num_experts)
    scores_RE = torch.randint(-4, 5, (1030, num_experts), generator=generator).to(torch.float32) / 2
    k = min(3, num_experts)
    right_RK = scores_RE.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.tensor(0.0 if torch.equal(kernel.best(scores_RE, k), right_RK) else torch.inf, dtype=torch.float64)


def _gates_error(kernel: Kernel, num_experts: int, *, renormalize: bool, wanted: tuple[int, int]) -> Tensor:
    """Of softmax, the chosen weights, and the gradient through scores, weights or both."""
    generator = torch.Generator().manual_seed(num_experts)
    k, logits_RE = min(3, num_experts), 3 * torch.randn(530, num_experts, generator=generator)
    wide_RE, token_R = logits_RE.double().requires_grad_(), torch.arange(530)
    chosen = kernel.choose(logits_RE, token_R, k, renormalize=renormalize)
    expert_RK = logits_RE.sort(dim=1, descending=True, stable=True).indices[:, :k]
    scores_RE = wide_RE.softmax(dim=1)
    weight_RK = wide_RE.gather(1, expert_RK).softmax(dim=1) if renormalize else scores_RE.gather(1, expert_RK)
    outputs, grads = (scores_RE, weight_RK.flatten()), [torch.randn_like(tensor) for tensor in chosen[:2]]
    asked = [grad if is_wanted else None for grad, is_wanted in zip(grads, wanted, strict=True)]
    got_RE = kernel.choose_backward(chosen, *asked, renormalize=renormalize)
    (want_RE,) = torch.autograd.grad(
        [output for output, grad in zip(outputs, asked, strict=True) if grad is not None],
        wide_RE,
        [grad.double() for grad in asked if grad is not None],
    )
    whole = (expert_RK.flatten(), token_R.repeat_interleave(k), torch.arange(k).repeat(530))
    if not all(map(torch.equal, chosen[2:], whole)):
        return torch.tensor(torch.inf, dtype=torch.float64)
    return largest_error([*chosen[:2], got_RE], [*outputs, want_RE]).detach()


def _few_error(kernel: Kernel, dtype: torch.dtype) -> Tensor:
    """Of the call for few tokens, with matrices of that dtype."""
    generator, hidden = torch.Generator().manual_seed(0), 24

    def draw(num_experts: int, dim: int) -> Weights:
        sizes = ((num_experts, dim, 2 * hidden), (num_experts, hidden, dim))
        up_EDG, down_EFD = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
        up_bias_EG = torch.randn(num_experts, 2 * hidden, generator=generator)
        return Weights(up_EDG=up_EDG, down_EFD=down_EFD, up_bias_EG=up_bias_EG, down_bias_ED=None, kind="swiglu")

    def computed(x_TD: Tensor, weight_N: Tensor, weights: Weights, routing: Routing) -> Tensor:
        return kernel.forward(x_TD, weight_N, weights, routing, saved_rows=None)[0]

    return torch.tensor(few_error(kernel, draw, computed), dtype=torch.float64)
