"""Memory of what was saved for a backward pass goes back only where nobody can read it again."""

import itertools
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contracts.test_fused_cpu import drawn, drawn_experts, with_kernel
from turnout.contracts import ExpertBackend
from turnout.dispatch import LocalDispatcher
from turnout.experts import fused_cpu, fused_op
from turnout.experts.fused_op import kernel_weights, the_kernel
from turnout.layers.expert_pass import pass_experts
from turnout.tensors import Admission

# 41 MiB of values before the activation, in blocks of several pages
TOKENS, DIM, HIDDEN = 2600, 8, 2048
pytestmark = with_kernel


@pytest.fixture(params=["vectors", "matrix unit"], autouse=True)
def unit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both passes, whatever the size of the experts."""
    monkeypatch.setattr(fused_op, "LEAST_IN_PARTS", 0 if request.param == "matrix unit" else 1 << 30)


@pytest.fixture
def as_if_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this process's allocator has in its heap by now."""
    monkeypatch.setattr(fused_cpu, "mapped_bytes", itertools.count(step=1 << 30).__next__)


def passed() -> tuple[Tensor, list[Tensor]]:
    """An output of the compiled pass, and the leaves it has gradients for."""
    experts, assignment = drawn_experts(DIM, HIDDEN, 3), drawn(TOKENS, 3, 1)
    x_TD = torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(0)).requires_grad_()
    admission = Admission(keep_N=None, capacity=None, dropped_E={})
    backend = ExpertBackend.TABLE["fused_cpu"]
    y_TD = pass_experts(experts, backend, x_TD, assignment, admission, dispatcher=LocalDispatcher())
    return y_TD, [x_TD, assignment.weight_N, *experts.parameters()]


def test_what_was_read_is_zero_afterwards_and_the_gradients_are_the_same() -> None:
    experts, assignment = drawn_experts(DIM, HIDDEN, 3), drawn(TOKENS, 3, 1)
    kernel = the_kernel(torch.float32, experts.down_EFD)
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


def test_what_lies_beside_it_stays() -> None:
    experts, assignment = drawn_experts(DIM, HIDDEN, 3), drawn(TOKENS, 3, 1)
    kernel = the_kernel(torch.float32, experts.down_EFD)
    weights = kernel_weights(experts.up_EDG.detach(), experts.down_EFD.detach(), None, None, "swiglu")
    x_TD, routing, weight_N = torch.randn(TOKENS, DIM), kernel.sort(assignment, None), assignment.weight_N.detach()
    size = kernel.saved_size(weights, TOKENS, torch.float32)
    around = torch.ones(3 * size)
    saved = around[size : 2 * size]
    wanted = (True,) * 4 + (False,) * 2
    kernel.backward(x_TD, x_TD, weight_N, weights, routing, saved, wanted=wanted, give_back=True)
    assert float((saved == 0).float().mean()) > 0.98
    assert bool((around[:size] == 1).all())
    assert bool((around[2 * size :] == 1).all())


@pytest.mark.usefixtures("as_if_mapped")
def test_a_graph_that_is_kept_can_be_passed_again() -> None:
    y_TD, leaves = passed()
    assert y_TD.grad_fn is not None
    assert vars(y_TD.grad_fn)["may_give_back"], "otherwise this shows nothing"
    passes = [torch.autograd.grad(y_TD.sum(), leaves, retain_graph=again) for again in (True, True, False)]
    assert all(torch.equal(a, b) for other in passes[1:] for a, b in zip(passes[0], other, strict=True))


@pytest.mark.usefixtures("as_if_mapped")
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


@pytest.mark.usefixtures("as_if_mapped")
def test_the_backward_pass_gives_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, asked = the_kernel(torch.float32, drawn_experts(DIM, HIDDEN, 3).down_EFD), []
    right = kernel.backward

    def backward(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["give_back"])
        return right(*args, **kwargs)

    monkeypatch.setattr(kernel, "backward", backward)
    for again in (True, False):
        y_TD, leaves = passed()
        torch.autograd.grad(y_TD.sum(), leaves, retain_graph=again)
    assert asked == [False, True]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks glibc")
def test_an_allocator_that_keeps_memory_maps_none() -> None:
    program = """
import torch
from turnout.cli.process import keep_memory
from turnout.kernels.consumed import mapped_bytes
def grown():
    before = mapped_bytes()
    held = torch.empty(64 << 20, dtype=torch.uint8)
    return mapped_bytes() - before >= held.nbytes
print(grown(), keep_memory() and not grown())
"""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "LD_PRELOAD"))}
    done = subprocess.run([sys.executable, "-c", program], env=own, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]
