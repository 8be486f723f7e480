"""The compiled pass in bfloat16 by the processor's matrix unit: as exact as its rounding, whatever the routing."""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contracts.test_fused_cpu import all_to_one, drawn, drawn_experts, run, threads
from turnout import MoE
from turnout.contracts import ExpertBackend
from turnout.dispatch import LocalDispatcher
from turnout.experts import FFNExperts, choose_backend
from turnout.experts.fused_op import half_by_matrix_unit
from turnout.kernels import KINDS, Kernel, half_proof, trusted_kernel
from turnout.kernels.arguments import Weights
from turnout.kernels.half_proof import prove_half, whole_number_error
from turnout.kernels.proof import assignment_of
from turnout.layers.expert_pass import pass_experts
from turnout.tensors import Admission, Assignment
from turnout.train.doctor import examine

CPU = torch.device("cpu")


@pytest.fixture
def kernel() -> Kernel:
    """Its memory is NaN."""
    found = half_by_matrix_unit()
    if isinstance(found, str):
        pytest.skip(found)
    found.poison()
    return found


@torch.no_grad()
def infer(experts: FFNExperts, x_TD: Tensor, assignment: Assignment, *, keep_N: Tensor | None = None) -> Tensor:
    admission = Admission(keep_N=keep_N, capacity=None, dropped_E={})
    backend = ExpertBackend.TABLE["fused_cpu"]
    return pass_experts(experts, backend, x_TD, assignment, admission, dispatcher=LocalDispatcher())


def assert_near_the_oracle(
    experts: FFNExperts, x_TD: Tensor, assignment: Assignment, *, keep_N: Tensor | None = None
) -> None:
    """Of the same rounded values in float64: within the step of bfloat16 at the largest output, two for gradients."""
    x_TD, experts = x_TD.bfloat16(), experts.bfloat16()
    got = [infer(experts, x_TD, assignment, keep_N=keep_N), *run("fused_cpu", experts, x_TD, assignment, keep_N)]
    wide = FFNExperts(
        experts.dim, experts.hidden, experts.num_experts, kind=experts.kind, bias=experts.up_bias_EG is not None
    ).double()
    wide.load_state_dict(experts.state_dict())
    want = run("loop", wide, x_TD.double(), assignment, keep_N)
    leaves = (x_TD, x_TD, x_TD, assignment.weight_N, *experts.parameters())
    for index, (a, b, leaf) in enumerate(zip(got, [want[0], *want], leaves, strict=True)):
        assert a.dtype == leaf.dtype
        assert a.shape == b.shape
        if b.numel():
            tolerance = (2**-7 if index < 2 else 2**-6) * max(1.0, float(b.detach().abs().max()))
            assert float((a.double() - b).detach().abs().max()) < tolerance


def test_it_is_near_the_oracle_and_exact_in_whole_numbers(kernel: Kernel) -> None:
    assert prove_half(kernel) == ""


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("sizes", [(257, 131, 77, 3, 2), (700, 33, 600, 2, 2), (160, 256, 64, 8, 1)], ids=str)
def test_whole_numbers_are_exact(kernel: Kernel, sizes: tuple[int, ...], num_threads: int) -> None:
    with threads(num_threads):
        assert whole_number_error(kernel, sizes) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dim", "hidden"), [(1, 1), (31, 33), (64, 257), (300, 70), (512, 256), (257, 544)])
def test_any_width_works_with_and_without_bias(kernel: Kernel, dim: int, hidden: int, kind: str) -> None:
    for bias, num_threads in ((False, 1), (True, 2)):
        experts = drawn_experts(dim, hidden, 4, kind=kind, bias=bias)
        with threads(num_threads):
            assert_near_the_oracle(experts, torch.randn(157, dim), drawn(157, 4, 2))


def test_large_and_odd_sizes_work(kernel: Kernel) -> None:
    assert_near_the_oracle(drawn_experts(433, 1100, 2, bias=True), torch.randn(300, 433), drawn(300, 2, 1))


@pytest.mark.parametrize("num_threads", [3, 8, 16])
def test_any_number_of_threads_computes_the_same_bit_for_bit(kernel: Kernel, num_threads: int) -> None:
    experts, assignment = drawn_experts(40, 300, 3, kind="gelu", bias=True), all_to_one(3500, 3)
    x_TD = torch.randn(3500, 40)
    with threads(num_threads):
        assert_near_the_oracle(experts, x_TD, assignment)
        passed = run("fused_cpu", experts, x_TD.bfloat16(), assignment)
    assert all(map(torch.equal, passed, run("fused_cpu", experts, x_TD.bfloat16(), assignment)))


