"""The layer, whatever rows of the tables it is made of, computes what the dense oracle computes, gradients included."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contracts.cases import (
    MODULES,
    Case,
    Result,
    draw,
    draw_case,
    error,
    own_selection,
    run_layer,
    simple_case,
    takers,
)
from tests.contracts.dense import KNOWN_ROUTERS, run_dense
from turnout import MoE
from turnout.contracts import CapacityPolicy, RouterConfig
from turnout.experts import FFNExperts
from turnout.experts.activations import Activation
from turnout.layers.mlp import MLP
from turnout.routers import TopK

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
FAMILIES = [(name, dtype) for dtype in TOLERANCE for name in takers(dtype)]
QUICK = {torch.float64: 60, torch.float32: 90}  # configurations under `make check`, over all backends
SAMPLE = {torch.float64: 800, torch.float32: 270}  # configurations under `make test`, the quick ones among them
SWEEP = {torch.float64: 2000, torch.float32: 900}  # configurations in the sweep; what is beyond is exhaustive
CHUNK = 100


def sweep_cases(dtype: torch.dtype, numbers: range) -> Iterator[tuple[str, Case]]:
    """Configurations, no two alike, each with one of the backends that take the dtype."""
    first = list(TOLERANCE).index(dtype) * 1_000_000
    names, kinds, num_routers = takers(dtype), Activation.TABLE.names(), len(RouterConfig.TABLE.names())
    for number in numbers:
        # a case's router goes by its number: each backend takes all of them, then the next does
        backend = names[number // num_routers % len(names)]
        case = draw_case(first + number)
        if case.expert == MODULES and backend != "loop":
            case = replace(case, expert=kinds[number % len(kinds)])
        yield backend, case


def chunks() -> Iterator[Any]:
    """What is left of the sweep when its first configurations are done."""
    for dtype, last in SWEEP.items():
        ends = sorted({QUICK[dtype], SAMPLE[dtype], *range(2 * CHUNK, last, CHUNK), last})
        for start, end in pairwise(ends):
            marks = [pytest.mark.exhaustive] if start >= SAMPLE[dtype] else []
            yield pytest.param(dtype, range(start, end), marks=marks)


CHUNKS = list(chunks())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_layer_equals_the_oracle(dtype: torch.dtype) -> None:
    assert check_all(dtype, range(QUICK[dtype])) == QUICK[dtype]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "numbers"), CHUNKS, ids=str)
def test_layer_equals_the_oracle_throughout_the_sweep(dtype: torch.dtype, numbers: range) -> None:
    assert check_all(dtype, numbers) == len(numbers)


def test_the_sweep_has_two_thousand_float64_configurations_and_every_row_in_every_family() -> None:
    drawn = {dtype: list(sweep_cases(dtype, range(SWEEP[dtype]))) for dtype in TOLERANCE}
    assert len({case for _, case in drawn[torch.float64]}) >= 2000
    in_chunks = sum(len(chunk.values[1]) for chunk in CHUNKS)
    assert sum(QUICK.values()) + in_chunks == sum(len(pairs) for pairs in drawn.values())
    for backend, dtype in FAMILIES:
        cases = [case for name, case in drawn[dtype] if name == backend]
        routers = Counter(type(case.router) for case in cases)
        assert all(routers[row] > 5 for _, row in RouterConfig.TABLE.items()), routers
        policies = Counter(type(case.capacity) for case in cases)
        assert all(policies[row] > 20 for _, row in CapacityPolicy.TABLE.items()), policies  # type: ignore[index]
        kinds = Counter((case.expert, case.bias) for case in cases)
        wanted = [*Activation.TABLE.names(), *([MODULES] if backend == "loop" else [])]
        assert all(kinds[kind, bias] > 10 for kind in wanted for bias in (True, False)), kinds
        assert {1, 64} <= {case.num_experts for case in cases}
        assert {0, 1, 257} <= {case.num_tokens for case in cases}
        assert set(range(1, 9)) <= {case.router.choices for case in cases}
        assert {0, 1} <= {case.shared_hidden for case in cases}


def check_all(dtype: torch.dtype, numbers: range) -> int:
    """The number of configurations that were checked."""
    worst = [check(case, backend=backend, dtype=dtype) for backend, case in sweep_cases(dtype, numbers)]
    print(f"{dtype}: {len(worst)} configurations, worst relative error {max(worst):.1e}")
    return len(worst)


def check(case: Case, *, backend: str, dtype: torch.dtype) -> float:
    """Assert that layer and oracle agree on the case; the worst relative error."""
    layer, inputs = draw(case, backend=backend, dtype=dtype)
    got, _ = run_layer(layer, inputs, case.seed)
    known = isinstance(case.router, KNOWN_ROUTERS)
    selection = own_selection(layer, inputs, case.seed) if known and dtype != torch.float64 else None
    want = run_dense(case, inputs, layer, selection=selection)
    found = tensors(got)
    # a saturated softmax keeps little of the gates' gradients, which cancel: float32 rounds what was there before
    steep = max(1.0, want.gate_grad) if dtype == torch.float32 else 1.0
    terms = {name: steep if name.startswith("gradient of router.") else 1.0 for name in tensors(want)}
    errors = {name: difference(found.get(name), value, terms=terms[name]) for name, value in tensors(want).items()}
    off = {name: value for name, value in errors.items() if not value <= TOLERANCE[dtype]}
    assert not off, f"{off} with backend={backend!r} {dtype} in {case}"
    assert torch.equal(got.kept_E, want.kept_E), f"kept {got.kept_E} not {want.kept_E} in {case}"
    for name in exact_zeros(case, got, want, inputs.mask):
        raise AssertionError(f"{name} has values where exact zeros belong, backend={backend!r} in {case}")
    return max(errors.values())


def tensors(result: Result) -> dict[str, Tensor | None]:
    """Everything to compare, by name."""
    return {
        "y": result.y,
        **{f"loss {name}": value for name, value in result.losses.items()},
        **{f"gradient of {name}": value for name, value in result.grads.items()},
    }


def difference(got: Tensor | None, want: Tensor | None, *, terms: float = 1.0) -> float:
    """A missing gradient is as wrong as a NaN."""
    return float("inf") if got is None or want is None else error(got, want, terms=terms)


def exact_zeros(case: Case, got: Result, want: Result, mask: Tensor | None) -> Iterator[str]:
    """Names of tensors that are not exactly zero where they must be.

    That is y of a token nobody computed, y and gradient of padding, and the gradients of an expert without tokens.
    """
    if got.y[(want.y == 0).all(dim=-1)].any():
        yield "y"
    x_grad = got.grads["x"]
    if mask is not None and x_grad is not None and x_grad[~mask].any():
        yield "gradient of x at padding"
    idle = (want.kept_E == 0).nonzero().flatten().tolist()
    for name, grad in got.grads.items():
        if not name.startswith("experts.") or grad is None:
            continue
        own = [name.startswith(f"experts.{e}.") for e in idle] if case.expert == MODULES else []
        values = grad if any(own) else grad[idle] if case.expert != MODULES else grad.new_zeros(1)
        if values.any():
            yield f"gradient of {name} of an expert without tokens"


@pytest.mark.parametrize("kind", Activation.TABLE.names())
@pytest.mark.parametrize(("backend", "dtype"), FAMILIES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_experts", [1, 4])
def test_identical_experts_equal_the_dense_mlp(
    backend: str, dtype: torch.dtype, kind: str, bias: bool, num_experts: int
) -> None:
    case = simple_case(expert=kind, bias=bias, num_experts=num_experts, losses=(), router=_router(num_experts))
    layer, inputs = draw(case, backend=backend, dtype=dtype)
    mlp = MLP(case.dim, case.hidden, kind=kind, bias=bias).to(dtype)
    with torch.no_grad():
        _make_identical(layer, mlp)
    got, _ = run_layer(layer, inputs, case.seed)
    x = inputs.x.to(dtype, copy=True).requires_grad_()
    y = mlp(x)
    (y * inputs.y_grad.to(dtype)).sum().backward()
    experts = layer.experts
    assert isinstance(experts, FFNExperts)
    assert x.grad is not None
    assert mlp.up_GD.grad is not None
    assert mlp.down_DF.grad is not None
    assert experts.up_EDG.grad is not None
    assert experts.down_EFD.grad is not None
    pairs = [
        (got.y, y.detach()),
        (got.grads["x"], x.grad),
        (experts.up_EDG.grad.sum(dim=0), mlp.up_GD.grad.T),
        (experts.down_EFD.grad.sum(dim=0), mlp.down_DF.grad.T),
    ]
    assert max(difference(a, None if b is None else b.double()) for a, b in pairs) <= TOLERANCE[dtype]


def test_one_module_may_be_every_expert() -> None:
    linear = torch.nn.Linear(6, 6).double()
    layer = MoE(6, 4, 3, expert=lambda: linear).double()
    x_TD = torch.randn(9, 6, dtype=torch.float64)
    assert error(layer(x_TD).y, linear(x_TD)) <= 1e-12


def _router(num_experts: int) -> RouterConfig:
    return TopK(k=min(3, num_experts), renormalize=num_experts > 1)


def _make_identical(layer: MoE, mlp: MLP) -> None:
    experts = layer.experts
    assert isinstance(experts, FFNExperts)
    for e in range(experts.num_experts):
        experts.up_EDG[e] = experts.up_EDG[0]
        experts.down_EFD[e] = experts.down_EFD[0]
    mlp.up_GD.copy_(experts.up_EDG[0].T)
    mlp.down_DF.copy_(experts.down_EFD[0].T)
    if experts.up_bias_EG is not None and experts.down_bias_ED is not None:
        assert mlp.up_bias_G is not None
        assert mlp.down_bias_D is not None
        experts.up_bias_EG.copy_(experts.up_bias_EG[:1].expand_as(experts.up_bias_EG))
        experts.down_bias_ED.copy_(experts.down_bias_ED[:1].expand_as(experts.down_bias_ED))
        mlp.up_bias_G.copy_(experts.up_bias_EG[0])
        mlp.down_bias_D.copy_(experts.down_bias_ED[0])
