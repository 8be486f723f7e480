"""Layers that are not plain assignment, against loops: soft MoE, mixture-of-depths, latent experts."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.contracts.cases import error
from turnout import MoE, reference
from turnout.contracts import Router
from turnout.errors import ConfigError, RequestError, ShapeError
from turnout.layers.attention import AttentionConfig
from turnout.layers.kv_cache import KVCache
from turnout.layers.latent import Latent
from turnout.layers.mixture_of_depths import MixtureOfDepths, most_of
from turnout.layers.soft_moe import SoftMoE
from turnout.tensors import RouterOutput


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradients(module: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """Of a weighed sum of y, in x and every parameter."""
    weighing = draw(*y.shape, seed=9)
    return list(torch.autograd.grad((y * weighing).sum(), [x, *module.parameters()], materialize_grads=True))


# soft MoE


def soft_moe_by_loops(layer: SoftMoE, x_BSD: Tensor, mask_BS: Tensor) -> Tensor:
    """Slot by slot and token by token, on the real tokens of each sequence alone."""
    num_experts, slots, dim = layer.slot_ECD.shape
    slot_MD = layer.slot_ECD.reshape(num_experts * slots, dim)
    sequences = []
    for x_SD, mask_S in zip(x_BSD, mask_BS, strict=True):
        y_SD = torch.zeros_like(x_SD)
        x_RD = x_SD[mask_S]
        if len(x_RD):
            left_RD, right_MD = x_RD, slot_MD
            if layer.scale is not None:
                left_RD = x_RD / x_RD.norm(dim=1, keepdim=True)
                right_MD = layer.scale * slot_MD / slot_MD.norm(dim=1, keepdim=True)
            exp_RM = torch.exp(left_RD @ right_MD.T)
            y_MD = []
            for m in range(num_experts * slots):
                mixture_D = sum(exp_RM[r, m] * x_RD[r] for r in range(len(x_RD))) / exp_RM[:, m].sum()
                e = m // slots
                y_MD.append(
                    reference.ffn(
                        mixture_D.unsqueeze(0), layer.experts.up_EDG[e], layer.experts.down_EFD[e], kind="swiglu"
                    )[0]
                )
            rows = [sum(exp_RM[r, m] * y_MD[m] for m in range(len(y_MD))) / exp_RM[r].sum() for r in range(len(x_RD))]
            y_SD = y_SD.index_put((mask_S.nonzero().flatten(),), torch.stack(rows))
        sequences.append(y_SD)
    return torch.stack(sequences)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("backend", ["loop", "padded_bmm"])
@pytest.mark.parametrize(("num_experts", "slots"), [(1, 1), (3, 2), (5, 1)])
def test_soft_moe_equals_the_loops(normalize: bool, backend: str, num_experts: int, slots: int) -> None:
    torch.manual_seed(0)
    layer = SoftMoE(7, 5, num_experts, slots=slots, normalize=normalize, backend=backend, init_std=0.5).double()
    if layer.scale is not None:
        nn.init.constant_(layer.scale, 3.0)
    x, mask = draw(4, 6, 7).requires_grad_(), torch.rand(4, 6) > 0.3
    mask[2] = False
    got, want = layer(x, mask=mask).y, soft_moe_by_loops(layer, x, mask)
    assert error(got, want) < 1e-13
    for a, b in zip(gradients(layer, x, got), gradients(layer, x, want), strict=True):
        assert error(a, b) < 1e-12


def test_slots_are_means_of_tokens_and_outputs_means_of_slots() -> None:
    layer = SoftMoE(6, 5, 3, slots=2).double()
    mask = torch.tensor([[True] * 4 + [False] * 3, [False] * 7])
    out = layer(draw(2, 7, 6), mask=mask)
    ones = torch.ones(3, 2, dtype=torch.float64)
    assert error(out.dispatch_BSEC.sum(dim=1), torch.stack([ones, 0 * ones])) < 1e-14
    assert error(out.combine_BSEC.flatten(2).sum(dim=2), mask.double()) < 1e-14
    assert not out.dispatch_BSEC[~mask].any()
    assert not out.y[~mask].any()
    assert layer.causal is False


def test_padding_gives_nothing_to_a_sequence_and_takes_nothing_whatever_it_holds() -> None:
    layer = SoftMoE(6, 5, 3, slots=2).double()
    x = draw(2, 9, 6)
    mask = torch.arange(9).expand(2, 9) < torch.tensor([[4], [9]])
    dirty = x.masked_fill(~mask.unsqueeze(2), torch.nan).requires_grad_()
    y = layer(dirty, mask=mask).y
    y.square().sum().backward()
    assert error(y[0, :4], layer(x[0, :4]).y) < 1e-14
    assert error(y[1], layer(x[1]).y) < 1e-14
    assert dirty.grad is not None
    assert dirty.grad[mask].isfinite().all()
    assert not dirty.grad[~mask].any()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_normalised_logits_do_not_see_the_length_of_a_token() -> None:
    layer = SoftMoE(6, 5, 3, slots=2).double()
    x = draw(2, 5, 6)
    assert error(layer(x * 7.0).combine_BSEC, layer(x).combine_BSEC) < 1e-14


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (0, 3, 6), (1, 6), (2, 1, 3, 6)])
def test_soft_moe_takes_any_number_of_sequences_and_tokens(shape: tuple[int, ...]) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        layer = SoftMoE(6, 5, 3, slots=2, bias=True).to(dtype)
        out = layer(torch.randn(shape).to(dtype), mask=torch.ones(shape[:-1], dtype=torch.bool))
        assert out.y.shape == shape
        assert out.y.dtype == dtype
        out.y.sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_soft_moe_computes_its_weights_in_float32_under_autocast_and_in_bfloat16() -> None:
    layer, x = SoftMoE(16, 8, 3, slots=2), torch.randn(2, 9, 16).bfloat16()
    want = layer(x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = layer(x.float())
    assert torch.equal(under_autocast.combine_BSEC, want.combine_BSEC)
    assert error(under_autocast.y.double(), want.y.double()) < 1e-2
    low = layer.bfloat16()(x)
    assert low.combine_BSEC.dtype == torch.float32


def test_the_logits_and_the_two_mixtures_cost_what_the_page_says() -> None:
    batch, length, dim, num_experts, slots = 2, 7, 8, 3, 5
    layer = SoftMoE(dim, 4, num_experts, slots=slots, backend="padded_bmm")
    with FlopCounterMode(display=False) as forward:
        y = layer(torch.randn(batch, length, dim, requires_grad=True)).y
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    rows = batch * num_experts * slots
    experts = 2 * rows * dim * sum(p[0].numel() for p in layer.experts.parameters()) // dim
    mixtures = 3 * 2 * length * rows * dim
    assert forward.get_total_flops() == experts + mixtures
    assert backward.get_total_flops() == 2 * (experts + mixtures)


def test_soft_moe_refuses_what_does_not_fit() -> None:
    for setting in ("num_experts", "hidden", "slots"):
        sizes = {"hidden": 4, "num_experts": 2, setting: 0}
        with pytest.raises(ConfigError, match=rf"soft_moe\.{setting}=0 must be at least 1"):
            SoftMoE(6, **sizes)
    layer = SoftMoE(6, 5, 3)
    for shape in ((3, 5), (6,)):
        with pytest.raises(ShapeError, match=r"x has shape .*; the layer needs \(\.\.\., sequence, dim=6\)"):
            layer(torch.zeros(shape))
    for mask in (torch.ones(2, 3), torch.ones(6).bool()):
        with pytest.raises(ShapeError, match=r"mask has shape .* needs \(2, 3\) torch\.bool"):
            layer(torch.zeros(2, 3, 6), mask=mask)


# mixture-of-depths


class RunningMean(nn.Module):
    """A causal block whose branch sees earlier rows, and whose rows know their place in the sequence."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x_BCD: Tensor, *, position_BC: Tensor, mask_BC: Tensor) -> Tensor:
        weight_BC1 = mask_BC.to(x_BCD.dtype).unsqueeze(2)
        mean_BCD = (x_BCD * weight_BC1).cumsum(dim=1) / weight_BC1.cumsum(dim=1).clamp(min=1)
        return x_BCD + torch.tanh(self.linear(mean_BCD)) * (1 + position_BC.unsqueeze(2))


