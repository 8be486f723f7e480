"""Memory of what was saved for a backward pass goes back only where nobody can read it again."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contracts.test_fused_cpu import drawn, drawn_experts, with_kernel
from turnout.contracts import ExpertBackend
from turnout.dispatch import LocalDispatcher
from turnout.experts.fused_op import kernel_weights, the_kernel
from turnout.kernels.consumed import mapped_bytes
from turnout.layers.expert_pass import pass_experts
from turnout.tensors import Admission

# 41 MiB of values before the activation: beyond 32 MiB glibc always asks the system for memory
TOKENS, DIM, HIDDEN = 2600, 8, 2048
maps = pytest.mark.skipif(mapped_bytes() == 0, reason="this allocator keeps what is freed")
pytestmark = with_kernel


def passed() -> tuple[Tensor, list[Tensor]]:
    """An output of the compiled pass, and the leaves it has gradients for."""
    experts, assignment = drawn_experts(DIM, HIDDEN, 3), drawn(TOKENS, 3, 1)
    x_TD = torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(0)).requires_grad_()
    admission = Admission(keep_N=None, capacity=None, dropped_E={})
    backend = ExpertBackend.TABLE["fused_cpu"]
    y_TD = pass_experts(experts, backend, x_TD, assignment, admission, dispatcher=LocalDispatcher())
    return y_TD, [x_TD, assignment.weight_N, *experts.parameters()]


def test_what_was_read_is_zero_afterwards_and_the_gradients_are_the_same() -> None:
    experts, assignment, kernel = drawn_experts(DIM, HIDDEN, 3), drawn(TOKENS, 3, 1), the_kernel()
    weights = kernel_weights(experts.up_EDG.detach(), experts.down_EFD.detach(), None, None, "swiglu")
    x_TD, routing = torch.randn(TOKENS, DIM), kernel.sort(assignment, None)
    weight_N = assignment.weight_N.detach()
    y_TD, saved = kernel.forward(x_TD, weight_N, weights, routing, saved_rows=TOKENS)
    assert saved is not None
    before, wanted = saved.clone(), (True,) * 4 + (False,) * 2
    kept = kernel.backward(y_TD, x_TD, weight_N, weights, routing, saved, wanted=wanted)
    assert torch.equal(saved, before)
    given = kernel.backward(y_TD, x_TD, weight_N, weights, routing, saved, wanted=wanted, give_back=True)
    assert all(torch.equal(a, b) for a, b in zip(kept[:4], given[:4], strict=True))
    # all but the pages at the ends of some 15 blocks
    assert float((saved == 0).float().mean()) > 0.98


@maps
def test_a_graph_that_is_kept_can_be_passed_again() -> None:
    y_TD, leaves = passed()
    assert y_TD.grad_fn.may_give_back, "otherwise this shows nothing"  # pyright: ignore
    passes = [torch.autograd.grad(y_TD.sum(), leaves, retain_graph=again) for again in (True, True, False)]
    assert all(torch.equal(a, b) for other in passes[1:] for a, b in zip(passes[0], other, strict=True))


@maps
def test_what_a_hook_has_kept_stays_as_it_was() -> None:
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y_TD, leaves = passed()
    before = [tensor.clone() for tensor in held]
    torch.autograd.grad(y_TD.sum(), leaves)
    assert all(map(torch.equal, before, held))


@maps
def test_the_backward_pass_gives_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, asked = the_kernel(), []
    right = kernel.backward

    def backward(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["give_back"])
        return right(*args, **kwargs)

    monkeypatch.setattr(kernel, "backward", backward)
    for again in (True, False):
        y_TD, leaves = passed()
        torch.autograd.grad(y_TD.sum(), leaves, retain_graph=again)
    assert asked == [False, True]
