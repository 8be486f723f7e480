"""The router's kernels in gpu_session.py: proven, then timed against torch's operators and the bytes they move."""

import importlib
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_times import DECODED_TOKENS, LAYERS, Layer, limits
from turnout.bench.experts_race import Step, medians
from turnout.kernels.gpu import chooser
from turnout.routers.pieces import from_topk, select_topk
from turnout.routers.triton_gates import triton_topk
from turnout.tensors import Assignment, RouterInput

GATES = {"softmax": (False, True), "softmax of all": (False, False), "sigmoid": (True, True)}


def proofs() -> dict[str, str]:
    """Worst error against float64 of each kind of gate; infinite: another choice or count."""
    worst_error, found = importlib.import_module("turnout.kernels.gpu.gates_proof").worst_error, {}
    for name, (sigmoid, renormalize) in GATES.items():
        gate = chooser().Gate(k=1, sigmoid=sigmoid, renormalize=renormalize, scale=2.5)
        found[f"gates, {name}"] = f"{worst_error(gate, torch.device('cuda')):.1e}"
    return found


def router() -> dict[str, Any]:
    """Softmax, choice, weights and counts, and their gradient; and the order, counted again or not."""
    rows = [row for name, sizes in LAYERS.items() for row in _rows(name, sizes)]
    return {"rows": rows}


def _rows(name: str, sizes: Layer) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    bytes_per_ms = limits()["copy, TB/s"] * 1e9
    for num_tokens in (sizes.num_tokens, DECODED_TOKENS[-2]):
        for train in (False, True) if num_tokens == sizes.num_tokens else (False,):
            logits_RE = torch.randn(num_tokens, sizes.num_experts, device="cuda", requires_grad=train)
            steps = {who: _step(who, logits_RE, sizes.top_k, train=train) for who in ("kernel", "torch's operators")}
            # logits read and scores written; a choice is three whole numbers and its weight
            moved = num_tokens * (8 * sizes.num_experts + 28 * sizes.top_k)
            # backward: scores and their gradient read, that of the logits written; of a choice 16 bytes
            moved += num_tokens * (12 * sizes.num_experts + 16 * sizes.top_k) if train else 0
            mode = "forward and backward" if train else "forward"
            for who, ms in medians(steps, rounds=20).items():
                share = round(moved / bytes_per_ms / ms, 3)
                found.append(
                    {"case": f"{name} router T={num_tokens} {mode}: {who}", "ms": round(ms, 4), "share": share}
                )
    return found + _order_rows(name, sizes)


def _order_rows(name: str, sizes: Layer) -> list[dict[str, Any]]:
    assignment, _ = _by_kernel(torch.randn(sizes.num_tokens, sizes.num_experts, device="cuda"), sizes.top_k)
    rest = {"num_tokens": sizes.num_tokens, "num_experts": sizes.num_experts, "rows": 128, "top_k": sizes.top_k}
    inputs = (assignment.expert_N, assignment.token_N, None)
    order = importlib.import_module("turnout.kernels.gpu.order")
    steps: dict[str, Step] = {
        "counted again": lambda: order.sort(*inputs, **rest),
        "counts of the router": lambda: order.sort(*inputs, **rest, count_BE=assignment.count_BE),
    }
    got, want = (step() for step in steps.values())
    if not all(map(torch.equal, got, want)):
        raise RuntimeError("WRONG: the router's counts give another order")
    return [{"case": f"{name} order: {who}", "ms": round(ms, 4)} for who, ms in medians(steps, rounds=20).items()]


def _step(who: str, logits_RE: Tensor, k: int, *, train: bool) -> Step:
    run = _by_kernel if who == "kernel" else _by_operators

    def forward() -> list[Tensor]:
        assignment, scores_RE = run(logits_RE, k)
        # torch's are cached with the assignment: each call makes its own
        assert assignment.counts_E is not None
        return [scores_RE, assignment.weight_N]

    if not train:
        return torch.no_grad()(forward)
    grads = [torch.randn_like(output) for output in forward()]
    return lambda: torch.autograd.grad(forward(), logits_RE, grads)


def _by_kernel(logits_RE: Tensor, k: int) -> tuple[Assignment, Tensor]:
    found = triton_topk(logits_RE, _tokens(logits_RE), k, renormalize=True)
    if found is None:
        raise RuntimeError("no kernel here that is trusted")
    return found


def _by_operators(logits_RE: Tensor, k: int) -> tuple[Assignment, Tensor]:
    expert_RK = select_topk(logits_RE, k)
    weight_RK = logits_RE.gather(1, expert_RK).softmax(dim=1)
    assignment = from_topk(expert_RK, weight_RK, _tokens(logits_RE), num_experts=logits_RE.shape[1])
    return assignment, logits_RE.softmax(dim=1)


def _tokens(logits_RE: Tensor) -> RouterInput:
    token_R = torch.arange(len(logits_RE), device=logits_RE.device)
    return RouterInput(x_RD=logits_RE, token_ids_R=None, token_R=token_R, num_tokens=len(logits_RE), generator=None)
