"""Forward is a function of its arguments: it changes nothing, and gives the same bits every time."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.contracts.cases import Case, Content, draw, draw_case, run_layer, simple_case, takers
from turnout import MoE
from turnout.contracts import ExpertBackend, Router
from turnout.dispatch import FixedCapacity
from turnout.experts import FFNExperts, ModuleExperts, choose_backend
from turnout.routers import GShardTop2
from turnout.tensors import LossTerm, RouterOutput

BACKENDS = takers(torch.float32)
RUNS = [(torch.float32, 1), (torch.float32, 2), (torch.bfloat16, 1)]  # dtype and threads


def snapshot(layer: MoE) -> dict[str, Any]:
    """Every attribute of every module, tensors by value."""
    found: dict[str, Any] = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for name, module in layer.named_modules():
        for key, value in vars(module).items():
            plain = not isinstance(value, dict)
            found[f"{name}.{key}"] = value if plain else {k: id(v) for k, v in value.items()}
    return found


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    return before.keys() == after.keys() and all(
        torch.equal(value, after[key]) if isinstance(value, Tensor) else value == after[key]
        for key, value in before.items()
    )


def test_forward_and_backward_change_no_attribute_no_state_and_no_input() -> None:
    for seed in range(60):
        case = draw_case(seed)
        layer, inputs = draw(case)
        before = snapshot(layer)
        x_before, random_state = inputs.x.clone(), torch.get_rng_state()
        run_layer(layer, inputs, case.seed)
        assert same(before, snapshot(layer)), case
        assert torch.equal(inputs.x, x_before), case
        assert torch.equal(torch.get_rng_state(), random_state), f"global randomness was used in {case}"


def test_two_forward_calls_give_equal_outputs_losses_and_stats() -> None:
    for seed in range(60):
        case = draw_case(seed)
        layer, inputs = draw(case)
        assert_same_run(layer, inputs, case, times=2)


@pytest.mark.parametrize(("backend", "dtype", "num_threads"), [(b, *run) for run in RUNS for b in takers(run[0])])
def test_ten_runs_are_equal_bit_for_bit(backend: str, dtype: torch.dtype, num_threads: int) -> None:
    case = simple_case(
        shape=(8, 64),
        dim=32,
        hidden=32,
        num_experts=8,
        router=GShardTop2(),
        capacity=FixedCapacity(factor=1.0),
        shared_hidden=16,
        padding=0.2,
    )
    layer, inputs = draw(case, backend=backend, dtype=dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert_same_run(layer, inputs, case, times=10)
    finally:
        torch.set_num_threads(threads)


def test_training_steps_from_one_seed_give_the_same_weights() -> None:
    def trained() -> dict[str, Tensor]:
        layer, inputs = draw(simple_case(router=GShardTop2(), capacity=FixedCapacity()), dtype=torch.float32)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for step in range(5):
            run_layer(layer, inputs, step)
            optimizer.step()
        return deepcopy(layer.state_dict())

    first, again = trained(), trained()
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("content", ["normal", "lattice"])
def test_recomputation_takes_the_same_choices_and_counts_once(content: Content) -> None:
    """Also in training, where the second choice is by chance, and on a lattice, where every other logit ties."""
    for seed in range(10):
        case = simple_case(seed=seed, router=GShardTop2(), capacity=FixedCapacity(factor=0.5), content=content)
        layer, inputs = draw(case)
        results = []
        for run in (layer, lambda x, layer=layer: checkpoint(layer, x, use_reentrant=False)):
            torch.manual_seed(seed)
            x = inputs.x.clone().requires_grad_()
            out = run(x)
            (out.y * inputs.y_grad).sum().backward()
            results.append((out.y, x.grad, out.stats.assigned_E, out.stats.dropped_policy_E))
        assert all(torch.equal(plain, again) for plain, again in zip(*results, strict=True))


def test_expert_weights_are_one_parameter_with_the_experts_first() -> None:
    for kind in ("swiglu", "relu"):
        layer = MoE(12, 10, 5, expert=kind, bias=True)
        shapes = {name: tuple(p.shape) for name, p in layer.named_parameters() if name.startswith("experts.")}
        width = 20 if kind == "swiglu" else 10
        assert shapes == {
            "experts.up_EDG": (5, 12, width),
            "experts.down_EFD": (5, 10, 12),
            "experts.up_bias_EG": (5, width),
            "experts.down_bias_ED": (5, 12),
        }


@pytest.mark.parametrize("backend", BACKENDS)
def test_running_a_backend_leaves_the_parameters_the_same_objects(backend: str) -> None:
    case = simple_case(dim=5, hidden=3)
    layer, inputs = draw(case, backend=backend, dtype=torch.float32)
    assert isinstance(layer.experts, FFNExperts)
    before = {name: (id(p), p.data_ptr(), p.stride()) for name, p in layer.named_parameters()}
    run_layer(layer, inputs, 0)
    assert before == {name: (id(p), p.data_ptr(), p.stride()) for name, p in layer.named_parameters()}


def test_a_layer_survives_deepcopy_and_its_state_loads_into_another_backend() -> None:
    layer, inputs = draw(simple_case())
    other = MoE(12, 10, 5, bias=True, backend="padded_bmm").double()
    other.load_state_dict(layer.state_dict())
    assert torch.allclose(layer(inputs.x).y, other(inputs.x).y, rtol=0, atol=1e-12)
    assert torch.equal(layer(inputs.x).y, deepcopy(layer)(inputs.x).y)


def test_experts_refuse_to_run_without_a_backend() -> None:
    with pytest.raises(NotImplementedError, match="experts are computed by a backend"):
        FFNExperts(2, 2, 2)(torch.zeros(1, 2))


class WithLoss(nn.Module):
    """A router of one's own: another router, and a loss that only it can know."""

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router = router

    def forward(self, *arguments: Any) -> RouterOutput:
        routing = self.router(*arguments)
        term = LossTerm(name="own", value=routing.logits_RE.square().mean(), coefficient=0.1, scope="micro_batch")
        return replace(routing, losses=(term,))


