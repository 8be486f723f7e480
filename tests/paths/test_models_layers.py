"""The fused pieces of the decoder against the plain formulas they stand for."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from turnout.layers import lm_loss as lm_loss_file
from turnout.layers.lm_loss import IGNORE, lm_loss
from turnout.layers.mlp import MLP
from turnout.layers.norm import NORMS, RMSNorm


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 64])
@pytest.mark.parametrize("rows_at_a_time", [1, 5, 1000])
def test_next_token_loss_and_its_gradients_equal_cross_entropy(
    num_tokens: int, rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_loss_file, "_CHUNK_BYTES", rows_at_a_time * 4 * 11)
    h_TD, weight_VD = _leaf(num_tokens, 6), _leaf(11, 6)
    target_T = torch.randint(11, (num_tokens,))
    target_T[::3] = IGNORE
    got = 3 * lm_loss(h_TD, weight_VD, target_T)
    counted = target_T != IGNORE
    want = 3 * F.cross_entropy(h_TD @ weight_VD.t(), target_T, reduction="sum") / max(int(counted.sum()), 1)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got, (h_TD, weight_VD)), torch.autograd.grad(want, (h_TD, weight_VD))
    )


def test_next_token_loss_holds_for_logits_far_out() -> None:
    h_TD, weight_VD = torch.full((1, 1), 1e4), torch.tensor([[1.0], [0.0], [-1.0]])
    assert lm_loss(h_TD, weight_VD, torch.tensor([1])).item() == 1e4


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4, 5), (0, 5)], ids=str)
def test_root_mean_square_norm_and_its_gradients_equal_the_formula(shape: tuple[int, ...]) -> None:
    norm, x = RMSNorm(5, eps=1e-3).double(), _leaf(*shape)
    torch.nn.init.normal_(norm.weight_D)
    got = norm(x)
    want = x / (x.square().mean(dim=-1, keepdim=True) + 1e-3).sqrt() * norm.weight_D
    torch.testing.assert_close(got, want)
    inputs, pull = (x, norm.weight_D), torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(got, inputs, pull), torch.autograd.grad(want, inputs, pull))
    with torch.no_grad():
        assert torch.equal(norm(x), got)


@pytest.mark.parametrize("name", NORMS.names())
def test_a_norm_computes_in_float32_and_gives_back_the_dtype_it_got(name: str) -> None:
    x = 100 + torch.randn(4, 64)
    norm = NORMS[name](64, eps=1e-5)
    got, want = norm.to(torch.bfloat16)(x.bfloat16()), norm.float()(x.bfloat16().float())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=0.01, atol=0.01)


def test_a_feed_forward_network_adds_its_biases() -> None:
    plain, biased = MLP(4, 6, kind="gelu"), MLP(4, 6, kind="gelu", bias=True)
    biased.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(3, 4)
    assert torch.equal(biased(x), plain(x))
    assert biased.up_bias_G is not None
    assert biased.down_bias_D is not None
    torch.nn.init.normal_(biased.up_bias_G)
    torch.nn.init.normal_(biased.down_bias_D)
    want = F.gelu(x @ plain.up_GD.t() + biased.up_bias_G) @ plain.down_DF.t() + biased.down_bias_D
    torch.testing.assert_close(biased(x), want)


def _leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_()