def depths_by_loops(layer: MixtureOfDepths, x_BSD: Tensor, mask_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Sequence by sequence, token by token."""
    block = layer.block
    assert isinstance(block, RunningMean)
    y_BSD, chosen_BS = x_BSD.clone(), torch.zeros_like(mask_BS)
    for b, x_SD in enumerate(x_BSD):
        real = mask_BS[b].nonzero().flatten().tolist()
        r_S = [(layer.score.weight_ED[0] * x_D).sum() for x_D in x_SD]
        best = sorted(real, key=lambda s: (-float(r_S[s].detach()), s))[: math.ceil(layer.capacity * len(real))]
        seen: list[Tensor] = []
        for s in sorted(best):
            seen.append(x_SD[s])
            branch_D = torch.tanh(block.linear(torch.stack(seen).mean(dim=0))) * (1 + s)
            y_BSD[b, s] = x_SD[s] + r_S[s] * branch_D
            chosen_BS[b, s] = True
    return y_BSD, chosen_BS


def depths(dim: int = 6, **settings: object) -> MixtureOfDepths:
    torch.manual_seed(0)
    block = RunningMean(dim)
    return MixtureOfDepths(block, dim, block_takes_positions=True, init_std=0.5, **settings).double()  # type: ignore[arg-type]


@pytest.mark.parametrize("capacity", [0.125, 0.3, 0.5, 1.0])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 7), (4, 16), (2, 33)])
def test_mixture_of_depths_equals_the_loops(capacity: float, batch: int, length: int) -> None:
    layer = depths(capacity=capacity)
    x, mask = draw(batch, length, 6).requires_grad_(), torch.rand(batch, length) > 0.3
    mask[0] = length > 10
    out = layer(x, mask=mask)
    want_y, want_chosen = depths_by_loops(layer, x, mask)
    assert torch.equal(out.chosen_BS, want_chosen)
    assert error(out.y, want_y) < 1e-13
    for got, want in zip(gradients(layer, x, out.y), gradients(layer, x, want_y), strict=True):
        assert error(got, want) < 1e-12


def test_equal_weights_choose_the_earlier_tokens() -> None:
    layer = depths(capacity=0.3)
    assert layer(torch.ones(2, 10, 6, dtype=torch.float64)).chosen_BS.tolist() == [[True] * 3 + [False] * 7] * 2


@settings(max_examples=200)
@given(num_tokens=st.integers(0, 10_000), percent=st.integers(1, 100))
def test_the_capacity_is_the_least_integer_not_below_the_share(num_tokens: int, percent: int) -> None:
    assert most_of(num_tokens, percent / 100) == -(-num_tokens * percent // 100)


def test_a_block_without_positions_gets_the_chosen_rows_alone() -> None:
    seen = []

    def block(x_BCD: Tensor) -> Tensor:
        seen.append(x_BCD)
        return 3 * x_BCD

    layer = MixtureOfDepths(block, 6, capacity=0.25).double()
    x = draw(2, 8, 6)
    out = layer(x)
    assert torch.equal(seen[0], x[out.chosen_BS].view(2, 2, 6))
    weight_BS = (x * layer.score.weight_ED[0]).sum(dim=2)
    want = torch.where(out.chosen_BS.unsqueeze(2), x + weight_BS.unsqueeze(2) * 2 * x, x)
    assert error(out.y, want) < 1e-14


def test_padding_passes_by_takes_no_capacity_and_is_not_seen() -> None:
    layer = depths(capacity=0.5)
    x = draw(2, 9, 6)
    mask = torch.arange(9).expand(2, 9) < torch.tensor([[4], [9]])
    dirty = x.masked_fill(~mask.unsqueeze(2), torch.nan).requires_grad_()
    out = layer(dirty, mask=mask)
    assert out.chosen_BS.sum(dim=1).tolist() == [2, 5]
    assert error(out.y[0, :4], layer(x[:1, :4]).y[0]) < 1e-14
    assert out.y[~mask].isnan().all()
    (out.y[mask].square().sum() + out.losses[0].value).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert dirty.grad is not None
    assert dirty.grad[mask].isfinite().all()


def test_the_predictor_learns_who_was_chosen_and_its_loss_moves_nothing_else() -> None:
    layer = depths(capacity=0.3, predictor_coefficient=0.5)
    x, mask = draw(3, 10, 6).requires_grad_(), torch.rand(3, 10) > 0.2
    out = layer(x, mask=mask)
    (term,) = out.losses
    assert (term.name, term.coefficient) == ("depth_predictor", 0.5)
    predictor = layer.predictor
    assert predictor.bias_E is not None
    guess_BS = torch.sigmoid((x.detach() * predictor.weight_ED[0]).sum(dim=2) + predictor.bias_E)
    right_BS = torch.where(out.chosen_BS, guess_BS, 1 - guess_BS)
    assert error(term.value, -right_BS[mask].log().mean()) < 1e-14
    moved = torch.autograd.grad(term.value, [x, *layer.parameters()], allow_unused=True)
    names = ["x", *(name for name, _ in layer.named_parameters())]
    assert {n for n, g in zip(names, moved, strict=True) if g is not None} == {
        "predictor.weight_ED",
        "predictor.bias_E",
    }


def test_evaluation_by_the_predictor_is_causal_and_by_the_top_is_training_again() -> None:
    layer, x = depths(capacity=0.3), draw(3, 10, 6)
    trained = layer(x)
    layer.eval()
    with torch.no_grad():
        out = layer(x)
        guess_BS = layer.predictor(x).squeeze(2)
        assert torch.equal(out.chosen_BS, guess_BS > 0)
        assert len(set(out.chosen_BS.sum(dim=1).tolist())) > 1
        for length in range(10):
            assert error(layer(x[:, :length]).y, out.y[:, :length]) < 1e-14
    again = depths(capacity=0.3, evaluation="top").eval()
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x).y, trained.y)


@pytest.mark.parametrize("shape", [(0, 3, 6), (2, 0, 6), (1, 1, 6)])
def test_depths_take_any_number_of_tokens(shape: tuple[int, ...]) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for training in (True, False):
            layer = depths().to(dtype).train(training)
            out = layer(torch.zeros(shape, dtype=dtype), mask=torch.ones(shape[:2], dtype=torch.bool))
            assert out.y.shape == shape
            assert out.y.dtype == dtype
            (out.y.sum() + out.losses[0].value).backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_mixture_of_depths_refuses_what_does_not_fit() -> None:
    for capacity in (0.0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match=r"mixture_of_depths\.capacity=.* must be above 0 and at most 1"):
            depths(capacity=capacity)
    with pytest.raises(ConfigError, match=r"evaluation='tpo' must be one of: predictor, top"):
        depths(evaluation="tpo")
    with pytest.raises(ConfigError, match=r"predictor_coefficient=-1\.0 must be at least 0"):
        depths(predictor_coefficient=-1.0)
    for shape in ((3, 6), (2, 3, 5)):
        with pytest.raises(ShapeError, match=r"x has shape .*; the wrapper needs \(batch, sequence, dim=6\)"):
            depths()(torch.zeros(shape, dtype=torch.float64))
    for mask in (torch.ones(2, 3), torch.ones(6).bool()):
        with pytest.raises(ShapeError, match=r"mask has shape .* needs \(2, 3\) torch\.bool"):
            depths()(torch.zeros(2, 3, 6, dtype=torch.float64), mask=mask)


# latent experts


def test_latent_projections_are_two_products_that_padding_does_not_reach() -> None:
    latent = Latent(7, 3, init_std=0.5).double()
    x_TD, mask_T = draw(6, 7), torch.tensor([True, False, True, True, False, True])
    dirty_TD = x_TD.masked_fill(~mask_T.unsqueeze(1), torch.nan)
    y_TZ = latent.down(dirty_TD, mask_T)
    y_TD = latent.up(y_TZ)
    assert error(y_TD[mask_T], x_TD[mask_T] @ latent.down_ZD.T @ latent.up_DZ.T) < 1e-14
    assert not y_TD[~mask_T].any()
    y_TD.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in latent.parameters())
    before = latent.down_ZD.detach().clone()
    latent.reset_parameters()
    assert not torch.equal(latent.down_ZD, before)


@pytest.mark.parametrize("padded", [False, True])
def test_a_layer_of_latent_experts_is_the_narrow_layer_between_two_projections(padded: bool) -> None:
    """Router and shared expert see the full width."""
    torch.manual_seed(0)
    wide = MoE(7, 5, 4, latent_dim=3, shared_hidden=6, init_std=0.5).double()
    x, latent = draw(3, 9, 7), wide.latent
    mask = torch.rand(3, 9) > 0.4 if padded else None
    assert latent is not None
    assert isinstance(wide.router, Router)
    assert wide.shared is not None
    routing = wide.router(x.reshape(-1, 7), None, None if mask is None else mask.flatten())
    narrow = MoE(3, 5, 4, router=GivenAssignment(routing), init_std=0.5).double()
    narrow.experts.load_state_dict(wide.experts.state_dict())
    dirty = x if mask is None else x.masked_fill(~mask.unsqueeze(2), torch.nan)
    out = wide(dirty, mask=mask)
    want = narrow((x @ latent.down_ZD.T).reshape(-1, 3)).y.view(3, 9, 3) @ latent.up_DZ.T
    shared = wide.shared(x)
    want = want + (shared if mask is None else shared * mask.unsqueeze(2))
    assert error(out.y, want) < 1e-14
    (out.y.square().sum() + sum(term.value for term in out.losses)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in wide.parameters())
    assert MoE.from_config(7, wide.config).latent is not None


class GivenAssignment(nn.Module):
    """A router that has already chosen."""

    def __init__(self, routing: RouterOutput) -> None:
        super().__init__()
        self.routing = routing

    def forward(self, *_: object) -> RouterOutput:
        return self.routing


def test_smeared_keys_refuse_padding_after_a_past_as_plain_ones_do() -> None:
    for smear_keys in (False, True):
        config = AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=4, smear_keys=smear_keys)
        attention = config.build(8, layer=0, init_std=0.02, norm_eps=1e-6)
        cache = KVCache(1, max_length=8)
        attention(torch.randn(1, 4, 8), None, cache=cache)
        cache.length = 4
        with pytest.raises(RequestError, match="a padding mask together with a filled key-value cache"):
            attention(torch.randn(1, 3, 8), None, mask_BS=torch.ones(1, 3).bool(), cache=cache)
