"""What only a GPU can show: larger sizes, the same bits ten times, no host copy, a CUDA graph, a compiled layer."""

import sys

import pytest
import torch

from tests.contracts.test_fused_cpu import drawn, run
from turnout import MoE
from turnout.contracts import ExpertBackend
from turnout.dispatch import LocalDispatcher
from turnout.experts import FFNExperts, choose_backend, quantize_experts
from turnout.kernels.gpu import CODES_CAPABILITY, device_failure
from turnout.layers.expert_pass import pass_experts
from turnout.routers import TopK
from turnout.tensors import Admission, Assignment

CUDA = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(bool(device_failure(CUDA)), reason=device_failure(CUDA) or "there is a device"),
]


def on_device(num_tokens: int, num_experts: int, k: int) -> Assignment:
    found = drawn(num_tokens, num_experts, k)
    return Assignment(
        token_N=found.token_N.cuda(),
        expert_N=found.expert_N.cuda(),
        weight_N=found.weight_N.detach().cuda().requires_grad_(),
        choice_N=found.choice_N.cuda(),
        num_tokens=num_tokens,
        num_experts=num_experts,
        top_k=k,
    )


def drawn_experts(dim: int, hidden: int, num_experts: int) -> FFNExperts:
    torch.manual_seed(0)
    with torch.device(CUDA):
        return FFNExperts(dim, hidden, num_experts, bias=True, init_std=dim**-0.5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("num_tokens", [3, 500, 5000])
def test_larger_sizes_equal_the_oracle(dtype: torch.dtype, tolerance: float, num_tokens: int) -> None:
    experts, assignment = drawn_experts(520, 264, 12).to(dtype), on_device(num_tokens, 12, 3)
    x_TD = torch.randn(num_tokens, 520, device=CUDA, dtype=dtype)
    got = run("fused_triton", experts, x_TD, assignment)
    wide = drawn_experts(520, 264, 12).double()
    wide.load_state_dict(experts.state_dict())
    want = run("loop", wide, x_TD.double(), assignment)
    off = [float((a.double() - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(got, want, strict=True)]
    assert max(off) < tolerance, off


def test_ten_runs_are_equal_bit_for_bit() -> None:
    experts, assignment = drawn_experts(512, 256, 16).bfloat16(), on_device(4000, 16, 4)
    x_TD = torch.randn(4000, 512, device=CUDA, dtype=torch.bfloat16)
    first = run("fused_triton", experts, x_TD, assignment)
    for _ in range(9):
        assert all(map(torch.equal, first, run("fused_triton", experts, x_TD, assignment)))


def test_a_layer_asks_the_device_for_nothing() -> None:
    layer = MoE(256, 128, 8, router=TopK(k=2), backend="fused_triton").to(CUDA, torch.bfloat16)
    x_TD = torch.randn(600, 256, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    layer(x_TD).y.sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x_TD).y.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_of_decoding_is_one_cuda_graph() -> None:
    experts, assignment = drawn_experts(256, 128, 8).bfloat16(), on_device(4, 8, 2)
    x_TD = torch.randn(4, 256, device=CUDA, dtype=torch.bfloat16)
    admission = Admission(keep_N=None, capacity=None, dropped_E={})
    backend = ExpertBackend.TABLE["fused_triton"]

    @torch.no_grad()
    def step() -> torch.Tensor:
        return pass_experts(experts, backend, x_TD, assignment, admission, dispatcher=LocalDispatcher())

    want = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    assert torch.equal(got, want)


@pytest.mark.skipif(bool(device_failure(CUDA, "fused_fp8", CODES_CAPABILITY)), reason="no units for 8 bits")
@torch.no_grad()
def test_a_layer_of_8_bits_asks_the_device_for_nothing_and_repeats_itself() -> None:
    layer = quantize_experts(MoE(256, 384, 8, router=TopK(k=2)), precision="fp8").to(CUDA, torch.bfloat16).eval()
    x_TD = torch.randn(600, 256, device=CUDA, dtype=torch.bfloat16)
    want = layer(x_TD).y
    assert choose_backend(layer.experts, "auto", dtype=torch.bfloat16, device=CUDA) is ExpertBackend.TABLE["fused_fp8"]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [layer(x_TD).y for _ in range(9)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(each, want) for each in again)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="a cached property has a lock before Python 3.12")
def test_torch_compile_takes_the_whole_layer_in_one_graph() -> None:
    layer = MoE(256, 128, 8, router=TopK(k=2), backend="fused_triton").to(CUDA, torch.bfloat16)
    x_TD = torch.randn(600, 256, device=CUDA, dtype=torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True)
    assert torch.allclose(compiled(x_TD).y.float(), layer(x_TD).y.float(), atol=2e-2)
