"""Proof, on this machine, that each expert backend computes what the dense oracle computes."""

import functools
import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from turnout import reference
from turnout.comm.lines import intention, try_here
from turnout.comm.shared_memory import why_not
from turnout.contracts import ExpertBackend
from turnout.errors import TurnoutError
from turnout.experts import FFNExperts, RoundedExperts, quantize_experts
from turnout.experts.fused_int8 import int8_instructions
from turnout.experts.fused_op import float_by_matrix_unit, half_by_matrix_unit
from turnout.layers import MoE
from turnout.losses import LoadBalance
from turnout.routers import TopK
from turnout.tensors import total_loss

OPTIONAL = {
    "transformers": "turnout[bench]",
    "tensorboard": "turnout[track]",
    "matplotlib": "turnout[plot]",
    "fastapi": "turnout[serve]",
    "triton": "turnout[gpu]",
    "wandb": "wandb",
    "trackio": "trackio",
}
TOLERANCE = 1e-5
QUANTIZED_TOLERANCE = 1e-3  # activations have 14 bits and a sign
HALVES_TOLERANCE = 2**-7  # tokens, weights and activations are rounded to bfloat16
FLOAT8_TOLERANCE = 2**-4  # so are tokens and activations, to 3 bits of mantissa


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One part of the installation; `proven` means it was run and gave the right answer."""

    name: str
    available: bool
    proven: bool
    reason: str


def examine() -> dict[str, list[Finding]]:
    """Backends (tried forward and backward against the dense oracle in float64), transports, optional dependencies."""
    return {
        "backends": [_try_backend(name) for name in ExpertBackend.TABLE.names()],
        "transports": [_gloo(), _shared_memory()],
        "optional": [_optional(name, extra) for name, extra in OPTIONAL.items()],
    }


def _try_backend(name: str) -> Finding:
    if not ExpertBackend.TABLE[name].trains:
        return _try_quantized(name)
    try:
        layer, x_TD = _layer(name)
        want = _run_oracle(layer, x_TD)
        device = _home(name)
        pairs = zip(_run_layer(layer.to(device), x_TD.to(device)), want, strict=True)
        # torch's max keeps NaN, Python's would drop it
        worst = float(
            torch.stack([(got - want).abs().max() / want.abs().max().clamp(min=1) for got, want in pairs]).max()
        )
    except TurnoutError as error:
        return Finding(name=name, available=False, proven=False, reason=str(error))
    except RuntimeError as error:
        return Finding(name=name, available=True, proven=False, reason=f"failed: {error}")
    proven = worst < TOLERANCE
    return Finding(
        name=name,
        available=True,
        proven=proven,
        reason=f"forward and backward in float32 against the oracle, worst error {worst:.1e}{_units(name)}",
    )


def _units(name: str) -> str:
    """What multiplies each dtype, of the backend that has a unit of the processor for it."""
    if name != "fused_cpu":
        return ""
    unit, half = float_by_matrix_unit(), half_by_matrix_unit()
    float32 = f"by vectors: {unit}" if isinstance(unit, str) else "by AMX in three parts of 8 bits"
    bfloat16 = f"by others: {half}" if isinstance(half, str) else "by AMX, proven too"
    return f"; float32 {float32}; bfloat16 {bfloat16}"


@torch.no_grad()
def _try_quantized(name: str) -> Finding:
    """Inference against the oracle of the very weights, which are rounded, in float64."""
    try:
        layer, x_TD = _layer(name)
        experts = quantize_experts(layer, precision="fp8" if name == "fused_fp8" else "int8").experts
        assert isinstance(experts, RoundedExperts)
        device = _home(name, experts)
        got_TD = layer.to(device)(x_TD.to(device)).y.double().cpu()
        layer.cpu()
        exact = MoE(dim=20, hidden=12, num_experts=5)
        exact.router.load_state_dict(layer.router.state_dict())
        ups, downs = zip(*(experts.weights_of(e) for e in range(5)), strict=True)
        exact.experts.load_state_dict({"up_EDG": torch.stack(ups), "down_EFD": torch.stack(downs)})
    except TurnoutError as error:
        return Finding(name=name, available=False, proven=False, reason=str(error))
    with torch.enable_grad():
        want_TD = _run_oracle(exact, x_TD)[0]
    worst = float((got_TD - want_TD).abs().max() / want_TD.abs().max().clamp(min=1))
    by, tolerance = _rounding_of(name)
    return Finding(
        name=name,
        available=True,
        proven=worst < tolerance,
        reason=f"inference of quantised experts against the oracle of their weights, worst error {worst:.1e}; {by}",
    )


def _rounding_of(name: str) -> tuple[str, float]:
    """What multiplies, and what the roundings of tokens and activations may cost."""
    if name == "fused_fp8":
        return "e4m3", FLOAT8_TOLERANCE
    by = int8_instructions()
    return by, HALVES_TOLERANCE if by == "AMX" else QUANTIZED_TOLERANCE


def _home(backend: str, experts: nn.Module | None = None) -> torch.device:
    """Where it is tried: on the CPU, or on a GPU if that is all it takes and there is one."""
    cpu, experts = torch.device("cpu"), experts or FFNExperts(2, 2, 2)
    refusal = ExpertBackend.TABLE[backend].refusal(experts, dtype=torch.float32, device=cpu)
    return cpu if refusal is None or not torch.cuda.is_available() else torch.device("cuda")


def _layer(backend: str) -> tuple[MoE, Tensor]:
    """A layer large enough that every expert has rows, with weights that matter, and its input."""
    generator = torch.Generator().manual_seed(0)
    layer = MoE(dim=20, hidden=12, num_experts=5, backend=backend, router=TopK(k=2), losses=(LoadBalance(),))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return layer, torch.randn(33, 20, generator=generator)


def _run_layer(layer: MoE, x_TD: Tensor) -> list[Tensor]:
    """Output, then gradients of the input and of every parameter, in float64."""
    x_TD = x_TD.clone().requires_grad_()
    out = layer(x_TD)
    loss = out.y.square().sum() + total_loss(out.losses)
    return [t.double().cpu() for t in (out.y.detach(), *torch.autograd.grad(loss, [x_TD, *layer.parameters()]))]


def _run_oracle(layer: MoE, x_TD: Tensor) -> list[Tensor]:
    """The same of `turnout.reference`, which shares no code with the layer."""
    leaf = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    x_TD = x_TD.double().requires_grad_()
    logits_TE = x_TD @ leaf["router.score.weight_ED"].T
    expert_TK = reference.best_experts(logits_TE.detach(), 2)
    weights = zip(leaf["experts.up_EDG"].unbind(), leaf["experts.down_EFD"].unbind(), strict=True)
    y_TD = reference.moe(
        x_TD,
        reference.topk_gates(logits_TE, expert_TK),
        [functools.partial(reference.ffn, up_DG=up, down_FD=down, kind="swiglu") for up, down in weights],
    )
    balance = reference.load_balance(reference.softmax(logits_TE), expert_TK)
    loss = y_TD.square().sum() + LoadBalance().coefficient * balance
    return [y_TD.detach(), *torch.autograd.grad(loss, [x_TD, *leaf.values()])]


def _gloo() -> Finding:
    available = torch.distributed.is_available() and torch.distributed.is_gloo_available()
    return Finding(
        name="gloo",
        available=available,
        proven=False,
        reason="carries tensors of the CPU between ranks of torchrun; to try it: turnout verify smoke --parallel 2 "
        "--set strategy.ep=2",
    )


def _shared_memory() -> Finding:
    reason = try_here()
    words = f"carries rows, counts and sums between ranks of one host: {intention()}"
    return Finding(
        name="shared memory",
        available=not why_not(),
        proven=not reason,
        reason=reason or f"{words}; exchanges and sums of two threads tried",
    )


def _optional(name: str, package: str) -> Finding:
    available = importlib.util.find_spec(name) is not None
    return Finding(
        name=name, available=available, proven=False, reason="found" if available else f"pip install {package!r}"
    )
