"""Attention of every kind against one written from the papers: head by head, token by token, in float64."""

import cmath
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from turnout.errors import ConfigError, RequestError
from turnout.layers.attention import Attention, AttentionConfig, AttentionKind
from turnout.layers.kv_cache import KVCache
from turnout.layers.mla import MLA, MLAConfig
from turnout.layers.rope import Yarn

DIM, LENGTH = 10, 7
GQA = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6)
LATENT = MLAConfig(num_heads=3, kv_rank=5, nope_dim=4, rope_dim=2, v_dim=3)
KINDS: dict[str, AttentionKind] = {
    "plain": replace(GQA, num_kv_heads=4),
    "grouped": GQA,
    "bias": replace(GQA, bias=True),
    "norm per head": replace(GQA, qk_norm="head"),
    "norm over heads": replace(GQA, qk_norm="full"),
    "sinks": replace(GQA, sinks=True),
    "smeared keys": replace(GQA, smear_keys=True),
    "window": replace(GQA, window=3),
    "window of one": replace(GQA, window=1),
    "window longer than the text": replace(GQA, window=50),
    "yarn": replace(GQA, rope_theta=100.0, yarn=Yarn(factor=4.0, trained_length=64)),
    "all together": replace(
        GQA, bias=True, qk_norm="head", smear_keys=True, sinks=True, window=2, yarn=Yarn(trained_length=64)
    ),
    "mla": LATENT,
    "mla with query rank": replace(LATENT, q_rank=6),
    "mla with yarn": replace(LATENT, q_rank=6, yarn=Yarn(trained_length=64)),
}


