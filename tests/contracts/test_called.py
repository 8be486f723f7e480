"""What somebody hangs on the experts, or puts in place of a part of them, is heeded by every backend."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

from turnout import MoE
from turnout.errors import ConfigError
from turnout.experts import FFNExperts, available_backends, quantize_experts
from turnout.routers import TopK

CPU = torch.device("cpu")
DIM = 24
BACKENDS = ("auto", "fused_cpu", "threaded_mm", "grouped_mm", "padded_bmm", "loop")


def layer_by(backend: str) -> MoE:
    torch.manual_seed(0)
    layer = MoE(DIM, 40, 4, backend=backend)
    refused = {"auto": "", **available_backends(layer.experts, dtype=torch.float32, device=CPU)}[backend]
    if refused:
        pytest.skip(refused)
    return layer


class Halved(FFNExperts):
    def forward(self, *args: Any) -> Tensor:
        return super().forward(*args) / 2


def halve_by_hook(experts: nn.Module) -> None:
    experts.register_forward_hook(lambda _module, _inputs, y: y / 2)


def halve_by_method(experts: nn.Module) -> None:
    right = experts.forward
    experts.forward = lambda *args: right(*args) / 2


def halve_by_class(experts: nn.Module) -> None:
    experts.__class__ = Halved


def halve_by_prune(experts: nn.Module) -> None:
    """Its weight is made anew from another in each call, by a hook."""
    prune.identity(experts, "down_EFD")
    with torch.no_grad():
        experts.down_EFD_orig.mul_(0.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("halve", [halve_by_hook, halve_by_method, halve_by_class, halve_by_prune])
@pytest.mark.parametrize("num_tokens", [5, 60])
def test_a_call_of_the_experts_is_made_where_it_does_more(
    num_tokens: int, halve: Callable[[nn.Module], None], backend: str
) -> None:
    layer, x = layer_by(backend), torch.randn(num_tokens, DIM)
    whole = layer(x).y
    halve(layer.experts)
    for grad in (torch.no_grad, torch.enable_grad):
        with grad():
            assert torch.allclose(layer(x).y, whole / 2, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_activation_is_computed_or_refused(backend: str) -> None:
    layer, x = layer_by(backend), torch.randn(60, DIM)
    layer.experts.activation = lambda up: up[..., : up.shape[-1] // 2]
    other = layer_by("loop")
    other.experts.activation = layer.experts.activation
    if backend == "fused_cpu":
        with pytest.raises(ConfigError, match="these experts have another activation in its place"):
            layer(x)
    else:
        assert torch.allclose(layer(x).y, other(x).y, atol=1e-6)


@pytest.mark.parametrize("num_tokens", [5, 60])
def test_a_hook_on_quantised_experts_is_called(num_tokens: int) -> None:
    layer = layer_by("auto").eval()
    quantize_experts(layer)
    x = torch.randn(num_tokens, DIM)
    with torch.no_grad():
        whole = layer(x).y
        halve_by_hook(layer.experts)
        assert torch.allclose(layer(x).y, whole / 2, atol=1e-6)


def test_hooks_of_all_modules_see_the_experts() -> None:
    layer, seen = layer_by("auto"), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        with torch.no_grad():
            layer(torch.randn(3, DIM))
    finally:
        handle.remove()
    assert layer.experts in seen
    assert layer.router in seen


@pytest.mark.parametrize("num_tokens", [5, 60])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_tangent_is_refused_not_lost(frozen: bool, num_tokens: int) -> None:
    layer = layer_by("auto").requires_grad_(not frozen)
    x = torch.randn(num_tokens, DIM)
    with torch.no_grad(), forward_ad.dual_level():
        assert layer(x).y.shape == x.shape
        with pytest.raises(ConfigError, match="no forward-mode derivatives"):
            layer(forward_ad.make_dual(x, torch.ones_like(x)))


def test_what_torch_func_asks_for_is_refused() -> None:
    layer, x = layer_by("auto"), torch.randn(5, DIM)
    for transformed in (
        lambda: torch.func.grad(lambda x: layer(x).y.sum())(x),
        lambda: torch.func.jvp(lambda x: layer(x).y, (x,), (x,)),
        lambda: torch.func.vmap(lambda x: layer(x).y)(x[None]),
    ):
        with pytest.raises(ConfigError, match=r"vmap, jvp or grad of torch\.func"):
            transformed()


class _Counted(TorchDispatchMode):
    """Sees every operator, as counters of FLOPs do."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("num_tokens", [5, 40])
@pytest.mark.parametrize("precision", ["", "int8"])
def test_where_operators_are_recorded_the_experts_are_one(num_tokens: int, precision: str) -> None:
    layer = MoE(16, 24, 6, router=TopK(k=2)).eval()
    if precision:
        quantize_experts(nn.Sequential(layer), precision=precision)
    x = torch.randn(num_tokens, 16)
    with torch.no_grad():
        want = layer(x).y
        with _Counted() as counted:
            assert torch.allclose(layer(x).y, want, atol=1e-6)
        # no addresses are read of what has none
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            assert layer(fake.from_tensor(x)).y.shape == x.shape
        graph = make_fx(lambda x: layer(x).y)(x)
        assert torch.allclose(graph(2 * x), layer(2 * x).y, atol=1e-6)
    refused = available_backends(layer.experts, dtype=torch.float32, device=CPU)[
        "fused_int8" if precision else "fused_cpu"
    ]
    assert refused or any("turnout" in name for name in counted.names)
