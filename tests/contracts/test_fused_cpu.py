"""The compiled CPU kernel: sizes and loads the contract tests do not reach, and when it is trusted at all."""

import ctypes
import functools
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contracts.cases import takers
from turnout import MoE
from turnout.contracts import ExpertBackend
from turnout.dispatch import LocalDispatcher
from turnout.errors import ConfigError, ShapeError
from turnout.experts import FFNExperts, available_backends, fused_cpu, fused_op
from turnout.experts.fused_int8 import int8_by_matrix_unit, trusted_int8
from turnout.experts.fused_op import float_by_matrix_unit, half_by_matrix_unit
from turnout.kernels import KINDS, Kernel, build, proof, trusted_kernel
from turnout.kernels.arguments import FEW_ROWS
from turnout.kernels.build import compiled
from turnout.kernels.proof import once, prove, worst_error
from turnout.layers.expert_pass import pass_experts
from turnout.tensors import Admission, Assignment
from turnout.train.doctor import examine

CPU = torch.device("cpu")
HERE = LocalDispatcher()
with_kernel = pytest.mark.skipif("fused_cpu" not in takers(torch.float32), reason="no C++ compiler here")


@pytest.fixture(autouse=True)
def poisoned_workspace() -> None:
    """What earlier calls left in the kernel's memory is NaN."""
    kernel = trusted_kernel()
    if isinstance(kernel, Kernel):
        kernel.poison()


@pytest.fixture(params=["vectors", "matrix unit"])
def unit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Both that may multiply float32 here, the layers' own among them."""
    found = float_by_matrix_unit() if request.param == "matrix unit" else trusted_kernel()
    if isinstance(found, str):
        pytest.skip(found)
    monkeypatch.setattr(fused_op, "float_by_matrix_unit", lambda: found)
    monkeypatch.setattr(fused_op, "LEAST_IN_PARTS", 0)
    return found


def assignment_of(expert_N: Tensor, token_N: Tensor, *, num_tokens: int, num_experts: int) -> Assignment:
    generator = torch.Generator().manual_seed(len(expert_N))
    return Assignment(
        token_N=token_N,
        expert_N=expert_N,
        weight_N=torch.randn(len(expert_N), generator=generator).requires_grad_(),
        choice_N=torch.zeros_like(token_N),
        num_tokens=num_tokens,
        num_experts=num_experts,
    )


def drawn(num_tokens: int, num_experts: int, k: int) -> Assignment:
    """k different experts for each token."""
    generator = torch.Generator().manual_seed(num_tokens)
    expert_TK = torch.rand(num_tokens, num_experts, generator=generator).topk(k, dim=1).indices
    token_N = torch.arange(num_tokens).repeat_interleave(k)
    return assignment_of(expert_TK.flatten(), token_N, num_tokens=num_tokens, num_experts=num_experts)


def all_to_one(num_tokens: int, num_experts: int) -> Assignment:
    token_N = torch.arange(num_tokens)
    return assignment_of(
        torch.full_like(token_N, num_experts - 1), token_N, num_tokens=num_tokens, num_experts=num_experts
    )