@pytest.mark.parametrize("masked", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("name", KINDS)
def test_attention_and_its_gradients_equal_the_plain_reference(name: str, masked: bool) -> None:
    layer = _layer(KINDS[name])
    x_BSD = torch.randn(2, LENGTH, DIM, dtype=torch.float64).requires_grad_()
    mask_BS = torch.ones(2, LENGTH, dtype=torch.bool)
    mask_BS[0, 5:], mask_BS[1, :2] = not masked, not masked
    rope = KINDS[name].rope(0, LENGTH, x_BSD.device)
    got = layer(x_BSD, rope, mask_BS=mask_BS if masked else None)
    reference = mla if isinstance(layer, MLA) else gqa
    want = torch.stack([reference(layer, x_SD, mask_S) for x_SD, mask_S in zip(x_BSD, mask_BS, strict=True)])
    pull = torch.randn_like(got) * mask_BS.unsqueeze(2)
    # the angles are float32
    torch.testing.assert_close(got * mask_BS.unsqueeze(2), want * mask_BS.unsqueeze(2), rtol=1e-5, atol=1e-5)
    inputs = [x_BSD, *layer.parameters()]
    got_grads, want_grads = (torch.autograd.grad((y * pull).sum(), inputs) for y in (got, want))
    torch.testing.assert_close(got_grads, want_grads, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("chunks", [[7], [1] * 7, [4, 3], [3, 1, 2, 1], [1, 6]], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_a_cache_changes_nothing(name: str, chunks: list[int]) -> None:
    kind, layer = KINDS[name], _layer(KINDS[name])
    x_BSD = torch.randn(2, LENGTH, DIM, dtype=torch.float64)
    cache, parts = KVCache(3, LENGTH + 2), []
    with torch.no_grad():
        want = layer(x_BSD, kind.rope(0, LENGTH, x_BSD.device))
        for part in x_BSD.split(chunks, dim=1):
            length = part.shape[1]
            parts.append(layer(part, kind.rope(cache.length, length, part.device), cache=cache, layer=2))
            cache.length += length
    torch.testing.assert_close(torch.cat(parts, dim=1), want, rtol=1e-9, atol=1e-10)


def test_no_token_sees_what_comes_after_it() -> None:
    for kind in KINDS.values():
        layer, rope = _layer(kind), kind.rope(0, LENGTH, torch.device("cpu"))
        x_BSD = torch.randn(1, LENGTH, DIM, dtype=torch.float64)
        changed = x_BSD.clone()
        changed[:, 4:] += 1
        assert torch.equal(layer(x_BSD, rope)[:, :4], layer(changed, rope)[:, :4])


@pytest.mark.parametrize(("full_every", "seeing_all"), [(0, []), (1, [0, 1, 2, 3]), (2, [1, 3]), (3, [2])])
def test_every_nth_block_of_a_windowed_model_sees_all(full_every: int, seeing_all: list[int]) -> None:
    config = replace(GQA, window=3, full_every=full_every)
    assert [i for i in range(4) if config.window_of(i) == 0] == seeing_all


def test_without_a_stretch_yarn_is_plain_rope() -> None:
    plain, stretched = replace(GQA), replace(GQA, yarn=Yarn(factor=1.0))
    for got, want in zip(stretched.rope(3, 9, _CPU), plain.rope(3, 9, _CPU), strict=True):
        torch.testing.assert_close(got, want)
    assert Yarn(factor=1.0).logit_scale == 1.0


def test_the_latent_cache_is_as_small_as_promised() -> None:
    layer, cache = _layer(LATENT), KVCache(1, LENGTH)
    with torch.no_grad():
        layer(torch.randn(1, LENGTH, DIM, dtype=torch.float64), LATENT.rope(0, LENGTH, _CPU), cache=cache)
    (stored,) = cache.append(0, torch.zeros(1, 1, 0, LATENT.kv_rank + LATENT.rope_dim))
    assert stored.shape[3] == LATENT.kv_rank + LATENT.rope_dim


def test_a_full_cache_and_padding_with_a_past_are_refused() -> None:
    layer, cache = _layer(GQA), KVCache(1, 4)
    x_BSD, rope = torch.randn(1, 3, DIM, dtype=torch.float64), GQA.rope(0, 3, _CPU)
    layer(x_BSD, rope, cache=cache)
    cache.length = 3
    with pytest.raises(RequestError, match=r"6 tokens do not fit .* max_length=4"):
        layer(x_BSD, rope, cache=cache)
    cache.length = 1
    with pytest.raises(RequestError, match=r"padding mask together with a filled key-value cache"):
        layer(x_BSD, rope, cache=cache, mask_BS=torch.ones(1, 3, dtype=torch.bool))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: replace(GQA, num_kv_heads=3), r"num_kv_heads=3 must divide num_heads=4; legal: \[1, 2, 4\]"),
        (lambda: replace(GQA, head_dim=5), r"head_dim=5 must be even"),
        (lambda: replace(GQA, window=-1), r"attention\.window=-1 must be at least 0"),
        (lambda: replace(GQA, qk_norm="rows"), r"qk_norm='rows' must be one of: none, head, full"),
        (lambda: replace(LATENT, rope_dim=3), r"rope_dim=3 must be even"),
        (lambda: replace(LATENT, kv_rank=0), r"attention\.kv_rank=0 must be at least 1"),
        (lambda: Yarn(factor=0.5), r"yarn\.factor=0\.5 .* must be at least 1"),
    ],
)
def test_a_wrong_setting_is_named_with_its_legal_values(make: Callable[[], object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make()


_CPU = torch.device("cpu")


def _layer(kind: AttentionKind) -> nn.Module:
    torch.manual_seed(0)
    layer = kind.build(DIM, layer=0, init_std=0.5, norm_eps=1e-6).double()
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            if any(part in name for part in ("bias", "norm", "sink", "smear")):
                weight.add_(torch.randn_like(weight))
    return layer


def gqa(layer: nn.Module, x_SD: Tensor, mask_S: Tensor) -> Tensor:
    assert isinstance(layer, Attention)
    config = layer.config
    heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_dim
    rows = x_SD @ layer.qkv.T + (0 if layer.qkv_bias is None else layer.qkv_bias)
    q, k, v = rows.split([heads * width, kv_heads * width, kv_heads * width], dim=1)
    if config.qk_norm != "none":
        q, k = _normed(q, layer.q_norm), _normed(k, layer.k_norm)
    outputs = []
    for h in range(heads):
        g = h * kv_heads // heads
        sink = None if layer.sink_H is None else layer.sink_H[h]
        q_SX, k_SX, v_SX = (x[:, i * width : (i + 1) * width] for x, i in ((q, h), (k, g), (v, g)))
        q_SX, k_SX = (_turned(x, config.rope_theta, config.yarn) for x in (q_SX, k_SX))
        if layer.smear_H is not None:
            own = 1 / (1 + torch.exp(-layer.smear_H[g]))
            mixed = [own * k_SX[t] + (1 - own) * k_SX[t - 1] for t in range(1, len(k_SX))]
            plain = [not mask_S[t - 1] for t in range(1, len(k_SX))]
            k_SX = torch.stack([k_SX[0], *(k_SX[t + 1] if plain[t] else mixed[t] for t in range(len(mixed)))])
        scale = (1 if config.yarn is None else (0.1 * math.log(config.yarn.factor) + 1) ** 2) / math.sqrt(width)
        outputs.append(_head(q_SX, k_SX, v_SX, mask_S, scale=scale, window=config.window, sink=sink))
    return torch.cat(outputs, dim=1) @ layer.out.T + (0 if layer.out_bias is None else layer.out_bias)


def mla(layer: nn.Module, x_SD: Tensor, mask_S: Tensor) -> Tensor:
    """Source: DeepSeek-AI 2024, arXiv:2412.19437, eq. 1-11."""
    assert isinstance(layer, MLA)
    config = layer.config
    low = x_SD if layer.q_down is None else _normed(x_SD @ layer.q_down.T, layer.q_norm)
    q_by_head = (low @ layer.q_up.T).chunk(config.num_heads, dim=1)
    latent, shared_key = (x_SD @ layer.kv_down.T).split([config.kv_rank, config.rope_dim], dim=1)
    kv_by_head = (_normed(latent, layer.kv_norm) @ layer.kv_up.T).chunk(config.num_heads, dim=1)
    scale = 1 if config.yarn is None else (0.1 * math.log(config.yarn.factor) + 1) ** 2
    outputs = []
    for q, kv in zip(q_by_head, kv_by_head, strict=True):
        q_nope, q_rope = q.split([config.nope_dim, config.rope_dim], dim=1)
        k_nope, v_SX = kv.split([config.nope_dim, config.v_dim], dim=1)
        q_SX = torch.cat([q_nope, _turned(q_rope, config.rope_theta, config.yarn)], dim=1)
        k_SX = torch.cat([k_nope, _turned(shared_key, config.rope_theta, config.yarn)], dim=1)
        outputs.append(_head(q_SX, k_SX, v_SX, mask_S, scale=scale / math.sqrt(q_SX.shape[1]), window=0, sink=None))
    return torch.cat(outputs, dim=1) @ layer.out.T


def _head(
    q_SX: Tensor, k_SX: Tensor, v_SX: Tensor, mask_S: Tensor, *, scale: float, window: int, sink: Tensor | None
) -> Tensor:
    rows = []
    for t in range(len(q_SX)):
        first = max(0, t + 1 - window) if window else 0
        seen = [s for s in range(first, t + 1) if mask_S[s] or s == t]
        weights = [torch.exp(scale * q_SX[t] @ k_SX[s]) for s in seen]
        total = sum(weights) + (0 if sink is None else torch.exp(sink))
        rows.append(sum(weight * v_SX[s] for weight, s in zip(weights, seen, strict=True)) / total)
    return torch.stack(rows)


def _turned(x_SX: Tensor, theta: float, yarn: Yarn | None) -> Tensor:
    """Pair (i, i + X/2) as one complex number, times exp(i t frequency_i)."""
    half = x_SX.shape[1] // 2
    pairs = torch.complex(x_SX[:, :half], x_SX[:, half:])
    turns = [[cmath.exp(1j * t * _frequency(i, half, theta, yarn)) for i in range(half)] for t in range(len(x_SX))]
    turned = pairs * torch.tensor(turns, dtype=torch.complex128)
    return torch.cat([turned.real, turned.imag], dim=1)


def _frequency(i: int, half: int, theta: float, yarn: Yarn | None) -> float:
    """Source: Peng et al. 2023, arXiv:2309.00071, eq. 14-17 and 22-23, the ramp over dimensions as it was released."""
    plain = theta ** (-i / half)
    if yarn is None:
        return plain
    ends = [half * math.log(yarn.trained_length / (n * 2 * math.pi), theta) for n in (yarn.fast, yarn.slow)]
    low, high = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), 2 * half - 1)
    slowed = min(max((i - low) / (high - low), 0), 1)
    return plain * (1 - slowed) + plain / yarn.factor * slowed


def _normed(x: Tensor, norm: nn.Module) -> Tensor:
    weight_D = norm.get_parameter("weight_D")
    parts = x.split(len(weight_D), dim=1)
    return torch.cat([p / (p.square().mean(dim=1, keepdim=True) + 1e-6).sqrt() * weight_D for p in parts], dim=1)
