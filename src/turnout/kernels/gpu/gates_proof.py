"""The kernels of a router are trusted once they have chosen, on this very device, what float64 says."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from turnout.kernels.gpu.choose import Gate, choose, choose_backward
from turnout.kernels.gpu.trust import doubt
from turnout.kernels.proof import largest_error

TOLERANCE = 1e-5
# rows, experts and choices: several blocks of rows; widths that are no power of two
SIZES = ((300, 5, 2), (70, 40, 3))


def prove(sigmoid: bool, renormalize: bool, device: torch.device) -> str:
    """Why not to trust them there for such gates, whatever their k, or nothing."""
    gate = Gate(k=1, sigmoid=sigmoid, renormalize=renormalize, scale=2.5)
    off = "off float64 by {:.1e} on this device"
    return doubt("Triton's kernels of the router", partial(worst_error, gate, device), TOLERANCE, off)


def worst_error(gate: Gate, device: torch.device) -> float:
    """Largest difference from float64, relative to the largest value or 1; infinite where other experts are chosen."""
    # whatever the caller is in the middle of
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
        cases = [(sizes, bias, (True, True)) for sizes in SIZES for bias in (False, True)]
        cases += [(SIZES[0], False, wanted) for wanted in ((True, False), (False, True))]
        errors = [_error(gate, *case, device) for case in cases]
        # torch's max keeps NaN, Python's would drop it
        return float(torch.stack(errors).max())


def by_float64(logits_RE: Tensor, bias_E: Tensor | None, gate: Gate) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, weights of the best and who they are, by torch's operators; the gradient is autograd's."""
    by_RE = logits_RE.detach() if bias_E is None else logits_RE.detach().sigmoid() + bias_E
    expert_RK = by_RE.sort(dim=1, descending=True, stable=True).indices[:, : gate.k]
    value_RE = functional.logsigmoid(logits_RE) if gate.sigmoid else logits_RE
    scores_RE, chosen_RK = value_RE.softmax(dim=1), value_RE.gather(1, expert_RK)
    if gate.renormalize:
        weight_RK = chosen_RK.softmax(dim=1)
    else:
        weight_RK = chosen_RK.exp() if gate.sigmoid else scores_RE.gather(1, expert_RK)
    return scores_RE, weight_RK.flatten() * gate.scale, expert_RK.flatten()


def _error(
    gate: Gate, sizes: tuple[int, int, int], bias: bool, wanted: tuple[bool, bool], device: torch.device
) -> Tensor:
    num_rows, num_experts, k = sizes
    gate = Gate(k=k, sigmoid=gate.sigmoid, renormalize=gate.renormalize, scale=gate.scale)
    generator = torch.Generator().manual_seed(num_experts)
    # on a lattice, so that there are ties, and nothing that rounding could reorder
    logits_RE = torch.randint(-9, 10, (num_rows, num_experts), generator=generator).float() / 4
    bias_E = torch.randint(-3, 4, (num_experts,), generator=generator).float() if bias else None
    token_R = 2 * torch.arange(num_rows)
    grads = [torch.randn(size, generator=generator) for size in ((num_rows, num_experts), (num_rows * k,))]
    wide_RE = logits_RE.double().requires_grad_()
    *outputs, expert_N = by_float64(wide_RE, bias_E, gate)
    asked = [i for i in range(2) if wanted[i]]
    (want_RE,) = torch.autograd.grad([outputs[i] for i in asked], wide_RE, [grads[i].double() for i in asked])
    own_RE = logits_RE.to(device)
    chosen, count_BE = choose(own_RE, token_R.to(device), None if bias_E is None else bias_E.to(device), gate)
    scores_grad_RE, weight_grad_N = (
        grad.to(device) if is_wanted else None for grad, is_wanted in zip(grads, wanted, strict=True)
    )
    got_RE = choose_backward(own_RE, *chosen[:3], scores_grad_RE, weight_grad_N, gate)
    right = (expert_N, token_R.repeat_interleave(k), torch.arange(k).repeat(num_rows))
    counts = torch.equal(count_BE.cpu().sum(dim=0), torch.bincount(expert_N, minlength=num_experts))
    if not counts or not all(torch.equal(a.cpu(), b) for a, b in zip(chosen[2:], right, strict=True)):
        return torch.tensor(torch.inf, dtype=torch.float64)
    return largest_error([chosen.scores_RE.cpu(), chosen.weight_N.cpu(), got_RE.cpu()], [*outputs, want_RE]).detach()