def run(backend: str, experts: FFNExperts, x_TD: Tensor, assignment: Assignment, keep_N: Tensor | None = None):
    """Output and gradients of x, the assignment's weights and all parameters."""
    admission = Admission(keep_N=keep_N, capacity=None, dropped_E={})
    x_TD = x_TD.detach().requires_grad_()
    y_TD = pass_experts(
        experts, ExpertBackend.TABLE[backend], x_TD, assignment, admission, dispatcher=LocalDispatcher()
    )
    y_grad_TD = torch.randn(y_TD.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    leaves = [x_TD, assignment.weight_N, *experts.parameters()]
    return [y_TD, *torch.autograd.grad(y_TD, leaves, y_grad_TD.to(y_TD))]


@contextmanager
def threads(number: int) -> Iterator[None]:
    """For the kernel alone: the products of the loop, on two threads, would mostly wait for each other."""
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(1)


def assert_equals_the_loop(
    experts: FFNExperts,
    x_TD: Tensor,
    assignment: Assignment,
    *,
    keep_N: Tensor | None = None,
    num_threads: int = 1,
    backend: str = "fused_cpu",
) -> None:
    """Against float64, forward and backward; and forward alone, as in inference."""
    with threads(num_threads):
        got = run(backend, experts, x_TD, assignment, keep_N)
        with torch.no_grad():
            admission = Admission(keep_N=keep_N, capacity=None, dropped_E={})
            inferred = pass_experts(
                experts, ExpertBackend.TABLE[backend], x_TD, assignment, admission, dispatcher=LocalDispatcher()
            )
    wide = FFNExperts(
        experts.dim, experts.hidden, experts.num_experts, kind=experts.kind, bias=experts.up_bias_EG is not None
    ).double()
    wide.load_state_dict(experts.state_dict())
    want = run("loop", wide, x_TD.double(), assignment, keep_N)
    for a, b in zip([inferred, *got], [want[0], *want], strict=True):
        scale = max(1.0, float(b.detach().abs().max())) if b.numel() else 1.0
        assert a.shape == b.shape
        assert torch.allclose(a.double(), b.double(), rtol=0, atol=1e-5 * scale)


def drawn_experts(dim: int, hidden: int, num_experts: int, *, kind: str = "swiglu", bias: bool = False) -> FFNExperts:
    torch.manual_seed(dim)
    experts = FFNExperts(dim, hidden, num_experts, kind=kind, bias=bias, init_std=0.1)
    with torch.no_grad():
        for name, parameter in experts.named_parameters():
            if "bias" in name:
                parameter.normal_(std=0.5)
    return experts


def a_compiler() -> str:
    return next(found for name in ("g++", "c++", "clang++") if (found := shutil.which(name)))


def wrapped(path: Path, commands: str) -> str:
    """A program of these commands, which may be named as a compiler."""
    path.write_text(f"#!/bin/sh\n{commands}\n")
    path.chmod(0o755)
    return str(path)


def can_compile() -> bool:
    """Asked of the machine, not of the code that is to be tested."""
    vectors = {"avx2", "fma"} <= processor()
    return vectors and os.environ.get("TURNOUT_COMPILE") != "0" and any(map(shutil.which, ("g++", "c++", "clang++")))


@functools.cache
def processor() -> set[str]:
    try:
        return set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return set()


def grants_tiles() -> bool:
    """Whether there is AMX, and Linux lets this process use it."""
    if not {"amx_tile", "amx_bf16", "amx_int8", "avx512_bf16"} <= processor() or platform.machine() != "x86_64":
        return False
    arch_prctl, request, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request, tile_data) == 0


def test_where_there_is_a_compiler_the_kernel_is_trusted() -> None:
    """All tests of a kernel are skipped where it is not proven: without this a broken one would fail none."""
    if not can_compile():
        pytest.skip("no C++ compiler here, or no AVX2")
    for found in (trusted_kernel(), trusted_int8()):
        assert isinstance(found, Kernel), found
    proven = {found.name: found.proven for found in examine()["backends"]}
    assert proven["fused_cpu"]
    assert proven["fused_int8"]


def test_where_there_is_a_matrix_unit_every_pass_by_it_is_trusted() -> None:
    if not (can_compile() and grants_tiles()) or os.environ.get("TURNOUT_AMX") == "0":
        pytest.skip("no AMX here, or no compiler")
    for found in (float_by_matrix_unit(), half_by_matrix_unit(), int8_by_matrix_unit(), trusted_int8()):
        assert isinstance(found, Kernel), found
        assert found.matrix_unit