def test_threads_that_find_no_room_for_sums_in_float_share_those_there_are(kernel: Kernel) -> None:
    """Four experts of 16 MiB in bfloat16, in two blocks each: two are summed at a time."""
    dim, hidden, num_tokens = 2048, 2048, 4 * 516
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator)
    up_EDG, down_EFD = (draw(size).bfloat16() * 0.02 for size in ((4, dim, hidden), (4, hidden, dim)))
    weights = Weights(up_EDG=up_EDG, down_EFD=down_EFD, up_bias_EG=None, down_bias_ED=None, kind="gelu")
    assignment = assignment_of(torch.rand(num_tokens), torch.arange(num_tokens).view(-1, 1) % 4, 4)
    x_TD, routing = draw(num_tokens, dim).bfloat16(), kernel.sort(assignment, None)
    y_TD, saved = kernel.forward(x_TD, assignment.weight_N, weights, routing, saved_rows=num_tokens)
    assert saved is not None
    passed = []
    for num_threads in (1, 4, 9):
        kernel.poison()
        with threads(num_threads):
            wanted = (True,) * 4 + (False,) * 2
            passed.append(kernel.backward(y_TD, x_TD, assignment.weight_N, weights, routing, saved, wanted=wanted)[:4])
    for other in passed[1:]:
        assert all(map(torch.equal, passed[0], other))


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 16, 17, 33, 65, 257])
@pytest.mark.parametrize("k", [1, 3])
def test_any_number_of_tokens_works(kernel: Kernel, num_tokens: int, k: int) -> None:
    experts = drawn_experts(20, 24, 3, bias=True)
    assert_near_the_oracle(experts, torch.randn(num_tokens, 20), drawn(num_tokens, 3, k))


def test_one_expert_taking_all_leaves_others_without_rows(kernel: Kernel) -> None:
    experts, x_TD, assignment = drawn_experts(40, 48, 3, bias=True), torch.randn(1500, 40), all_to_one(1500, 3)
    for num_threads in (1, 2):
        with threads(num_threads):
            assert_near_the_oracle(experts, x_TD, assignment)
    _, _, _, *grads = run("fused_cpu", experts, x_TD.bfloat16(), assignment)
    assert all(not grad[:2].any() and grad[2].any() for grad in grads)


def test_dropped_tokens_are_exactly_zero(kernel: Kernel) -> None:
    experts, x_TD, assignment = drawn_experts(33, 40, 3), torch.randn(190, 33), drawn(190, 3, 2)
    keep_N = torch.rand(380, generator=torch.Generator().manual_seed(3)) < 0.5
    assert_near_the_oracle(experts, x_TD, assignment, keep_N=keep_N)
    y_TD = infer(experts.bfloat16(), x_TD.bfloat16(), assignment, keep_N=keep_N)
    assert not y_TD[~keep_N.view(190, 2).any(dim=1)].any()
    single_N = torch.arange(190) % 3 > 0
    y_TD = infer(experts, x_TD.bfloat16(), drawn(190, 3, 1), keep_N=single_N)
    assert not y_TD[~single_N].any()
    assert y_TD[single_N].any(dim=1).all()


@pytest.mark.slow
@pytest.mark.parametrize("num_threads", [2, 33])
def test_rows_that_do_not_fit_the_buffer_at_once_are_summed_in_float(kernel: Kernel, num_threads: int) -> None:
    """16,384 tokens with 8 choices of width 80: ten million numbers, where two halves of four million are kept."""
    with threads(num_threads):
        assert_near_the_oracle(drawn_experts(80, 8, 32), torch.randn(16_384, 80), drawn(16_384, 32, 8))


