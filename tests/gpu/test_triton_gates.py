"""The router's kernels against float64, on a GPU or in the interpreter: what logits can do to them."""

import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from turnout import MoE, routers
from turnout.errors import ConfigError
from turnout.experts import fused_triton_op
from turnout.kernels.gpu import choose, gates_proof, order, proof
from turnout.kernels.gpu.choose import Gate
from turnout.kernels.gpu.configs import counted_rows
from turnout.losses import LoadBalance
from turnout.routers import DeepSeekV3, TopK, triton_gates
from turnout.routers.triton_gates import triton_topk
from turnout.tensors import Assignment, RouterInput, total_loss

GATES = [(False, False), (False, True), (True, False), (True, True)]  # sigmoid, renormalize


def routed(
    logits_RE: Tensor, k: int, *, sigmoid: bool = False, renormalize: bool = True, bias_E: Tensor | None = None
) -> tuple[Assignment, Tensor]:
    """Rows are every second token of twice as many."""
    tokens = RouterInput(
        x_RD=logits_RE,
        token_ids_R=None,
        token_R=torch.arange(len(logits_RE), device=logits_RE.device) * 2,
        num_tokens=2 * len(logits_RE),
        generator=None,
    )
    found = triton_topk(logits_RE, tokens, k, sigmoid=sigmoid, renormalize=renormalize, scale=2.5, bias_E=bias_E)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("num_rows", "num_experts", "k"), [(0, 5, 2), (1, 1, 1), (3, 17, 16), (130, 128, 8), (70, 260, 1)]
)
@pytest.mark.parametrize(("sigmoid", "renormalize"), GATES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_it_is_what_float64_says(
    num_rows: int, num_experts: int, k: int, sigmoid: bool, renormalize: bool, has_bias: bool, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    logits_RE = 4 * torch.randn(num_rows, num_experts, generator=generator)
    bias_E = torch.randn(num_experts, generator=generator) if has_bias else None
    wide_RE, own_RE = logits_RE.double().requires_grad_(), logits_RE.to(device).requires_grad_()
    own_bias_E = None if bias_E is None else bias_E.to(device)
    assignment, scores_RE = routed(own_RE, k, sigmoid=sigmoid, renormalize=renormalize, bias_E=own_bias_E)
    gate = Gate(k=k, sigmoid=sigmoid, renormalize=renormalize, scale=2.5)
    # the choice itself is by float32 numbers
    expert_N = gates_proof.by_float64(logits_RE, bias_E, gate)[2]
    want_RE, want_N, wide_N = gates_proof.by_float64(wide_RE, None if bias_E is None else bias_E.double(), gate)
    assert torch.equal(expert_N, wide_N)
    assert torch.equal(assignment.expert_N.cpu(), expert_N)
    assert torch.equal(assignment.token_N.cpu(), (torch.arange(num_rows) * 2).repeat_interleave(k))
    assert torch.equal(assignment.choice_N.cpu(), torch.arange(k).repeat(num_rows))
    assert assignment.count_BE is not None
    assert torch.equal(assignment.counts_E.cpu(), torch.bincount(expert_N, minlength=num_experts))
    assert torch.allclose(scores_RE.cpu().double(), want_RE, atol=1e-6)
    assert torch.allclose(assignment.weight_N.cpu().double(), want_N, atol=2e-6)
    grads = [torch.randn(tensor.shape, generator=generator) for tensor in (want_RE, want_N)]
    for used in ([0], [1], [0, 1]):
        got = [(scores_RE, assignment.weight_N)[i] for i in used]
        want = [(want_RE, want_N)[i] for i in used]
        (got_RE,) = torch.autograd.grad(got, own_RE, [grads[i].to(device) for i in used], retain_graph=True)
        (right_RE,) = torch.autograd.grad(want, wide_RE, [grads[i].double() for i in used], retain_graph=True)
        assert torch.allclose(got_RE.cpu().double(), right_RE, atol=1e-5)


def test_of_equals_the_lower_index_is_chosen_and_none_twice(device: torch.device) -> None:
    logits_RE = torch.tensor([[1.0, 3, 3, 0, 3], [0.0, -0.0, 0, -0.0, 0], [-torch.inf] * 5], device=device)
    assignment, scores_RE = routed(logits_RE, 4)
    assert assignment.expert_N.view(3, 4).tolist() == [[1, 2, 4, 0], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert scores_RE[2].isnan().all()
    assert not scores_RE[:2].isnan().any()


@pytest.mark.parametrize("sigmoid", [False, True])
def test_a_token_that_is_not_finite_spoils_its_own_row_alone(sigmoid: bool, device: torch.device) -> None:
    logits_RE = torch.randn(40, 20, generator=torch.Generator().manual_seed(0)).to(device)
    assignment, scores_RE = routed(logits_RE, 2, sigmoid=sigmoid)
    logits_RE[7, 18], logits_RE[8, 3], logits_RE[9] = torch.nan, -torch.nan, -torch.inf
    spoilt, spoilt_RE = routed(logits_RE, 2, sigmoid=sigmoid)
    assert spoilt_RE[7:10].isnan().all()
    assert spoilt.weight_N.view(40, 2)[7:10].isnan().all()
    # NaN is higher than everything, as for torch's argmax
    assert spoilt.expert_N.view(40, 2)[7:9, 0].tolist() == [18, 3]
    others_R = torch.tensor([row not in (7, 8, 9) for row in range(40)], device=device)
    assert torch.equal(spoilt_RE[others_R], scores_RE[others_R])
    assert torch.equal(spoilt.expert_N.view(40, 2)[others_R], assignment.expert_N.view(40, 2)[others_R])


def test_an_expert_that_is_ruled_out_has_a_share_of_exactly_zero(device: torch.device) -> None:
    logits_RE = torch.randn(8, 20, generator=torch.Generator().manual_seed(0)).to(device)
    logits_RE[:, [3, 19]] = -torch.inf
    for sigmoid in (False, True):
        _, scores_RE = routed(logits_RE, 2, sigmoid=sigmoid)
        assert not scores_RE[:, [3, 19]].any()
        assert torch.allclose(scores_RE.sum(dim=1).cpu(), torch.ones(8))


def test_what_it_cannot_do_is_left_to_torch(device: torch.device) -> None:
    tokens = RouterInput(
        x_RD=torch.empty(0, 1), token_ids_R=None, token_R=torch.arange(0), num_tokens=0, generator=None
    )
    for logits_RE, k in ((torch.randn(4, 5).double(), 2), (torch.randn(4, 20), 17), (torch.randn(2, 1025), 1)):
        assert triton_topk(logits_RE.to(device), tokens, k, renormalize=False) is None


def test_second_derivatives_are_refused(device: torch.device) -> None:
    logits_RE = torch.randn(5, 4, device=device, requires_grad=True)
    _, scores_RE = routed(logits_RE, 1, renormalize=False)
    with pytest.raises(ConfigError, match="create_graph=True"):
        torch.autograd.grad(scores_RE.square().sum(), logits_RE, create_graph=True)


@pytest.mark.parametrize("has_bias", [False, True])
def test_the_operator_is_what_its_fake_says(has_bias: bool, device: torch.device) -> None:
    logits_RE = torch.randn(70, 6, device=device, requires_grad=True)
    bias_E = torch.zeros(6, device=device) if has_bias else None
    torch.library.opcheck(
        triton_gates.triton_gates,
        (logits_RE, torch.arange(70, device=device), bias_E, 2, True, True, 2.5),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static"),
    )


@pytest.mark.parametrize(("num_tokens", "k"), [(300, 2), (129, 3), (45, 8), (500, 1)])
def test_counts_that_are_handed_on_give_the_order_that_counting_gives(
    num_tokens: int, k: int, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(k)
    assignment, _ = routed(torch.randn(num_tokens, 11, generator=generator).to(device), k)
    rest = {"num_tokens": 2 * num_tokens, "num_experts": 11, "rows": 16, "top_k": k}
    inputs = (assignment.expert_N, assignment.token_N, None)
    want = order.sort(*inputs, **rest)
    count_BE = assignment.count_BE
    assert count_BE is not None
    assert len(count_BE) == -(-num_tokens // counted_rows(k))
    before_BE = count_BE.clone()
    got = order.sort(*inputs, **rest, count_BE=count_BE)
    assert all(map(torch.equal, got, want))
    assert torch.equal(count_BE, before_BE)


def test_counts_of_other_choices_are_not_handed_on(device: torch.device) -> None:
    assignment, _ = routed(torch.randn(9, 4, device=device), 2)
    moved = replace(assignment, expert_N=3 - assignment.expert_N)
    assert moved.count_BE is None
    assert torch.equal(moved.counts_E, assignment.counts_E.flip(0))
    assert replace(assignment, weight_N=2 * assignment.weight_N).count_BE is not None


@pytest.fixture
def without_the_cpus_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the interpreter's turn comes."""
    for module in (routers.softmax_topk, routers.pieces):
        monkeypatch.setattr(module, "kernel_for", lambda rows: None)


@pytest.mark.parametrize(
    "router",
    [TopK(k=2), TopK(k=2, activation="sigmoid", scale=1.5), TopK(k=3, renormalize=False, bias=True), DeepSeekV3(k=2)],
    ids=["mixtral", "sigmoid", "olmoe", "deepseek_v3"],
)
def test_a_layer_by_kernels_alone_equals_the_loop_with_its_router(
    router: TopK | DeepSeekV3,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    without_the_cpus_kernel: None,
) -> None:
    monkeypatch.setattr(fused_triton_op, "config_for", lambda shape, size: proof.CONFIG)
    called: list[object] = []
    right: Callable[..., object] = choose.choose
    monkeypatch.setattr(choose, "choose", lambda *given: called.append(given) or right(*given))
    torch.manual_seed(0)
    reference = MoE(20, 12, 5, router=router, backend="loop").double()
    layer = MoE(20, 12, 5, router=router, backend="fused_triton").to(device)
    layer.load_state_dict(reference.state_dict())
    x = torch.randn(2, 80, 20, generator=torch.Generator().manual_seed(2))
    mask = torch.rand(2, 80, generator=torch.Generator().manual_seed(3)) < 0.9
    results = []
    for module, value in ((layer, x.to(device)), (reference, x.double())):
        leaf = value.requires_grad_()
        out = module(leaf, mask=mask.to(value.device))
        loss = out.y.square().sum() + total_loss(out.losses)
        results.append([out.y, *torch.autograd.grad(loss, [leaf, *module.parameters()])])
        results[-1] += [out.stats.assigned_E, out.stats.entropy_sum, out.stats.margin_sum]
    assert called
    for got, want in zip(*([each.detach() for each in result] for result in results), strict=True):
        scale = float(want.double().abs().max().clamp(min=1))
        assert float((got.cpu().double() - want).abs().max()) < 1e-5 * scale


def test_torch_compile_takes_router_and_experts_in_one_graph(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, without_the_cpus_kernel: None
) -> None:
    monkeypatch.setattr(fused_triton_op, "config_for", lambda shape, size: proof.CONFIG)
    torch.manual_seed(0)
    # before Python 3.12 a cached property, as counts are for losses, has a lock, which cannot be compiled
    losses = (LoadBalance(),) if sys.version_info >= (3, 12) else ()
    layer = MoE(20, 12, 5, router=TopK(k=3), losses=losses, backend="fused_triton").to(device)

    def graph(x_TD: Tensor) -> Tensor:
        out = layer(x_TD)
        return out.y + total_loss(out.losses)

    results = []
    for function in (graph, torch.compile(graph, backend="aot_eager", fullgraph=True)):
        x_TD = torch.randn(100, 20, generator=torch.Generator().manual_seed(4)).to(device).requires_grad_()
        y_TD = function(x_TD)
        results.append([y_TD, *torch.autograd.grad(y_TD.square().sum(), [x_TD, *layer.parameters()])])
    for got, want in zip(*results, strict=True):
        assert torch.allclose(got, want, atol=1e-6)


def test_kernels_that_are_wrong_are_not_trusted(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    which = (False, True, device)
    assert gates_proof.prove(*which) == ""
    monkeypatch.setattr(gates_proof, "SIZES", gates_proof.SIZES[-1:])
    right_grad, right = gates_proof.choose_backward, gates_proof.choose
    with monkeypatch.context() as patched:
        patched.setattr(gates_proof, "choose_backward", lambda *given: right_grad(*given) * 1.001)
        assert "are off float64 by " in gates_proof.prove(*which)
        patched.setattr(gates_proof, "choose_backward", lambda *given: right_grad(*given) * torch.nan)
        assert "are off float64 by nan" in gates_proof.prove(*which)

    def other_counts(*given: object) -> object:
        chosen, count_BE = right(*given)  # type: ignore[arg-type]
        return chosen, count_BE + 1

    monkeypatch.setattr(gates_proof, "choose", other_counts)
    assert "are off float64 by inf" in gates_proof.prove(*which)