@with_kernel
def test_both_languages_mean_the_same_by_few_rows() -> None:
    library = compiled()
    assert isinstance(library, build.Library)
    assert library.load().turnout_few_rows() == FEW_ROWS


@with_kernel
def test_the_kernel_equals_the_oracle(unit: Kernel) -> None:
    assert worst_error(unit) < 1e-5


@with_kernel
@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dim", "hidden"), [(1, 1), (31, 33), (64, 257), (300, 70), (512, 256), (257, 544)])
def test_any_width_works_with_and_without_bias(dim: int, hidden: int, kind: str) -> None:
    for bias, num_threads in ((False, 1), (True, 2)):
        experts = drawn_experts(dim, hidden, 4, kind=kind, bias=bias)
        assert_equals_the_loop(experts, torch.randn(57, dim), drawn(57, 4, 2), num_threads=num_threads)


@with_kernel
@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize(
    ("num_tokens", "dim", "hidden", "k"),
    [(300, 433, 1100, 1), (3300, 33, 40, 2), (5, 33, 9000, 1)],
    ids=["wide", "many tokens", "many slices"],
)
def test_large_and_odd_sizes_work(num_tokens: int, dim: int, hidden: int, k: int) -> None:
    """Beyond every chunk, strip and slice, and whole in none of them."""
    experts, assignment = drawn_experts(dim, hidden, 2, bias=True), drawn(num_tokens, 2, k)
    assert_equals_the_loop(experts, torch.randn(num_tokens, dim), assignment)


@with_kernel
@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("num_threads", [3, 8, 16])
@pytest.mark.parametrize("routed", ["to all", "to one"])
def test_any_number_of_threads_computes_the_same_bit_for_bit(num_threads: int, routed: str) -> None:
    """Blocks of an expert, six of them or two of each, which several threads compute."""
    experts, num_tokens = drawn_experts(40, 300, 3, kind="gelu", bias=True), 3500
    assignment = drawn(num_tokens, 3, 1) if routed == "to all" else all_to_one(num_tokens, 3)
    x_TD = torch.randn(num_tokens, 40)
    assert_equals_the_loop(experts, x_TD, assignment, num_threads=num_threads)
    alone = run("fused_cpu", experts, x_TD, assignment)
    with threads(num_threads):
        assert all(map(torch.equal, alone, run("fused_cpu", experts, x_TD, assignment)))


MEMORY = """
import sys, torch
from tests.contracts.memory import backward_MiB
from turnout.experts.fused_op import float_by_matrix_unit
from turnout.kernels import trusted_kernel
kernel = float_by_matrix_unit() if sys.argv[1] == "matrix unit" else trusted_kernel()
print(*backward_MiB(kernel, *map(int, sys.argv[2:])))
"""


@with_kernel
@pytest.mark.parametrize("num_threads", [16, 64])
def test_more_threads_do_not_take_memory_as_large_as_the_weights(unit: Kernel, num_threads: int) -> None:
    """Two experts of 32 MiB, of two blocks each: four threads have work, and none a copy of the gradients.

    With those of x they are 80 MiB.
    """
    peak, _ = grown_MiB(unit, "2048 2048 2048 2 1", num_threads)
    assert peak < 80 + 4 * (36 if unit.matrix_unit else 16) + 8


@with_kernel
def test_memory_beyond_a_limit_is_given_back_after_a_call(unit: Kernel) -> None:
    peak, kept = grown_MiB(unit, "5000 4096 16 2 2", 1)
    assert peak > 160, "otherwise this shows nothing"
    assert kept < 128 + 16


def grown_MiB(kernel: Kernel, sizes: str, num_threads: int) -> tuple[float, float]:
    """Of a fresh process: what a backward pass took at most, its gradients with it, and what stayed without them."""
    unit = "matrix unit" if kernel.matrix_unit else "vectors"
    command = [sys.executable, "-c", MEMORY, unit, str(num_threads), *sizes.split()]
    own = os.environ | {"OMP_NUM_THREADS": str(num_threads)}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=own, capture_output=True, text=True, check=True)
    peak, kept = map(float, done.stdout.split())
    return peak, kept


