"""What gpu_session.py asks before it times: are the kernels right, the same each time, and free of host copies."""

import importlib
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_build import PROOFS
from benchmarks.gpu_times import LAYERS
from turnout.bench.experts_race import ALL, drawn_assignment
from turnout.contracts import ExpertBackend
from turnout.dispatch import LocalDispatcher
from turnout.experts import FFNExperts
from turnout.layers import MoE
from turnout.layers.expert_pass import pass_experts
from turnout.routers import TopK
from turnout.tensors import Assignment


def proofs() -> dict[str, str]:
    """Worst error of outputs and gradients against the float64 oracle, for each kind and dtype."""
    worst_error = importlib.import_module("turnout.kernels.gpu.proof").worst_error
    found = {}
    for name in PROOFS:
        kind, dtype = name.split()
        found[name] = f"{worst_error(kind, getattr(torch, dtype), torch.device('cuda')):.1e}"
    return found


def checks() -> dict[str, Any]:
    """Each says what was seen; a wrong one says WRONG."""
    found: dict[str, Any] = {}
    for name, layer in LAYERS.items():
        experts = layer.experts()
        # as many rows as the configs of the timed layers are for: others would have to be compiled first
        num_rows = 256 * layer.num_experts
        drawn = partial(drawn_assignment, num_experts=layer.num_experts, device=experts.up_EDG.device)
        found[f"{name}, bfloat16"] = _against_float64(experts, drawn(num_rows // layer.top_k, top_k=layer.top_k))
        if name == "fine-grained":
            found["one expert takes all"] = _against_float64(experts, _to_one(drawn(num_rows, top_k=1)))
            found["ten runs bit for bit"] = _repeats(experts, drawn(num_rows // layer.top_k, top_k=layer.top_k))
    found["no host copy, forward and backward"] = _without_host_copies()
    return found


def _run(name: str, experts: FFNExperts, x_TD: Tensor, assignment: Assignment, y_grad_TD: Tensor) -> list[Tensor]:
    x_TD = x_TD.detach().requires_grad_()
    y_TD = pass_experts(experts, ExpertBackend.TABLE[name], x_TD, assignment, ALL, dispatcher=LocalDispatcher())
    leaves = [x_TD, assignment.weight_N, *experts.parameters()]
    return [y_TD.detach(), *torch.autograd.grad(y_TD, leaves, y_grad_TD)]


def _against_float64(experts: FFNExperts, assignment: Assignment) -> str:
    """Norm of the difference over norm: y, then gradients of x, of weights, of both matrices; beside grouped_mm's."""
    x_TD, y_grad_TD = (
        torch.randn(assignment.num_tokens, experts.dim, device="cuda", dtype=torch.bfloat16) for _ in range(2)
    )
    got = {name: _run(name, experts, x_TD, assignment, y_grad_TD) for name in ("fused_triton", "grouped_mm")}
    with torch.device("meta"):
        wide = FFNExperts(experts.dim, experts.hidden, experts.num_experts).double()
    wide = wide.to_empty(device="cuda")
    wide.load_state_dict(experts.state_dict())
    want = _run("loop", wide, x_TD.double(), assignment, y_grad_TD.double())
    off = {
        name: [float((a.double() - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(tensors, want, strict=True)]
        for name, tensors in got.items()
    }
    pairs = zip(off["fused_triton"], off["grouped_mm"], strict=True)
    is_right = all(own < 1e-2 and own < 1.5 * other + 1e-3 for own, other in pairs)
    told = "; ".join(f"{name} {' '.join(f'{each:.1e}' for each in errors)}" for name, errors in off.items())
    return f"{'right' if is_right else 'WRONG'}: {told}"


def _to_one(found: Assignment) -> Assignment:
    return Assignment(
        token_N=found.token_N,
        expert_N=torch.full_like(found.expert_N, found.num_experts // 2),
        weight_N=found.weight_N,
        choice_N=found.choice_N,
        num_tokens=found.num_tokens,
        num_experts=found.num_experts,
        top_k=1,
    )


def _repeats(experts: FFNExperts, assignment: Assignment) -> str:
    x_TD, y_grad_TD = (
        torch.randn(assignment.num_tokens, experts.dim, device="cuda", dtype=torch.bfloat16) for _ in range(2)
    )
    first = _run("fused_triton", experts, x_TD, assignment, y_grad_TD)
    for _ in range(9):
        if not all(map(torch.equal, first, _run("fused_triton", experts, x_TD, assignment, y_grad_TD))):
            return "WRONG: they differ"
    return "equal"


def _without_host_copies() -> str:
    """A whole layer with its router; the first call compiles and proves."""
    fine = LAYERS["fine-grained"]
    router = TopK(k=fine.top_k)
    with torch.device("cuda"):
        layer = MoE(fine.dim, fine.hidden, fine.num_experts, router=router, losses=(), backend="fused_triton")
    layer = layer.to(torch.bfloat16)
    x_TD = torch.randn(4096, fine.dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layer(x_TD).y.sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x_TD).y.sum().backward()
    except RuntimeError as error:
        return f"WRONG: {str(error).splitlines()[0]}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "none"
