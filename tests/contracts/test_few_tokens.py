"""A layer of few tokens in one call does what the long way does, and is taken only where nothing is left out by it."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from tests.contracts.test_fused_cpu import with_kernel
from turnout import MoE
from turnout.dispatch import FixedCapacity
from turnout.errors import ShapeError
from turnout.experts import quantize_experts
from turnout.experts.activations import Activation
from turnout.experts.fused_int8 import trusted_int8
from turnout.experts.fused_op import float_by_matrix_unit
from turnout.kernels import Kernel, few_proof, trusted_kernel
from turnout.kernels.few_call import CompiledFew
from turnout.kernels.proof import prove
from turnout.layers.few_tokens import FewTokens
from turnout.losses import LoadBalance, RouterZ
from turnout.routers import TopK
from turnout.routers.pieces import LinearScore
from turnout.routers.topk import TopKRouter
from turnout.tensors import MoEOutput, MoEStats, RouterInput, RouterOutput

pytestmark = with_kernel
DIM = 40


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each call for few, those of the proofs apart."""
    trusted_int8()
    float_by_matrix_unit()
    counted: list[int] = []
    call = CompiledFew.__call__

    def noted(self: CompiledFew, x: Tensor) -> Any:
        counted.append(x.numel() // x.shape[-1])
        return call(self, x)

    monkeypatch.setattr(CompiledFew, "__call__", noted)
    return counted


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Of the tokens for which a call was put together."""
    trusted_int8()
    float_by_matrix_unit()
    dtypes: list[torch.dtype] = []
    few = Kernel.few

    def noted(self: Kernel, *args: Any, dtype: torch.dtype, **named: Any) -> CompiledFew:
        dtypes.append(dtype)
        return few(self, *args, dtype=dtype, **named)

    monkeypatch.setattr(Kernel, "few", noted)
    return dtypes


def layer_of(router: TopK | nn.Module | None = None, **settings: Any) -> MoE:
    torch.manual_seed(0)
    own = TopK(k=3) if router is None else router
    return MoE(DIM, 24, 9, router=own, losses=(LoadBalance(), RouterZ()), **settings).eval()


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def the_long_way(layer: MoE, x: Tensor, **asked: Any) -> MoEOutput:
    """Of the same call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FewTokens, "run", lambda *args, **named: None)
        out = layer(x, **asked)
        assert out.losses
        assert out.stats
        return out


def close(got: Tensor, want: Tensor) -> bool:
    # a bfloat16 may round to the next
    tolerance = 2**-8 if want.dtype == torch.bfloat16 else 1e-6
    return got.dtype == want.dtype and torch.allclose(got, want, rtol=tolerance, atol=1e-6)