@with_kernel
@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 13, 14, 15, 28, 29, 257])
@pytest.mark.parametrize("k", [1, 3])
def test_any_number_of_tokens_works(num_tokens: int, k: int) -> None:
    assert_equals_the_loop(drawn_experts(20, 24, 5, bias=True), torch.randn(num_tokens, 20), drawn(num_tokens, 5, k))


@with_kernel
@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("num_threads", [1, 2])
def test_one_expert_taking_all_is_the_work_of_several_threads(num_threads: int) -> None:
    experts = drawn_experts(40, 48, 3, bias=True)
    assert_equals_the_loop(experts, torch.randn(1500, 40), all_to_one(1500, 3), num_threads=num_threads)


@with_kernel
@pytest.mark.parametrize("kind", KINDS)
def test_by_the_matrix_unit_it_is_no_less_exact_than_by_vectors(kind: str) -> None:
    vectors, unit = trusted_kernel(), float_by_matrix_unit()
    if isinstance(unit, str):
        pytest.skip(unit)
    assert isinstance(vectors, Kernel)
    # many blocks, chunks and strips
    for sizes in ((300, 512, 1100, 3, 2), (2000, 96, 300, 3, 1)):
        leaves, expert_TK, y_grad_TD = proof.drawn(kind, sizes, bias=False)
        want_TD, *grads = proof.by_oracle(kind, leaves, expert_TK, y_grad_TD)
        errors = [
            (got.double() - want).square().mean().sqrt() / want.square().mean().sqrt()
            for kernel in (vectors, unit)
            for got, want in zip(
                proof.by_kernel(kernel, kind, leaves, expert_TK, y_grad_TD), [want_TD, want_TD, *grads], strict=True
            )
        ]
        by_vectors, by_unit = torch.stack(errors).view(2, -1)
        assert (by_unit < by_vectors).all(), (by_vectors, by_unit)


@with_kernel
def test_experts_too_small_for_the_matrix_unit_are_multiplied_by_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_op, "float_by_matrix_unit", lambda: unit)
    vectors, unit = trusted_kernel(), Kernel.__new__(Kernel)
    for dim, hidden, want in ((64, 128, vectors), (128, 255, vectors), (128, 256, unit), (2048, 16, unit)):
        assert fused_op.the_kernel(torch.float32, torch.empty(2, hidden, dim)) is want


@with_kernel
@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("magnitude", [1e-25, 1e25])
def test_numbers_of_any_size_keep_their_digits(magnitude: float) -> None:
    experts, assignment, x_TD = drawn_experts(64, 40, 3, kind="relu"), drawn(200, 3, 1), torch.randn(200, 64)
    small = run("fused_cpu", experts, x_TD, assignment)
    large = run("fused_cpu", experts, x_TD * magnitude, assignment)
    for got, want in ((large[0], small[0] * magnitude), (large[1], small[1])):
        assert (got - want).abs().max() < 1e-5 * want.abs().max()


@with_kernel
@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("num_tokens", [16, 128])
def test_far_below_zero_gelu_is_zero_not_a_subnormal_number(num_tokens: int) -> None:
    # products with those take ten times as long
    experts = FFNExperts(32, 32, 1, kind="gelu")
    with torch.no_grad():
        experts.up_EDG.copy_(torch.eye(32))
        experts.down_EFD.copy_(torch.eye(32))
    x_TD, assignment = torch.linspace(-40, 10, num_tokens * 32).view(num_tokens, 32), all_to_one(num_tokens, 1)
    assignment = replace(assignment, weight_N=torch.ones(num_tokens).requires_grad_())
    y_TD, x_grad_TD, *_ = run("fused_cpu", experts, x_TD, assignment)
    for found in (y_TD, x_grad_TD):
        assert (found[x_TD < -13] == 0).all()
        assert found[x_TD > -5.5].count_nonzero() == (x_TD > -5.5).sum()
    assert torch.allclose(y_TD.double(), torch.nn.functional.gelu(x_TD.double()), atol=1e-6, rtol=1e-6)


