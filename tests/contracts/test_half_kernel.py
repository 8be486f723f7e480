"""The compiled pass in bfloat16 by the processor's matrix unit: as exact as its rounding, whatever the routing."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contracts.test_fused_cpu import all_to_one, drawn, drawn_experts, run, threads
from turnout import MoE
from turnout.contracts import ExpertBackend
from turnout.dispatch import LocalDispatcher
from turnout.experts import FFNExperts, available_backends, choose_backend
from turnout.experts.fused_cpu import half_by_matrix_unit
from turnout.kernels import KINDS, Kernel, half_proof, trusted_kernel
from turnout.kernels.half_proof import prove_half, whole_number_error
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
    """Of the same rounded values in float64: within the step of bfloat16 at the largest output."""
    x_TD, experts = x_TD.bfloat16(), experts.bfloat16()
    got_TD = infer(experts, x_TD, assignment, keep_N=keep_N)
    wide = FFNExperts(
        experts.dim, experts.hidden, experts.num_experts, kind=experts.kind, bias=experts.up_bias_EG is not None
    ).double()
    wide.load_state_dict(experts.state_dict())
    want_TD = run("loop", wide, x_TD.double(), assignment, keep_N)[0].detach()
    assert got_TD.dtype == torch.bfloat16
    assert got_TD.shape == want_TD.shape
    if want_TD.numel():
        assert float((got_TD.double() - want_TD).abs().max()) < 2**-7 * max(1.0, float(want_TD.abs().max()))


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


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 16, 17, 33, 65, 257])
@pytest.mark.parametrize("k", [1, 3])
def test_any_number_of_tokens_works(kernel: Kernel, num_tokens: int, k: int) -> None:
    experts = drawn_experts(20, 24, 3, bias=True)
    assert_near_the_oracle(experts, torch.randn(num_tokens, 20), drawn(num_tokens, 3, k))


def test_one_expert_taking_all_leaves_others_without_rows(kernel: Kernel) -> None:
    assert_near_the_oracle(drawn_experts(40, 48, 3, bias=True), torch.randn(1500, 40), all_to_one(1500, 3))


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
def test_rows_that_do_not_fit_the_buffer_at_once_are_summed_in_float(kernel: Kernel) -> None:
    """16,384 tokens with 8 choices of width 80: ten million numbers, where two halves of four million are kept."""
    with threads(2):
        assert_near_the_oracle(drawn_experts(80, 8, 32), torch.randn(16_384, 80), drawn(16_384, 32, 8))


@pytest.mark.parametrize("num_tokens", [3, 200])
def test_ten_runs_on_two_threads_are_equal_bit_for_bit(kernel: Kernel, num_tokens: int) -> None:
    experts, assignment = drawn_experts(96, 80, 4).bfloat16(), drawn(num_tokens, 4, 3)
    x_TD = torch.randn(num_tokens, 96).bfloat16()
    first = infer(experts, x_TD, assignment)
    with threads(2):
        assert all(torch.equal(first, infer(experts, x_TD, assignment)) for _ in range(10))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_spoils_its_own_token_alone(kernel: Kernel, value: float) -> None:
    experts, assignment, x_TD = drawn_experts(96, 80, 2).bfloat16(), drawn(130, 2, 2), torch.randn(130, 96).bfloat16()
    want_TD = infer(experts, x_TD, assignment)
    x_TD[7, 70] = value
    got_TD = infer(experts, x_TD, assignment)
    assert not got_TD[7].isfinite().any()
    others_T = torch.arange(130) != 7
    assert torch.equal(got_TD[others_T], want_TD[others_T])


def test_a_layer_takes_it_in_inference_and_torchs_products_in_training(kernel: Kernel) -> None:
    layer, x = MoE(32, 48, 4).bfloat16(), torch.randn(100, 32).bfloat16()
    with torch.no_grad():
        assert choose_backend(layer.experts, "auto", dtype=x.dtype, device=CPU) is ExpertBackend.TABLE["fused_cpu"]
        inferred = layer(x).y
    refused = available_backends(layer.experts, dtype=x.dtype, device=CPU)["fused_cpu"]
    assert "multiplies bfloat16 itself; fused_cpu does so under torch.no_grad() alone" in refused
    assert torch.allclose(layer(x).y.float(), inferred.float(), atol=0.02)


def test_a_pass_that_is_wrong_is_not_trusted(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    right, factor = kernel.forward, 1 + 2**-6

    def wrong(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return right(*args, **kwargs)[0] * factor, None

    monkeypatch.setattr(half_proof, "SIZES", half_proof.SIZES[-2:])
    monkeypatch.setattr(kernel, "forward", wrong)
    assert prove_half(kernel).startswith("the compiled kernel's pass in bfloat16 is off the oracle by ")
    factor = torch.nan
    assert prove_half(kernel).startswith("the compiled kernel's pass in bfloat16 is off the oracle by nan")


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
    assert reason.endswith("; inference in bfloat16 by others: AMX is switched off by TURNOUT_AMX=0")
    with torch.no_grad():
        assert MoE(8, 16, 2).bfloat16()(torch.randn(5, 8).bfloat16()).y.isfinite().all()
