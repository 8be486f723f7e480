"""Parameter counts, FLOPs and memory against published numbers, counting and measuring."""

import time
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from turnout.errors import ConfigError
from turnout.layers.attention import AttentionConfig
from turnout.layers.mla import MLAConfig
from turnout.layers.moe import MoEConfig
from turnout.models import PRESETS, Decoder, ModelConfig, presets
from turnout.models.memory import train_memory
from turnout.models.size import attention_flops_per_token, matmul_flops_per_token, sizes
from turnout.routers import TopK

# (preset, total, relative tolerance, active, relative tolerance, embeddings count as active)
# Exact totals are those of transformers' models of the published config.json, see test_models_hf.py.
PUBLISHED = [
    # Jiang et al. 2024, arXiv:2401.04088, section 2: "47B", "13B"; Mistral's announcement: 46.7B, 12.9B
    ("mixtral-8x7b", 46_702_792_704, 0, 12.9e9, 0.005, True),
    # Mistral's announcement of 8x22B: "39B active parameters out of 141B"
    ("mixtral-8x22b", 140_620_634_112, 0, 39e9, 0.01, True),
    # DeepSeek-AI 2024, arXiv:2412.19437, abstract: "671B total parameters with 37B activated for each token"
    ("deepseek-v3", 671_026_404_352, 0, 37e9, 0.02, True),
    # Qwen team 2025, arXiv:2505.09388, section 2: 30B-A3B; model card: "30.5B in total and 3.3B activated"
    ("qwen3-30b-a3b", 30_532_122_624, 0, 3.3e9, 0.02, True),
    # Muennighoff et al. 2024, arXiv:2409.02060, table 1: "6.9B", "1.3B"
    ("olmoe-1b-7b", 6_919_161_856, 0, 1.3e9, 0.02, True),
    # OpenAI 2025, arXiv:2508.10925, table 1: 116.83B and 5.13B, 20.91B and 3.61B; "unembedding [is] counted
    # towards active, but not embeddings"
    ("gpt-oss-120b", 116_829_156_672, 0, 5.13e9, 0.001, False),
    ("gpt-oss-20b", 20_914_757_184, 0, 3.61e9, 0.001, False),
    # Rajbhandari et al. 2022, arXiv:2201.05596, section 3.2: 13B, computing what the 350M dense model does
    ("deepspeed-350m-moe-128", 13e9, 0.02, 350e6, 0.03, True),
]


@pytest.mark.parametrize(("name", "total", "slack", "active", "active_slack", "embeddings_active"), PUBLISHED)
def test_published_models_have_their_published_sizes(
    name: str, total: float, slack: float, active: float, active_slack: float, embeddings_active: bool
) -> None:
    size = sizes(PRESETS[name]())
    assert size.total == pytest.approx(total, rel=slack, abs=0)
    assert size.active - (0 if embeddings_active else size.embedding) == pytest.approx(active, rel=active_slack)


def test_every_published_preset_is_in_the_table() -> None:
    assert {row[0] for row in PUBLISHED} == set(PRESETS.names()) - {"tiny", "tiny-dense", "smoke"}


def test_the_largest_model_is_counted_in_two_seconds() -> None:
    sizes(presets.smoke())
    start = time.process_time()
    sizes(presets.deepseek_v3())
    assert time.process_time() - start < 2


def test_active_leaves_out_exactly_the_experts_not_chosen() -> None:
    config = _sparse(num_experts=5, k=2)
    size, model = sizes(config), Decoder(config)
    expert = 3 * config.dim * 24
    assert size.total == sum(p.numel() for p in model.parameters())
    assert size.routed == 2 * 5 * expert
    assert size.total - size.active == 2 * 3 * expert
    assert sizes(replace(config, tie_embeddings=False)).embedding == config.vocab_size * config.dim
    assert size.embedding == 0
    assert sizes(replace(config, positions="learned")).embedding == config.max_seq_len * config.dim


def test_a_dense_model_is_all_active() -> None:
    size = sizes(presets.tiny_dense())
    assert (size.active, size.routed) == (size.total, 0)


SHAPES = {
    "gqa": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
    "bias, norm and sinks": AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=8, bias=True, qk_norm="full"),
    "mla": MLAConfig(num_heads=2, q_rank=12, kv_rank=8, nope_dim=4, rope_dim=4, v_dim=6),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("attention", SHAPES)