@with_kernel
@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_spoils_the_rows_it_is_in_and_no_other(spoilt: float) -> None:
    experts, assignment, x_TD = drawn_experts(64, 40, 3, kind="swiglu"), drawn(200, 3, 1), torch.randn(200, 64)
    whole_TD = run("fused_cpu", experts, x_TD, assignment)[0]
    x_TD[7, 5] = spoilt
    y_TD = run("fused_cpu", experts, x_TD, assignment)[0]
    others_T = torch.arange(200) != 7
    assert not y_TD[7].isfinite().all()
    assert torch.equal(y_TD[others_T], whole_TD[others_T])


@with_kernel
@pytest.mark.usefixtures("unit")
def test_experts_without_rows_get_gradients_of_exactly_zero() -> None:
    experts = drawn_experts(20, 24, 3, bias=True)
    _, _, _, *grads = run("fused_cpu", experts, torch.randn(50, 20), all_to_one(50, 3))
    for grad in grads:
        assert not grad[:2].any()
        assert grad[2].any()


@with_kernel
@pytest.mark.usefixtures("unit")
def test_dropped_assignments_have_no_row_and_no_gradient() -> None:
    assignment = drawn(90, 6, 2)
    keep_N = torch.rand(180, generator=torch.Generator().manual_seed(3)) < 0.5
    experts = drawn_experts(33, 40, 6)
    assert_equals_the_loop(experts, torch.randn(90, 33), assignment, keep_N=keep_N)
    y_TD, _, weight_grad_N, *_ = run("fused_cpu", experts, torch.randn(90, 33), assignment, keep_N)
    assert not weight_grad_N[~keep_N].any()
    assert not y_TD[~keep_N.view(90, 2).any(dim=1)].any()


@with_kernel
@pytest.mark.usefixtures("unit")
def test_rows_of_a_token_in_any_order_and_number_work() -> None:
    generator = torch.Generator().manual_seed(0)
    num = 300
    expert_N = torch.randint(7, (num,), generator=generator)
    token_N = torch.randint(60, (num,), generator=generator)
    assignment = assignment_of(expert_N, token_N, num_tokens=64, num_experts=7)
    assert_equals_the_loop(drawn_experts(24, 17, 7), torch.randn(64, 24), assignment)


@with_kernel
@pytest.mark.usefixtures("unit")
@pytest.mark.slow
@pytest.mark.parametrize("num_threads", [2, 33])
def test_rows_that_do_not_fit_the_buffer_at_once_are_added_wave_by_wave(num_threads: int) -> None:
    """16,384 tokens with 8 choices of width 80: ten million numbers, where two halves of three million are kept.

    Of 33 threads several compute an expert's blocks, also of one that begins in one wave and ends in the next.
    """
    assignment = drawn(16_384, 32, 8)
    assert_equals_the_loop(drawn_experts(80, 8, 32), torch.randn(16_384, 80), assignment, num_threads=num_threads)


@with_kernel
@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("num_tokens", [3, 200])
def test_ten_runs_on_two_threads_are_equal_bit_for_bit(num_tokens: int) -> None:
    experts, assignment = drawn_experts(96, 80, 8), drawn(num_tokens, 8, 3)
    x_TD = torch.randn(num_tokens, 96)
    with threads(2):
        first = run("fused_cpu", experts, x_TD, assignment)
        for _ in range(9):
            assert all(map(torch.equal, first, run("fused_cpu", experts, x_TD, assignment)))