@pytest.mark.parametrize("num_tokens", [3, 200])
def test_ten_runs_on_two_threads_are_equal_bit_for_bit(kernel: Kernel, num_tokens: int) -> None:
    experts, assignment = drawn_experts(96, 80, 4).bfloat16(), drawn(num_tokens, 4, 3)
    x_TD = torch.randn(num_tokens, 96).bfloat16()
    first = infer(experts, x_TD, assignment)
    passed = run("fused_cpu", experts, x_TD, assignment)
    with threads(2):
        assert all(torch.equal(first, infer(experts, x_TD, assignment)) for _ in range(10))
        for _ in range(10):
            assert all(map(torch.equal, passed, run("fused_cpu", experts, x_TD, assignment)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_spoils_its_own_token_alone(kernel: Kernel, value: float) -> None:
    experts, assignment, x_TD = drawn_experts(96, 80, 2).bfloat16(), drawn(130, 2, 2), torch.randn(130, 96).bfloat16()
    want_TD = infer(experts, x_TD, assignment)
    x_TD[7, 70] = value
    got_TD = infer(experts, x_TD, assignment)
    assert not got_TD[7].isfinite().any()
    others_T = torch.arange(130) != 7
    assert torch.equal(got_TD[others_T], want_TD[others_T])


def test_a_layer_takes_it_in_inference_and_in_training(kernel: Kernel) -> None:
    layer, x = MoE(32, 48, 4, shared_hidden=16).bfloat16(), torch.randn(100, 32).bfloat16()
    for grad_is_enabled in (False, True):
        with torch.set_grad_enabled(grad_is_enabled):
            assert choose_backend(layer.experts, "auto", dtype=x.dtype, device=CPU) is ExpertBackend.TABLE["fused_cpu"]
    with torch.no_grad():
        inferred = layer(x).y
    y = layer(x).y
    assert torch.equal(y, inferred)
    y.float().square().sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.bfloat16
        assert parameter.grad.any()


def test_under_autocast_weights_of_float32_are_rounded_and_their_gradients_are_not(kernel: Kernel) -> None:
    layer, x = MoE(32, 48, 4), torch.randn(100, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x).y
        assert choose_backend(layer.experts, "auto", dtype=torch.bfloat16, device=CPU).layout == "ragged"
    half = MoE(32, 48, 4).bfloat16()
    half.load_state_dict(layer.state_dict())
    half.router.float().load_state_dict(layer.router.state_dict())
    assert torch.allclose(y.float(), half(x.bfloat16()).y.float(), atol=0.02)
    y.float().square().sum().backward()
    for parameter in layer.experts.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.any()


def test_with_tokens_of_float32_weights_are_widened(kernel: Kernel) -> None:
    experts, assignment, x_TD = drawn_experts(96, 80, 2).bfloat16(), drawn(130, 2, 2), torch.randn(130, 96)
    wide = drawn_experts(96, 80, 2)
    wide.load_state_dict(experts.state_dict())
    got_TD, want_TD = infer(experts, x_TD, assignment), infer(wide, x_TD, assignment)
    assert got_TD.dtype == torch.float32
    assert torch.allclose(got_TD, want_TD, atol=1e-5)


def test_only_what_is_wanted_is_computed(kernel: Kernel) -> None:
    experts, assignment = drawn_experts(70, 80, 3, bias=True).bfloat16(), drawn(90, 3, 2)
    admission, x_TD = Admission(keep_N=None, capacity=None, dropped_E={}), torch.randn(90, 70).bfloat16()
    everything = run("fused_cpu", experts, x_TD, assignment)[1:]
    leaves = [x_TD.requires_grad_(), assignment.weight_N, *experts.parameters()]
    y_grad_TD = torch.randn(90, 70, generator=torch.Generator().manual_seed(5), dtype=torch.float64).bfloat16()
    for leaf, want in zip(leaves, everything, strict=True):
        for other in leaves:
            other.requires_grad_(other is leaf)
        y_TD = pass_experts(
            experts, ExpertBackend.TABLE["fused_cpu"], x_TD, assignment, admission, dispatcher=LocalDispatcher()
        )
        assert torch.equal(torch.autograd.grad(y_TD, leaf, y_grad_TD)[0], want)


def test_a_pass_that_is_wrong_is_not_trusted(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    right, factor = kernel.forward, 1 + 2**-6

    def wrong(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        y_TD, saved = right(*args, **kwargs)
        return y_TD * factor, saved

    monkeypatch.setattr(half_proof, "SIZES", half_proof.SIZES[-2:])
    monkeypatch.setattr(kernel, "forward", wrong)
    assert prove_half(kernel).startswith("the compiled kernel's pass in bfloat16 is off the oracle by ")
    factor = torch.nan
    assert prove_half(kernel).startswith("the compiled kernel's pass in bfloat16 is off the oracle by nan")
    monkeypatch.setattr(kernel, "forward", right)
    assert prove_half(kernel) == ""
    back = kernel.backward

    def wrong_back(*args: Any, **kwargs: Any) -> Any:
        grads = back(*args, **kwargs)
        return grads._replace(down_EFD=grads.down_EFD * (1 + 2**-6))

    monkeypatch.setattr(kernel, "backward", wrong_back)
    assert prove_half(kernel).startswith("the compiled kernel's pass in bfloat16 is off the oracle by ")


@pytest.fixture
def asked_anew() -> Iterator[None]:
    half_by_matrix_unit.cache_clear()
    yield
    half_by_matrix_unit.cache_clear()


@pytest.mark.usefixtures("asked_anew")
def test_switched_off_another_backend_computes_and_doctor_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(trusted_kernel(), str):
        pytest.skip("no C++ compiler here")
    monkeypatch.setenv("TURNOUT_AMX", "0")
    assert half_by_matrix_unit() == "AMX is switched off by TURNOUT_AMX=0"
    reason = next(found.reason for found in examine()["backends"] if found.name == "fused_cpu")
    assert reason.endswith("; bfloat16 by others: AMX is switched off by TURNOUT_AMX=0")
    with torch.no_grad():
        assert MoE(8, 16, 2).bfloat16()(torch.randn(5, 8).bfloat16()).y.isfinite().all()
