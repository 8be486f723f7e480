"""The decoder under every option of the published models: caching, training, padding, settings."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.shapes import ARCHITECTURES, small
from turnout.config import from_dict, override, to_dict
from turnout.dispatch import Dropless
from turnout.errors import ConfigError, ShapeError
from turnout.layers.attention import AttentionConfig
from turnout.layers.kv_cache import KVCache
from turnout.layers.mla import MLAConfig
from turnout.models import PRESETS, Decoder, ModelConfig, presets

LENGTH = 21


@pytest.mark.parametrize("chunks", [[1] * 21, [9, 1, 1, 10]], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_decoding_with_a_cache_equals_full_recomputation(name: str, chunks: list[int]) -> None:
    model = _model(_dropless(small(name))).eval()
    tokens_BS = _tokens(model)
    cache = KVCache(model.config.num_layers, LENGTH)
    with torch.inference_mode():
        want = model.logits(model(tokens_BS).h_BSD)
        parts = [model.logits(model(part, cache=cache).h_BSD) for part in tokens_BS.split(chunks, dim=1)]
    assert cache.length == LENGTH
    torch.testing.assert_close(torch.cat(parts, dim=1), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_parameter_learns(name: str, autocast: bool) -> None:
    model = _model(small(name))
    tokens_BS = _tokens(model)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = model.loss(tokens_BS[:, :-1], tokens_BS[:, 1:])
    loss.total.backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    assert dead == []
    assert len(loss.stats) == len(model.config.moe_layers())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_padding_holds_does_not_matter(name: str) -> None:
    model = _model(_dropless(small(name))).double().eval()
    tokens_BS = _tokens(model)
    mask_BS = torch.ones_like(tokens_BS, dtype=torch.bool)
    mask_BS[0, 15:] = mask_BS[1, 18:] = False
    other_BS = torch.where(mask_BS, tokens_BS, (tokens_BS + 1) % model.config.vocab_size)
    with torch.no_grad():
        one, other = (model(t, mask_BS=mask_BS).h_BSD[mask_BS] for t in (tokens_BS, other_BS))
        alone = model(tokens_BS[:1, :15]).h_BSD[0]
    assert torch.equal(one, other)
    torch.testing.assert_close(one[:15], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_from_the_meta_device_is_whole_once_its_weights_are_drawn(name: str) -> None:
    with torch.device("meta"):
        model = Decoder(small(name))
    model.to_empty(device="cpu")
    model.reset_parameters()
    assert all(tensor.isfinite().all() for tensor in (*model.parameters(), *model.buffers()))
    direct = dict(_model(small(name), spread=False).named_parameters())
    for key, weight in model.named_parameters():
        assert weight.std().item() == pytest.approx(direct[key].std().item(), rel=0.5, abs=1e-6), key


@pytest.mark.parametrize("name", PRESETS.names())
def test_a_preset_survives_its_own_text(name: str) -> None:
    config = PRESETS[name]()
    assert from_dict(ModelConfig, to_dict(config)) == config


def test_the_kind_of_attention_is_a_setting_like_any_other() -> None:
    data = override(to_dict(presets.tiny()), ["attention.name=mla", "attention.kv_rank=64"])
    assert from_dict(ModelConfig, data).attention == MLAConfig(kv_rank=64)


def test_learned_positions_tell_places_apart_and_need_attention_that_does_not_turn() -> None:
    model = _model(_dropless(small("deepspeed-350m-moe-128"))).eval()
    assert model.position_SD is not None
    same_BS = torch.full((1, 6), 7)
    assert not torch.allclose(*model(same_BS).h_BSD[0, [1, 5]])
    with torch.no_grad():
        model.position_SD.zero_()
    torch.testing.assert_close(*model(same_BS).h_BSD[0, [1, 5]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: replace(presets.tiny(), norm="batch"), r"unknown norm 'batch'; available: layer, rms"),
        (lambda: replace(presets.tiny(), ffn="swish"), r"unknown expert kind 'swish'.*did you mean"),
        (
            lambda: replace(presets.deepseek_v3(), positions="learned"),
            r"attention 'mla' .* needs model\.positions='rope'",
        ),
        (lambda: replace(presets.tiny(), init_std=-1.0), r"model\.init_std=-1\.0 must be at least 0 and finite"),
        (lambda: replace(presets.tiny(), init_std=float("nan")), r"model\.init_std=nan must be at least 0"),
        (lambda: replace(presets.tiny(), norm_eps=-1.0), r"model\.norm_eps=-1\.0 must be above 0 and finite"),
        (lambda: AttentionConfig(rope_theta=-1.0), r"attention\.rope_theta=-1\.0 must be above 1 and finite"),
        (lambda: MLAConfig(rope_theta=float("nan")), r"attention\.rope_theta=nan must be above 1 and finite"),
        (lambda: replace(presets.tiny(), dense_first=9), r"dense_first=9 must be in 0\.\.4"),
        (lambda: PRESETS["mixtral-8x7"], r"unknown model preset 'mixtral-8x7'.*did you mean 'mixtral-8x7b'"),
    ],
)
def test_a_wrong_setting_is_named_with_its_legal_values(make: Callable[[], object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make()


def test_a_sequence_longer_than_the_model_takes_is_refused() -> None:
    model = _model(small("olmoe-1b-7b"))
    with pytest.raises(ShapeError, match=r"65 tokens are more than model\.max_seq_len=64"):
        model(torch.zeros(1, 65, dtype=torch.int64))


def _model(config: ModelConfig, *, spread: bool = True) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(config)
    if spread:  # initial weights say little: biases are zero, routers undecided
        with torch.no_grad():
            for name, weight in model.named_parameters():
                nn.init.normal_(weight, mean=1.0 if "norm" in name and "bias" not in name else 0.0, std=0.1)
    return model


def _dropless(config: ModelConfig) -> ModelConfig:
    """With a capacity, what is dropped depends on which tokens come together."""
    assert config.moe is not None
    return replace(config, moe=replace(config.moe, capacity=Dropless()))


def _tokens(model: Decoder) -> Tensor:
    return torch.randint(model.config.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(1))