def test_a_module_of_ones_own_may_be_the_router_and_bring_a_loss() -> None:
    layer = MoE(12, 10, 5, router=WithLoss(GShardTop2().build(12, 5)))
    out = layer(torch.randn(7, 12))
    assert [term.name for term in out.losses] == ["own", "load_balance"]
    assert out.y.shape == (7, 12)


def test_auto_prefers_fused_then_threaded_then_padded_then_the_loop() -> None:
    own = ModuleExperts(lambda: nn.Linear(4, 4), 2)
    jobs = [(FFNExperts(4, 4, 2), torch.float32), (FFNExperts(4, 4, 2), torch.float64), (own, torch.float32)]
    chosen = [choose_backend(e, "auto", dtype=dtype, device=torch.device("cpu")) for e, dtype in jobs]
    first = "fused_cpu" if "fused_cpu" in BACKENDS else "threaded_mm"
    assert [ExpertBackend.TABLE.name_of(backend) for backend in chosen] == [first, "padded_bmm", "loop"]


def assert_same_run(layer: MoE, inputs: Any, case: Case, *, times: int) -> None:
    first, first_out = run_layer(layer, inputs, case.seed)
    for _ in range(times - 1):
        again, again_out = run_layer(layer, inputs, case.seed)
        assert torch.equal(first.y, again.y), case
        assert all(torch.equal(value, again.losses[name]) for name, value in first.losses.items()), case
        assert vars(first_out.stats).keys() == vars(again_out.stats).keys()
        for name, value in vars(first_out.stats).items():
            assert torch.equal(value, getattr(again_out.stats, name)), (name, case)
        for name, grad in first.grads.items():
            other = again.grads[name]
            assert grad is not None
            assert other is not None
            assert torch.equal(grad, other), (name, case)