@with_kernel
@pytest.mark.parametrize("num_tokens", [3, 200])
def test_without_torchs_own_threads_it_starts_some_and_computes_the_same(
    unit: Kernel, num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts, assignment, x_TD = drawn_experts(96, 80, 8), drawn(num_tokens, 8, 3), torch.randn(num_tokens, 96)
    with threads(3):
        pooled = run("fused_cpu", experts, x_TD, assignment)
        monkeypatch.setattr(unit, "_pool", 0)
        assert all(map(torch.equal, pooled, run("fused_cpu", experts, x_TD, assignment)))


@with_kernel
@pytest.mark.exhaustive
@pytest.mark.parametrize("processor", ["haswell", "x86-64-v2"])
def test_a_processor_with_narrower_vectors_computes_what_the_oracle_does(
    processor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", wrapped(tmp_path / "narrow", f'exec {a_compiler()} "$@" -march={processor}'))
    monkeypatch.setenv("TURNOUT_KERNELS", str(tmp_path / "kernels"))
    library = compiled()
    assert isinstance(library, build.Library), library
    for num_threads in (1, 3):
        with threads(num_threads):
            assert worst_error(Kernel(library.load())) < 1e-5


@pytest.mark.parametrize("num_experts", [1, 2, 5])
def test_experts_on_threads_of_their_own_compute_what_the_loop_does(num_experts: int) -> None:
    for kind, bias in (("swiglu", False), ("gelu", True)):
        experts, assignment = drawn_experts(20, 24, num_experts, kind=kind, bias=bias), drawn(40, num_experts, 1)
        assert_equals_the_loop(experts, torch.randn(40, 20), assignment, num_threads=3, backend="threaded_mm")


@pytest.mark.parametrize("kind", ["relu", "gelu", "swiglu", "swiglu_clamped"])
def test_a_thread_that_takes_several_experts_at_once_computes_what_the_loop_does(kind: str) -> None:
    # so few rows of so large weights that gradients are made by some of their columns at a time
    experts, assignment = drawn_experts(256, 516, 5, kind=kind, bias=True), drawn(90, 5, 2)
    x_TD = torch.randn(90, 256)
    assert_equals_the_loop(experts, x_TD, assignment, num_threads=2, backend="threaded_mm")
    with threads(2):
        first = run("threaded_mm", experts, x_TD, assignment)
        assert all(map(torch.equal, first, run("threaded_mm", experts, x_TD, assignment)))


@with_kernel
@pytest.mark.usefixtures("unit")
def test_only_what_is_wanted_is_computed() -> None:
    experts = drawn_experts(20, 24, 5).requires_grad_(False)
    assignment = drawn(40, 5, 2)
    x_TD = torch.randn(40, 20, requires_grad=True)
    admission = Admission(keep_N=None, capacity=None, dropped_E={})
    backend = ExpertBackend.TABLE["fused_cpu"]
    pass_experts(experts, backend, x_TD, assignment, admission, dispatcher=HERE).sum().backward()
    assert x_TD.grad is not None
    assert all(parameter.grad is None for parameter in experts.parameters())
    frozen_x = pass_experts(
        experts.requires_grad_(True), backend, x_TD.detach(), assignment, admission, dispatcher=LocalDispatcher()
    )
    frozen_x.sum().backward()
    assert experts.up_EDG.grad is not None
    assert assignment.weight_N.grad is not None


@with_kernel
@pytest.mark.parametrize(("flags", "taken"), [("avx512_bf16", True), ("avx512_bf16 amx_bf16 amx_tile", False)])
def test_bfloat16_is_left_to_torch_only_where_a_matrix_unit_is_torchs_alone(
    monkeypatch: pytest.MonkeyPatch, flags: str, taken: bool
) -> None:
    monkeypatch.setattr(fused_cpu, "cpu_flags", lambda: flags)
    monkeypatch.setattr(fused_cpu, "half_by_matrix_unit", lambda: "AMX is switched off by TURNOUT_AMX=0")
    assert ("fused_cpu" in takers(torch.bfloat16)) == taken


@with_kernel
def test_bfloat16_weights_are_widened_not_rounded_again() -> None:
    """As near to the float64 result of the same rounded weights as float32 itself, forward and backward."""
    experts = drawn_experts(64, 72, 4).bfloat16()
    if "fused_cpu" not in takers(torch.bfloat16):
        pytest.skip("this processor multiplies bfloat16 by a matrix unit that is not to be used")
    x_TD, assignment = torch.randn(40, 64), drawn(40, 4, 2)
    wide = drawn_experts(64, 72, 4).double()
    wide.load_state_dict(experts.state_dict())
    got, want = run("fused_cpu", experts, x_TD, assignment), run("loop", wide, x_TD.double(), assignment)
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        # gradients of the weights are rounded, once, to their own dtype
        tolerance = 1e-5 if index < 3 else 4e-3
        assert torch.allclose(a.double(), b.double(), rtol=0, atol=tolerance * max(1.0, float(b.detach().abs().max())))


@with_kernel
@pytest.mark.parametrize("place", ["expert", "token"])
def test_an_assignment_to_what_does_not_exist_is_refused(place: str) -> None:
    index_N, wrong_N = torch.tensor([0, 1]), torch.tensor([0, 2])
    expert_N, token_N = (wrong_N, index_N) if place == "expert" else (index_N, wrong_N)
    assignment = assignment_of(expert_N, token_N, num_tokens=2, num_experts=2)
    with pytest.raises(ShapeError, match=r"has experts 0 to \d and tokens 0 to \d; there are 2 experts and 2 tokens"):
        run("fused_cpu", drawn_experts(4, 4, 2), torch.randn(2, 4), assignment)


@with_kernel
def test_other_layers_may_hand_it_rows() -> None:
    soft = pytest.importorskip("turnout.layers.soft_moe")
    torch.manual_seed(0)
    layer = soft.SoftMoE(16, 12, 4, slots=3, backend="fused_cpu")
    x_BSD = torch.randn(2, 10, 16)
    y = layer(x_BSD).y
    layer.backend = "loop"
    assert torch.allclose(y, layer(x_BSD).y, atol=1e-6)


def test_without_a_compiler_the_reason_is_told_and_another_backend_computes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TURNOUT_KERNELS", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    trusted_kernel.cache_clear()
    try:
        reason = available_backends(FFNExperts(4, 4, 2), dtype=torch.float32, device=CPU)["fused_cpu"]
        assert reason.startswith("the compiled kernel needs a C++ compiler: install g++, or name one in $CXX; use back")
        with pytest.raises(ConfigError, match=r"backend='fused_cpu' cannot run here: .* needs a C\+\+ compiler"):
            MoE(4, 4, 2, backend="fused_cpu")(torch.randn(3, 4))
        assert MoE(4, 4, 2)(torch.randn(3, 4)).y.shape == (3, 4)
    finally:
        trusted_kernel.cache_clear()


def test_a_compiler_that_fails_is_named_with_its_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = wrapped(tmp_path / "broken", "echo 'fused.cpp:1: error: no such luck' >&2\nexit 1")
    monkeypatch.setenv("TURNOUT_KERNELS", str(tmp_path / "kernels"))
    monkeypatch.setenv("CXX", broken)
    assert compiled() == f"{broken} cannot compile the kernel: fused.cpp:1: error: no such luck"
    assert "compiling the CPU kernel, once on this machine" in caplog.text, "seconds without a word"
    assert not list((tmp_path / "kernels").iterdir())


def test_compiling_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURNOUT_COMPILE", "0")
    assert compiled() == "compiling is switched off by TURNOUT_COMPILE=0"


@with_kernel
def test_a_kernel_that_is_wrong_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = trusted_kernel()
    assert isinstance(kernel, Kernel)
    right = kernel.backward
    monkeypatch.setattr(proof, "SIZES", proof.SIZES[-1:])

    def wrong(*args: Any, **kwargs: Any) -> Any:
        grads = right(*args, **kwargs)
        assert grads.weight_N is not None
        return grads._replace(weight_N=grads.weight_N * 1.001)

    monkeypatch.setattr(kernel, "backward", wrong)
    proof_file = tmp_path / "kernel.proven"
    assert once(lambda: prove(kernel), proof_file).startswith("the compiled kernel is off the oracle by ")
    monkeypatch.setattr(kernel, "backward", lambda *a, **k: right(*a, **k)._replace(weight_N=torch.tensor(torch.nan)))
    assert once(lambda: prove(kernel), proof_file).startswith("the compiled kernel is off the oracle by nan")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(kernel, "backward", right)
    assert once(lambda: prove(kernel), proof_file) == ""
    assert proof_file.exists()
    assert once(lambda: "asked again", proof_file) == ""


@with_kernel
def test_two_that_compile_at_once_both_get_a_whole_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, source = tmp_path / "begun", tmp_path / "source"
    source.mkdir()
    visible = '__attribute__((visibility("default")))'
    (source / "fused.cpp").write_text(f'extern "C" {visible} int seven() {{ return 7; }}\n')
    # neither compiles before both have begun
    wait = f"echo >> {begun}; while [ $(wc -l < {begun}) -lt 2 ]; do sleep 0.01; done"
    monkeypatch.setenv("CXX", wrapped(tmp_path / "patient", f'{wait}\nexec {a_compiler()} "$@"'))
    monkeypatch.setenv("TURNOUT_KERNELS", str(tmp_path / "kernels"))
    monkeypatch.setattr(build, "SOURCE", source)
    with ThreadPoolExecutor(2) as pool:
        libraries = [asked.result() for asked in [pool.submit(compiled) for _ in range(2)]]
    assert all(isinstance(library, build.Library) and library.load().seven() == 7 for library in libraries), libraries
    assert len(list((tmp_path / "kernels").iterdir())) == 1


@with_kernel
@pytest.mark.usefixtures("unit")
@pytest.mark.slow
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_compile_takes_the_pass_as_one_node(bias: bool, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and isinstance(half := half_by_matrix_unit(), str):
        pytest.skip(half)
    experts, assignment = drawn_experts(20, 24, 5, bias=bias).to(dtype), drawn(40, 5, 2)
    x_TD = torch.randn(40, 20, dtype=dtype)
    assert isinstance(assignment.weight_N, Tensor)

    def graph(x_TD: Tensor, weight_N: Tensor) -> Tensor:
        own = Assignment(
            token_N=assignment.token_N,
            expert_N=assignment.expert_N,
            weight_N=weight_N,
            choice_N=assignment.choice_N,
            num_tokens=40,
            num_experts=5,
        )
        admission = Admission(keep_N=None, capacity=None, dropped_E={})
        return pass_experts(
            experts, ExpertBackend.TABLE["fused_cpu"], x_TD, own, admission, dispatcher=LocalDispatcher()
        )

    results = []
    for function in (graph, torch.compile(graph, backend="aot_eager", fullgraph=True)):
        x = x_TD.clone().requires_grad_()
        y_TD = function(x, assignment.weight_N)
        results.append([y_TD, *torch.autograd.grad(y_TD.sum(), [x, assignment.weight_N, *experts.parameters()])])
    assert all(map(torch.equal, *results))


@with_kernel
def test_a_layer_on_the_cpu_takes_its_own_memory_there_whatever_the_default_device() -> None:
    layer, x_TD = MoE(8, 16, 4, backend="fused_cpu"), torch.randn(5, 8)
    with torch.no_grad():
        want = layer(x_TD).y
        with torch.device("meta"):
            got = layer(x_TD).y
    assert torch.equal(got, want)