def alike(got: MoEOutput, want: MoEOutput) -> None:
    assert close(got.y, want.y)
    assert got.y.shape == want.y.shape
    for name in ("token_N", "expert_N", "choice_N"):
        assert torch.equal(getattr(got.assignment, name), getattr(want.assignment, name)), name
    assert close(got.assignment.weight_N, want.assignment.weight_N)
    assert got.keep_N is want.keep_N is None
    for mine, other in zip(got.losses, want.losses, strict=True):
        assert mine.name == other.name
        assert torch.allclose(mine.value, other.value, rtol=1e-5)
    for name in MoEStats.__dataclass_fields__:
        assert torch.allclose(getattr(got.stats, name), getattr(want.stats, name), rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("precision", ["", "int8", "int8-a8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (1,), (3, 5), (16, 1), (2, 2, 4)])
@pytest.mark.parametrize("router", [TopK(k=3), TopK(k=1, renormalize=False), TopK(k=2, bias=True)])
def test_it_is_what_the_long_way_is(
    calls: list[int], precision: str, dtype: torch.dtype, shape: tuple[int, ...], router: TopK
) -> None:
    layer = layer_of(router, bias=router.bias, shared_hidden=8 if router.k == 3 else 0)
    for name, weight in layer.named_parameters():
        if "bias" in name:
            nn.init.normal_(weight)
    layer = nn.Sequential(layer) if not precision else quantize_experts(nn.Sequential(layer), precision=precision)
    own, x = layer.to(dtype)[0], drawn(*shape, DIM).to(dtype)
    with torch.inference_mode():
        got = own(x)
    assert calls == [x[..., 0].numel()]
    alike(got, the_long_way(own, x))
    assert len(calls) == 1


def test_a_width_of_weights_that_is_not_the_tokens_own(calls: list[int]) -> None:
    layer, x = layer_of(), drawn(4, DIM)
    layer.experts.bfloat16()
    with torch.no_grad():
        alike(layer(x), the_long_way(layer, x))
    assert calls == [4]


def test_a_token_that_is_not_finite_spoils_itself_alone(calls: list[int]) -> None:
    layer, x = layer_of(), drawn(4, DIM)
    with torch.no_grad():
        whole = layer(x).y
        x[2, 7] = torch.nan
        spoilt = layer(x).y
    assert calls == [4, 4]
    assert spoilt[2].isnan().all()
    assert torch.equal(spoilt[[0, 1, 3]], whole[[0, 1, 3]])


class _Other(TopKRouter):
    """A user's, who changes one thing."""

    def route(self, tokens: RouterInput) -> RouterOutput:
        return super().route(RouterInput(**{**vars(tokens), "x_RD": -tokens.x_RD}))


def _hooked(part: Callable[[MoE], nn.Module]) -> MoE:
    layer = layer_of()
    part(layer).register_forward_hook(lambda module, args, out: out)
    return layer


def _forward_replaced() -> MoE:
    layer = layer_of()
    score = layer.router.score
    score.forward = partial(type(score).forward, score)
    return layer


class _Turned(LinearScore):
    """A user's."""

    def forward(self, x_RD: Tensor) -> Tensor:
        return -super().forward(x_RD)


def _with_score(score: nn.Module) -> MoE:
    layer = layer_of()
    layer.router.score = score
    return layer


def _strided_bias() -> MoE:
    layer = layer_of(TopK(k=2, bias=True))
    layer.router.score.bias_E = nn.Parameter(drawn(9, 2)[:, 0])
    return layer


class _Kind(Tensor):
    """As DTensor is one: its numbers may be anywhere."""


def _weight_of_a_kind() -> MoE:
    layer = layer_of()
    score = layer.router.score
    own = score.weight_ED.detach().as_subclass(_Kind)
    del score.weight_ED
    score.weight_ED = own
    return layer


def _route_replaced() -> MoE:
    layer = layer_of()
    layer.router.route = partial(_Other.route, _Other(DIM, 9, TopK(k=3)))
    return layer


# what is said of the call, and the layer it is said to
LONG: dict[str, tuple[Callable[[], MoE], dict[str, Any]]] = {
    "a mask": (layer_of, {"mask": torch.tensor([True, False, True, True])}),
    "other choices": (layer_of, {"top_k": 2}),
    "a factor": (layer_of, {"capacity_factor": 0.0}),
    "sigmoid": (lambda: layer_of(TopK(k=2, activation="sigmoid")), {}),
    "a scale": (lambda: layer_of(TopK(k=2, scale=2.0)), {}),
    "noise": (lambda: layer_of(TopK(k=2, gate_noise=1.0)), {}),
    "more choices than are picked one by one": (lambda: layer_of(TopK(k=9)), {}),
    "a user's router": (lambda: layer_of(_Other(DIM, 9, TopK(k=3))), {}),
    "a capacity": (lambda: layer_of(capacity=FixedCapacity(factor=0.5)), {}),
    "a latent width": (lambda: layer_of(latent_dim=16), {}),
    "a backend of rows": (lambda: layer_of(backend="padded_bmm"), {}),
    "float64": (lambda: layer_of().double(), {}),
    "a hook on the router": (lambda: _hooked(lambda layer: layer.router), {}),
    "a hook on its score": (lambda: _hooked(lambda layer: layer.router.score), {}),
    "another forward": (_forward_replaced, {}),
    "another route": (_route_replaced, {}),
    "a score of another kind": (lambda: _with_score(_Turned(DIM, 9, bias=False, init_std=1.0)), {}),
    "a score that is no score": (lambda: _with_score(nn.Linear(DIM, 9)), {}),
    "a bias that is a column": (_strided_bias, {}),
    "a weight that is more than a tensor": (_weight_of_a_kind, {}),
    "ids of 32 bits": (layer_of, {"token_ids": torch.arange(4, dtype=torch.int32)}),
}


@pytest.mark.parametrize("case", LONG)
def test_whatever_it_does_not_do_goes_the_long_way(calls: list[int], case: str) -> None:
    make, asked = LONG[case]
    layer = make()
    x = drawn(4, DIM).to(next(layer.parameters()).dtype)
    with torch.no_grad():
        got = layer(x, **asked)
    assert not calls
    assert torch.equal(got.y, the_long_way(layer, x, **asked).y)


def test_many_tokens_none_and_those_of_training_go_the_long_way(calls: list[int]) -> None:
    layer = layer_of()
    layer(drawn(4, DIM)).y.sum().backward()
    with torch.no_grad():
        for x in (
            drawn(17, DIM),
            drawn(0, DIM),
            drawn(DIM, 4).t(),
            drawn(4, DIM)._neg_view(),
            drawn(4, DIM).as_subclass(_Kind),
        ):
            assert layer(x).y.shape == x.shape
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(drawn(4, DIM))
        everywhere = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
        try:
            layer(drawn(4, DIM))
        finally:
            everywhere.remove()
        assert not calls
        layer(drawn(4, DIM))
    assert calls == [4]


def test_what_the_long_way_refuses_is_refused(calls: list[int]) -> None:
    narrow = layer_of()
    narrow.router = TopK(k=2).build(20, 9)
    with torch.no_grad():
        with pytest.raises(ShapeError, match="router got width 40"):
            narrow(drawn(4, DIM))
        with pytest.raises(ShapeError, match="ids are whole numbers"):
            layer_of()(drawn(4, DIM), token_ids=torch.zeros(4))
    assert not calls


def outcome(compute: Callable[[MoE, Tensor], MoEOutput], layer: MoE, x: Tensor) -> Tensor | type[Exception]:
    try:
        return compute(layer, x).y
    except (RuntimeError, IndexError, ShapeError) as error:
        return type(error)


def _as_other_dtype(layer: MoE) -> None:
    layer.experts.down_EFD.data = layer.experts.down_EFD.data.view(torch.float16)


def _as_fewer(layer: MoE) -> None:
    layer.experts.down_EFD.data = layer.experts.down_EFD.data[:5]


def _as_turned(layer: MoE) -> None:
    layer.experts.down_EFD.data = layer.experts.down_EFD.data.transpose(1, 2)


@pytest.mark.parametrize("change", [_as_other_dtype, _as_fewer, _as_turned])
def test_a_weight_that_lies_where_it_lay_may_be_another(change: Callable[[MoE], None]) -> None:
    torch.manual_seed(0)
    layer, x = MoE(DIM, DIM, 9, router=TopK(k=3), expert="gelu"), drawn(16, DIM)
    layer.experts.bfloat16()
    with torch.no_grad():
        before = layer(x).y
        change(layer)
        got, want = outcome(MoE.__call__, layer, x), outcome(the_long_way, layer, x)
    assert close(got, want) if isinstance(got, Tensor) and isinstance(want, Tensor) else got is want
    assert not isinstance(got, Tensor) or not torch.equal(got, before)


def test_tokens_of_another_dtype_or_width_are_not_read_as_those_before() -> None:
    layer = layer_of()
    layer.experts.bfloat16()
    with torch.no_grad():
        for x in (drawn(4, DIM).bfloat16(), drawn(4, DIM // 2)):
            layer(drawn(4, DIM))
            got, want = outcome(MoE.__call__, layer, x), outcome(the_long_way, layer, x)
            assert torch.equal(got, want) if isinstance(got, Tensor) else got is want


def test_a_hook_on_everything_is_called_from_then_on() -> None:
    layer, x, seen = layer_of(), drawn(4, DIM), []
    with torch.no_grad():
        layer(x)
        everywhere = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
        try:
            layer(x)
        finally:
            everywhere.remove()
    assert layer.router in seen


def _hook_on(part: Callable[[MoE], nn.Module]) -> Callable[[MoE], None]:
    return lambda layer: part(layer).register_forward_hook(lambda module, args, out: None)


def _swap_score(layer: MoE) -> None:
    torch.manual_seed(2)
    layer.router = TopK(k=3).build(DIM, 9)


def _pruned(layer: MoE) -> None:
    prune.random_unstructured(layer.experts, "up_EDG", 0.5)


def _turned(layer: MoE) -> None:
    weight = layer.experts.down_EFD
    weight.data = weight.detach().transpose(1, 2).contiguous().transpose(1, 2).mul_(2)


def _other_settings(layer: MoE) -> None:
    layer.router.config = TopK(k=1, renormalize=False)


def _loaded(layer: MoE) -> None:
    layer.load_state_dict({name: value * 2 for name, value in layer.state_dict().items()}, assign=True)


def _other_activation(layer: MoE) -> None:
    layer.experts.kind = "swiglu_clamped"
    layer.experts.activation = Activation.TABLE["swiglu_clamped"]


def _fewer_experts(layer: MoE) -> None:
    # where they lie, and nothing else
    layer.experts.up_EDG.data = layer.experts.up_EDG.data[:8]
    layer.experts.down_EFD.data = layer.experts.down_EFD.data[:8]
    layer.experts.num_experts = layer.router.num_experts = 8
    layer.router.score.weight_ED.data = layer.router.score.weight_ED.data[:8]


# between two calls: what is done to the layer
CHANGES: dict[str, Callable[[MoE], object]] = {
    "a hook on the experts": _hook_on(lambda layer: layer.experts),
    "a hook on the router": _hook_on(lambda layer: layer.router),
    "a hook on the score": _hook_on(lambda layer: layer.router.score),
    "another forward": lambda layer: setattr(layer.router.score, "forward", lambda x: -(x @ drawn(DIM, 9))),
    "another router": _swap_score,
    "another score": lambda layer: setattr(layer.router, "score", _Turned(DIM, 9, bias=False, init_std=1.0)),
    "weights of their own": lambda layer: layer.experts.up_EDG.data.mul_(2),
    "weights elsewhere": lambda layer: setattr(layer.experts.up_EDG, "data", layer.experts.up_EDG.data * 2),
    "weights that lie another way": _turned,
    "other parameters": lambda layer: setattr(
        layer.experts, "down_EFD", nn.Parameter(layer.experts.down_EFD.detach() * 2)
    ),
    "a router's weight elsewhere": lambda layer: setattr(
        layer.router.score.weight_ED, "data", -layer.router.score.weight_ED.data
    ),
    "weights loaded": _loaded,
    "weights pruned": _pruned,
    "another dtype": lambda layer: layer.experts.bfloat16(),
    "float64": lambda layer: layer.double(),
    "other settings": _other_settings,
    "another activation": _other_activation,
    "fewer experts": _fewer_experts,
    "8 bits": lambda layer: quantize_experts(nn.Sequential(layer)),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_layer_that_changed_since_is_not_what_it_was(case: str) -> None:
    layer, x = layer_of(), drawn(4, DIM)
    with torch.no_grad():
        before = layer(x)
        assert torch.equal(layer(x).y, before.y)
        CHANGES[case](layer)
        x = x.to(layer.router.score.weight_ED.dtype)
        got, want = layer(x), the_long_way(layer, x)
    alike(got, want)
    assert case.startswith("a hook") or not torch.equal(got.y, before.y)


def test_the_call_is_put_together_once(found: list[torch.dtype]) -> None:
    layer, full, half = layer_of(), torch.float32, torch.bfloat16
    with torch.no_grad():
        for num_tokens in (1, 4, 16):
            layer(drawn(num_tokens, DIM))
        assert found == [full]
        layer.experts.up_EDG.mul_(2)
        layer(drawn(1, DIM))
        assert found == [full]
        layer.train().eval()
        layer.bfloat16()
        layer(drawn(1, DIM).bfloat16())
        layer(drawn(2, DIM).bfloat16())
    assert found == [full, half]


def test_a_bias_that_was_widened_is_widened_anew(found: list[torch.dtype]) -> None:
    layer, x = layer_of(bias=True).bfloat16(), drawn(2, DIM).bfloat16()
    with torch.no_grad():
        before = layer(x).y
        layer.experts.down_bias_ED.add_(1)
        got = layer(x)
        alike(got, the_long_way(layer, x))
    assert not torch.equal(got.y, before)
    assert len(found) == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copied_layer_has_weights_of_its_own(copied: Callable[[MoE], MoE]) -> None:
    layer, x = layer_of(), drawn(2, DIM)
    with torch.no_grad():
        y = layer(x).y
        other = copied(layer)
        assert torch.equal(other(x).y, y)
        layer.experts.up_EDG.zero_()
        assert torch.equal(other(x).y, y)
        shared = copy.copy(layer)
        shared._modules = {**layer._modules, "experts": other.experts}
        assert torch.equal(shared(x).y, y)
        assert not layer(x).y.any()


def test_a_layer_that_nobody_has_goes_at_once() -> None:
    layer = layer_of()
    with torch.no_grad():
        layer(drawn(2, DIM))
    weight = weakref.ref(layer.experts.up_EDG)
    gc.disable()
    try:
        del layer
        assert weight() is None
    finally:
        gc.enable()


FREED: dict[str, Callable[[MoE], object]] = {
    "8 bits": lambda layer: quantize_experts(nn.Sequential(layer)),
    "fp8": lambda layer: quantize_experts(nn.Sequential(layer), precision="fp8"),
    "no memory": lambda layer: layer.to("meta"),
    "loaded": _loaded,
    "no experts": lambda layer: setattr(layer, "experts", None),
}


@pytest.mark.parametrize("case", FREED)
def test_weights_that_a_layer_no_longer_has_go_at_once(case: str) -> None:
    layer = layer_of()
    with torch.no_grad():
        layer(drawn(2, DIM))
    # a move leaves the parameter what it was, with other memory
    weight = weakref.ref(layer.experts.up_EDG.untyped_storage())
    gc.disable()
    try:
        FREED[case](layer)
        assert weight() is None
    finally:
        gc.enable()


def test_what_is_not_the_layers_own_is_not_kept(found: list[torch.dtype]) -> None:
    layer, x = layer_of(), drawn(2, DIM)
    _turned(layer)
    with torch.no_grad():
        for _ in range(2):
            layer(x)
    assert len(found) == 2
    assert layer._few._kept is None


def test_a_parametrization_that_starts_to_act_is_heeded() -> None:
    layer, x = layer_of(), drawn(4, DIM)

    class Switched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("on", torch.zeros(1))

        def forward(self, weight: Tensor) -> Tensor:
            return -weight if self.on else weight

    switch = Switched()
    parametrize.register_parametrization(layer.experts, "down_EFD", switch)
    with torch.no_grad():
        before = layer(x).y
        switch.on.fill_(1)
        assert torch.allclose(layer(x).y, -before, atol=1e-6)


def _short_bias(layer: MoE) -> None:
    layer.experts.down_bias_ED.data = torch.ones(2, DIM)


def _few_biases(layer: MoE) -> None:
    layer.experts.up_bias_EG.data = torch.ones(2, 48)


def _meta(layer: MoE) -> None:
    layer.experts.to("meta")


@pytest.mark.parametrize("num_tokens", [4, 40])
@pytest.mark.parametrize("spoil", [_short_bias, _few_biases, _meta])
def test_weights_that_end_too_early_are_refused_not_read_past(num_tokens: int, spoil: Callable[[MoE], None]) -> None:
    layer = layer_of(bias=True)
    x = drawn(num_tokens, DIM)
    with torch.no_grad():
        layer(x)
        spoil(layer)
        with pytest.raises(ShapeError, match="the experts' weights"):
            layer(x)


def test_threads_that_call_one_layer_at_once() -> None:
    layer = layer_of()
    tokens = [drawn(n, DIM) * (i + 1) for i, n in enumerate([1, 5, 16, 2] * 8)]
    with torch.no_grad():
        want = [layer(x).y for x in tokens]

    def computed(x: Tensor) -> Tensor:
        with torch.no_grad():
            return layer(x).y

    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(computed, tokens), want))


def test_a_shared_expert_sees_rows_and_its_dtype_does_not_come_out() -> None:
    layer, seen = layer_of(shared_hidden=8).bfloat16(), []

    def widened(module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
        seen.append(args[0].shape)
        return out.float()

    layer.shared.register_forward_hook(widened)
    x = drawn(2, 3, DIM).bfloat16()
    with torch.no_grad():
        alike(layer(x), the_long_way(layer, x))
    assert seen == [(6, DIM)] * 2


def test_ranks_form_losses_at_once_for_some_are_sums_over_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with torch.no_grad():
        assert layer_of()(drawn(4, DIM)).routed.formed is not None
    monkeypatch.undo()
    with torch.no_grad():
        assert layer_of()(drawn(4, DIM)).routed.formed is None


def test_a_call_that_is_wrong_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, call = trusted_kernel(), CompiledFew.__call__
    assert isinstance(kernel, Kernel)

    def off(change: Callable[[Tensor, RouterOutput], None]) -> str:
        def wrong(self: CompiledFew, x: Tensor) -> Any:
            y, route = call(self, x)
            routing = route()
            change(y, routing)
            return y, lambda: routing

        monkeypatch.setattr(CompiledFew, "__call__", wrong)
        return prove(kernel)

    monkeypatch.setattr(few_proof, "SIZES", few_proof.SIZES[-1:])
    assert off(lambda y, routing: None) == ""
    assert "inf" in off(lambda y, routing: y[0, 0].add_(0.5))
    assert "inf" in off(lambda y, routing: routing.assignment.choice_N[0].add_(1))
    assert "inf" in off(lambda y, routing: routing.scores_RE[0, 0].add_(1e-3))
