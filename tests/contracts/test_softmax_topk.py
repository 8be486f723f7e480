"""Softmax routing in one compiled pass gives what torch's operators give, forward and backward."""

import pytest
import torch
from torch import Tensor

from tests.contracts.test_fused_cpu import with_kernel
from turnout.errors import ConfigError
from turnout.kernels import Kernel, proof, trusted_kernel
from turnout.routers import TopK
from turnout.routers.softmax_topk import softmax_topk
from turnout.tensors import Assignment, RouterInput

pytestmark = with_kernel


def routed(logits_RE: Tensor, k: int, *, renormalize: bool) -> tuple[Assignment, Tensor]:
    """Rows are every second token of twice as many."""
    tokens = RouterInput(
        x_RD=logits_RE,
        token_ids_R=None,
        token_R=torch.arange(len(logits_RE)) * 2,
        num_tokens=2 * len(logits_RE),
        generator=None,
        top_k=None,
    )
    found = softmax_topk(logits_RE, tokens, k, renormalize=renormalize)
    assert found is not None
    return found


@pytest.mark.parametrize("num_rows", [0, 1, 3, 1300])
@pytest.mark.parametrize(("num_experts", "k"), [(1, 1), (2, 2), (5, 3), (16, 1), (17, 4), (128, 8)])
@pytest.mark.parametrize("renormalize", [False, True])
def test_it_is_what_float64_says(num_rows: int, num_experts: int, k: int, renormalize: bool) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    logits_RE = (4 * torch.randn(num_rows, num_experts, generator=generator)).requires_grad_()
    wide_RE = logits_RE.detach().double().requires_grad_()
    assignment, scores_RE = routed(logits_RE, k, renormalize=renormalize)
    expert_RK = logits_RE.detach().sort(dim=1, descending=True, stable=True).indices[:, :k]
    want_RE = wide_RE.softmax(dim=1)
    weight_RK = wide_RE.gather(1, expert_RK).softmax(dim=1) if renormalize else want_RE.gather(1, expert_RK)
    assert torch.equal(assignment.expert_N, expert_RK.flatten())
    assert torch.equal(assignment.token_N, (torch.arange(num_rows) * 2).repeat_interleave(k))
    assert torch.equal(assignment.choice_N, torch.arange(k).repeat(num_rows))
    assert torch.allclose(scores_RE.double(), want_RE, atol=1e-6)
    assert torch.allclose(assignment.weight_N.double(), weight_RK.flatten(), atol=1e-6)
    grads = [torch.randn(tensor.shape, generator=generator) for tensor in (scores_RE, assignment.weight_N)]
    for used in ([0], [1], [0, 1]):
        got = [(scores_RE, assignment.weight_N)[i] for i in used]
        want = [(want_RE, weight_RK.flatten())[i] for i in used]
        (got_RE,) = torch.autograd.grad(got, logits_RE, [grads[i] for i in used], retain_graph=True)
        (right_RE,) = torch.autograd.grad(want, wide_RE, [grads[i].double() for i in used], retain_graph=True)
        assert torch.allclose(got_RE.double(), right_RE, atol=4e-6)


def test_a_token_that_is_not_finite_spoils_its_own_row_alone() -> None:
    logits_RE = torch.randn(40, 20, generator=torch.Generator().manual_seed(0))
    assignment, scores_RE = routed(logits_RE, 2, renormalize=True)
    logits_RE[7, 18], logits_RE[9] = torch.nan, -torch.inf
    spoilt, spoilt_RE = routed(logits_RE, 2, renormalize=True)
    assert spoilt_RE[[7, 9]].isnan().all()
    others_R = ~torch.isin(torch.arange(40), torch.tensor([7, 9]))
    assert torch.equal(spoilt_RE[others_R], scores_RE[others_R])
    assert torch.equal(spoilt.expert_N.view(40, 2)[others_R], assignment.expert_N.view(40, 2)[others_R])


def test_an_expert_that_is_ruled_out_has_a_share_of_exactly_zero() -> None:
    logits_RE = torch.randn(8, 20, generator=torch.Generator().manual_seed(0))
    logits_RE[:, [3, 19]] = -torch.inf
    _, scores_RE = routed(logits_RE, 2, renormalize=False)
    assert not scores_RE[:, [3, 19]].any()
    assert torch.allclose(scores_RE, logits_RE.softmax(dim=1), atol=1e-6)


def test_float64_and_many_choices_are_left_to_torch() -> None:
    torch.manual_seed(0)
    router, x_TD = TopK(k=2).build(16, 20), torch.randn(30, 16)
    got, want = router(x_TD), router.double()(x_TD.double())
    assert want.scores_RE.dtype == torch.float64
    assert torch.allclose(got.scores_RE.double(), want.scores_RE, atol=1e-6)
    assert torch.equal(got.assignment.expert_N, want.assignment.expert_N)
    assert torch.equal(
        router.float()(x_TD, top_k=9).assignment.expert_N.view(30, 9)[:, 0], got.assignment.expert_N[::2]
    )


def test_second_derivatives_are_refused() -> None:
    logits_RE = torch.randn(5, 4, requires_grad=True)
    _, scores_RE = routed(logits_RE, 1, renormalize=False)
    with pytest.raises(ConfigError, match="create_graph=True"):
        torch.autograd.grad(scores_RE.square().sum(), logits_RE, create_graph=True)


def test_a_kernel_whose_gradient_is_wrong_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = trusted_kernel()
    assert isinstance(kernel, Kernel)
    right = kernel.choose_backward
    monkeypatch.setattr(proof, "SIZES", proof.SIZES[-1:])
    monkeypatch.setattr(kernel, "choose_backward", lambda *a, **k: right(*a, **k) * 1.001)
    assert proof.prove(kernel).startswith("the compiled kernel is off the oracle by ")
