"""Experts in 8-bit floating point in gpu_session.py: proven, then timed against bfloat16, fp8 products and reading."""

import importlib
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_times import DECODED_TOKENS, LAYERS, ROUTINGS, Layer, limits
from turnout.bench.experts_race import ALL, Step, drawn_assignment, medians, step_of
from turnout.contracts import ExpertBackend
from turnout.dispatch import LocalDispatcher
from turnout.experts import Float8FFNExperts
from turnout.kernels.fp8_codes import CODES
from turnout.kernels.gpu import codes_launcher
from turnout.kernels.gpu.configs import CODES_FEW, CODES_MANY, CodesConfig
from turnout.layers.expert_pass import pass_experts
from turnout.tensors import Assignment

PROOFS = ("swiglu bfloat16", "swiglu float32", "gelu bfloat16")
CONFIGS = {"codes-many": CODES_MANY, "codes-few": CODES_FEW}


def proofs() -> dict[str, str]:
    """Largest difference in units of what rounding explains."""
    worst_excess, found = importlib.import_module("turnout.kernels.gpu.fp8_proof").worst_excess, {}
    for name in PROOFS:
        kind, dtype = name.split()
        found[f"fp8, {name}"] = f"{worst_excess(kind, getattr(torch, dtype), torch.device('cuda')):.3f} of its bound"
    return found


def build(sizes: Layer, config: CodesConfig, num_tokens: int) -> None:
    """The kernels as the layer will call them, on few tokens."""
    experts = Float8FFNExperts.of(sizes.experts())
    x_TD = torch.randn(num_tokens, sizes.dim, device="cuda", dtype=torch.bfloat16)
    _pass(experts, x_TD, drawn_assignment(num_tokens, sizes.num_experts, sizes.top_k, device=x_TD.device), config)()
    torch.cuda.synchronize()


def layer(name: str) -> dict[str, Any]:
    """Forward of many tokens: each config, bfloat16 by whatever is there, and the error of it all."""
    sizes, rate = LAYERS[name], _product_rate(LAYERS[name])
    experts = sizes.experts()
    codes = Float8FFNExperts.of(experts)
    x_TD = torch.randn(sizes.num_tokens, sizes.dim, device="cuda", dtype=torch.bfloat16)
    assignment = drawn_assignment(sizes.num_tokens, sizes.num_experts, sizes.top_k, device=x_TD.device)
    steps = {f"config {i}": _pass(codes, x_TD, assignment, config) for i, config in enumerate(CODES_MANY)}
    for other in ("fused_triton", "grouped_mm"):
        steps[f"bfloat16 {other}"] = step_of(other, experts, x_TD, assignment, train=False)
    want, got = steps["bfloat16 grouped_mm"](), steps["config 0"]()
    assert isinstance(want, Tensor)
    assert isinstance(got, Tensor)
    error = float((got.float() - want.float()).norm() / want.float().norm())
    limit_ms = sizes.forward_flops / rate / 1e9
    rows = [
        {"case": f"{name} fp8 forward: {who}", "ms": round(ms, 4), "share": round(limit_ms / ms, 3)}
        for who, ms in medians(steps, rounds=10).items()
    ]
    return {"rows": rows, "fp8 products, TFLOP/s": rate, "off bfloat16, norm over norm": round(error, 4)}


def decode(name: str) -> dict[str, Any]:
    """Milliseconds of a few tokens as one CUDA graph, against reading the codes of the touched experts."""
    sizes = LAYERS[name]
    codes = Float8FFNExperts.of(sizes.experts())
    bytes_per_ms, rows = limits()["read, TB/s"] * 1e9, []
    for num_tokens in DECODED_TOKENS:
        x_TD = torch.randn(num_tokens, sizes.dim, device="cuda", dtype=torch.bfloat16)
        drawn = [
            drawn_assignment(num_tokens, sizes.num_experts, sizes.top_k, device=x_TD.device) for _ in range(ROUTINGS)
        ]
        touched = sum(len(each.expert_N.unique()) for each in drawn)
        floor_ms = touched * sizes.expert_bytes / 2 / bytes_per_ms
        is_few = num_tokens * sizes.top_k <= 16 * sizes.num_experts
        configs = dict(enumerate(CODES_FEW)) if is_few else {"for few rows": CODES_FEW[0]}
        for which, config in configs.items():
            ms = medians({"": _graph([_pass(codes, x_TD, each, config) for each in drawn])}, rounds=20)[""]
            case = f"{name} fp8 decode T={num_tokens}: config {which}, CUDA graph"
            rows.append({"case": case, "ms": round(ms / ROUTINGS, 4), "share": round(floor_ms / ms, 3)})
    return {"rows": rows}


def checks() -> dict[str, str]:
    """By the backend itself, ten times."""
    sizes = LAYERS["fine-grained"]
    codes = Float8FFNExperts.of(sizes.experts())
    x_TD = torch.randn(4096, sizes.dim, device="cuda", dtype=torch.bfloat16)
    assignment = drawn_assignment(4096, sizes.num_experts, sizes.top_k, device=x_TD.device)

    @torch.no_grad()
    def run() -> Tensor:
        backend = ExpertBackend.TABLE["fused_fp8"]
        return pass_experts(codes, backend, x_TD, assignment, ALL, dispatcher=LocalDispatcher())

    first = run()
    repeats = all(torch.equal(first, run()) for _ in range(9))
    return {"fp8, ten runs bit for bit": "equal" if repeats else "WRONG: they differ"}


def _pass(experts: Float8FFNExperts, x_TD: Tensor, assignment: Assignment, config: CodesConfig) -> Step:
    codes = codes_launcher().Codes(
        up_EPFD=experts.up_codes.view(CODES),
        up_scales=experts.up_scales.view(torch.float32),
        down_EDF=experts.down_codes.view(CODES),
        down_scales=experts.down_scales.view(torch.float32),
        up_bias_EG=None,
        down_bias_ED=None,
        kind=experts.kind,
    )
    inputs = (x_TD, assignment.weight_N.detach(), assignment.token_N, assignment.expert_N, None, codes, config)
    return lambda: codes_launcher().forward(*inputs, top_k=assignment.top_k).y_TD


def _graph(steps: list[Step]) -> Step:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        [step() for step in steps]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        [step() for step in steps]
    return graph.replay


def _product_rate(sizes: Layer) -> float:
    """The products of a dense network on as many rows by torch's fp8 product with one scale for each tensor."""
    num, dim, hidden = sizes.num_tokens * sizes.top_k, sizes.dim, sizes.hidden
    shapes = ((num, dim), (2 * hidden, dim), (num, hidden), (dim, hidden))
    x, up, h, down = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).to(CODES) for shape in shapes)
    one = torch.ones((), device="cuda")

    def products() -> None:
        for left, right in ((x, up), (h, down)):
            torch._scaled_mm(left, right.t(), one, one, out_dtype=torch.bfloat16)

    return round(sizes.forward_flops / medians({"": products}, rounds=10)[""] / 1e9, 1)