def test_matmul_flops_are_those_torch_counts(attention: str, tied: bool) -> None:
    config = replace(_sparse(num_experts=4, k=2), attention=SHAPES[attention], dense_first=1, tie_embeddings=tied)
    model, tokens_BS = Decoder(config), torch.randint(config.vocab_size, (2, 9))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(model(tokens_BS).h_BSD)
    products = {torch.ops.aten.mm, torch.ops.aten.addmm}
    counted = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if op in products)
    assert counted == tokens_BS.numel() * matmul_flops_per_token(model)


@pytest.mark.parametrize(("window", "full_every"), [(0, 0), (3, 0), (3, 2), (50, 0)])
@pytest.mark.parametrize("seq_len", [1, 2, 7])
def test_attention_flops_count_the_pairs_a_query_sees(window: int, full_every: int, seq_len: int) -> None:
    config = replace(presets.tiny(), attention=AttentionConfig(window=window, full_every=full_every))
    attention, pairs = config.attention, 0
    for layer in range(config.num_layers):
        reach = attention.window_of(layer) or seq_len
        pairs += sum(t - reach < s <= t for t in range(seq_len) for s in range(seq_len))
    assert attention_flops_per_token(config, seq_len) == round(attention.flops_per_pair * pairs / seq_len)


def test_training_takes_three_forward_passes_and_longer_sequences_more() -> None:
    config = presets.tiny()
    assert isinstance(config.attention, AttentionConfig)
    per_pair = 4 * config.attention.num_heads * config.attention.head_dim
    short, long = sizes(config, 16), sizes(config, 1024)
    assert long.train_flops_per_token == 3 * long.flops_per_token
    assert long.flops_per_token - short.flops_per_token == config.num_layers * per_pair * (1024 - 16) // 2
    assert sizes(presets.tiny()) == long


def test_a_sequence_longer_than_the_model_takes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"seq_len=1025 must be in 0\.\.1024"):
        sizes(presets.tiny(), 1025)


SHORT = replace(presets.tiny_dense(), num_layers=2)
MEASURED = {
    "tiny, few tokens": (presets.tiny(), 1, 64),
    "tiny, many tokens": (replace(presets.tiny(), num_layers=1), 4, 256),
    "dense": (SHORT, 2, 128),
    "window, sinks, bias": (
        replace(SHORT, attention=AttentionConfig(num_kv_heads=2, window=32, sinks=True, bias=True)),
        2,
        128,
    ),
    "mla": (replace(SHORT, attention=MLAConfig(q_rank=96)), 2, 128),
    "gpt-2": (replace(SHORT, ffn="gelu", norm="layer", positions="learned"), 2, 128),
}


@pytest.mark.parametrize("name", MEASURED)
def test_the_memory_estimate_is_within_a_quarter_of_what_tensors_take(name: str) -> None:
    config, batch_size, seq_len = MEASURED[name]
    estimate = train_memory(config, batch_size, seq_len, torch.device("cpu")).peak
    assert estimate == pytest.approx(_measured_peak(config, batch_size, seq_len), rel=0.25)


def _measured_peak(config: ModelConfig, batch_size: int, seq_len: int) -> int:
    model = Decoder(config)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    _train_step(model, optimizer, torch.zeros(1, 2, dtype=torch.int64))  # brings the moments into being
    with _LiveBytes() as memory:
        for tensor in tree_leaves([*model.parameters(), *optimizer.state.values()]):
            memory.see(tensor)
        _train_step(model, optimizer, torch.randint(config.vocab_size, (batch_size, seq_len)))
    return memory.peak


def _train_step(model: Decoder, optimizer: torch.optim.Optimizer, tokens_BS: Tensor) -> None:
    model.loss(tokens_BS, tokens_BS).total.backward()
    optimizer.step()
    optimizer.zero_grad()


class _LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators returned and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = 0

    def see(self, value: Any) -> None:
        if not isinstance(value, Tensor) or value.untyped_storage()._cdata in self.live:
            return
        storage = value.untyped_storage()
        self.live[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self.now -= self.live.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            self.see(value)
        return out


def _sparse(*, num_experts: int, k: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=40,
        dim=16,
        num_layers=2,
        max_seq_len=32,
        attention=AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=8),
        hidden=32,
        moe=MoEConfig(num_experts=num_experts, hidden=24, router=TopK(k=k), backend="loop"),
    )
