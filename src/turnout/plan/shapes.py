"""Named model shapes; SHAPES lists them for the planner and the command line."""

from dataclasses import replace

from turnout.plan.model import MLAShape, ModelShape
from turnout.registry import Table

SHAPES: Table[ModelShape] = Table("model shape")


def gpt(*, layers: int, dim: int, heads: int, vocab: int, ffn: int = 0) -> ModelShape:
    """A GPT-2-like dense model: plain FFN, LayerNorm, biases, one matrix for tokens in and out."""
    return ModelShape(
        num_layers=layers, dim=dim, ffn_hidden=ffn or 4 * dim, num_heads=heads, num_kv_heads=heads,
        head_dim=dim // heads, vocab_size=vocab, gated=False, tied_embeddings=True, learned_positions=2048,
        layer_norm=True, qkv_bias=True, out_bias=True, ffn_bias=True,
    )  # fmt: skip


def llama(*, layers: int, dim: int, ffn: int, heads: int, kv_heads: int, vocab: int) -> ModelShape:
    """A Llama-like dense model: gated FFN, grouped queries, no biases, separate output matrix."""
    return ModelShape(
        num_layers=layers, dim=dim, ffn_hidden=ffn, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim // heads,
        vocab_size=vocab,
    )  # fmt: skip


def with_experts(dense: ModelShape, *, experts: int, top_k: int, hidden: int, shared: int = 0) -> ModelShape:
    """The same blocks with experts in place of FFNs, from block `dense_first` on."""
    return replace(dense, num_experts=experts, top_k=top_k, expert_hidden=hidden, shared_hidden=shared)


def _nemotron(*, layers: int, dim: int, heads: int, kv_heads: int) -> ModelShape:
    plain = llama(layers=layers, dim=dim, ffn=4 * dim, heads=heads, kv_heads=kv_heads, vocab=256_000)
    return replace(plain, gated=False, layer_norm=True)


def _deepseek(*, layers: int, dim: int, ffn: int, vocab: int, dense_first: int) -> ModelShape:
    latent = MLAShape(q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128)
    plain = llama(layers=layers, dim=dim, ffn=ffn, heads=128, kv_heads=128, vocab=vocab)
    return replace(plain, head_dim=192, mla=latent, dense_first=dense_first)


def _gpt_oss(*, layers: int, experts: int) -> ModelShape:
    return ModelShape(
        num_layers=layers, dim=2880, num_heads=64, num_kv_heads=8, head_dim=64, vocab_size=201_088,
        num_experts=experts, top_k=4, expert_hidden=2880, qkv_bias=True, out_bias=True, expert_bias=True,
        router_bias=True, sinks=True, window=128, full_every=2,
    )  # fmt: skip


def _tiny(*, layers: int, kv_heads: int = 2, ffn: int = 1024, smear_keys: bool = True) -> ModelShape:
    plain = llama(layers=layers, dim=64, ffn=ffn, heads=2, kv_heads=kv_heads, vocab=4096)
    return replace(plain, tied_embeddings=True, smear_keys=smear_keys)


_MIXTRAL_22B = llama(layers=56, dim=6144, ffn=16_384, heads=48, kv_heads=8, vocab=32_000)
_LLAMA3_70B = llama(layers=80, dim=8192, ffn=28_672, heads=64, kv_heads=8, vocab=128_256)
_QWEN3 = replace(
    llama(layers=48, dim=2048, ffn=6144, heads=32, kv_heads=4, vocab=151_936), head_dim=128, qk_norm="head"
)
_QWEN2 = replace(llama(layers=28, dim=3584, ffn=18_944, heads=28, kv_heads=4, vocab=151_936), qkv_bias=True)
_OLMOE = replace(llama(layers=16, dim=2048, ffn=1024, heads=16, kv_heads=16, vocab=50_304), qk_norm="full")
_DEEPSEEK_V3 = _deepseek(layers=61, dim=7168, ffn=18_432, vocab=129_280, dense_first=3)
_DEEPSEEK_V2 = _deepseek(layers=60, dim=5120, ffn=12_288, vocab=102_400, dense_first=1)
_GPT_350M = gpt(layers=24, dim=1024, heads=16, vocab=50_304)
# GPT-4 as leaked (SemiAnalysis 2023): 120 layers, 16 experts of 111B, top-2, 55B of attention: h = 10,752; the leak
# does not give heads, and tensor parallelism over 8 must divide them
_GPT4_BLOCKS = replace(
    gpt(layers=120, dim=10_752, heads=96, vocab=100_256), qkv_bias=False, out_bias=False, ffn_bias=False
)

_ROWS = {
    # the presets of turnout.models; tests/plan/test_model.py compares the totals with those of the built models
    "tiny": replace(with_experts(_tiny(layers=4), experts=32, top_k=1, hidden=128, shared=128), learned_router=False),
    "tiny-dense": _tiny(layers=4, ffn=256),
    "smoke": with_experts(_tiny(layers=2, kv_heads=1, smear_keys=False), experts=4, top_k=2, hidden=64),
    "mixtral-8x7b": with_experts(
        llama(layers=32, dim=4096, ffn=14_336, heads=32, kv_heads=8, vocab=32_000), experts=8, top_k=2, hidden=14_336
    ),
    "mixtral-8x22b": with_experts(_MIXTRAL_22B, experts=8, top_k=2, hidden=16_384),
    "deepseek-v3": replace(
        with_experts(_DEEPSEEK_V3, experts=256, top_k=8, hidden=2048, shared=2048), expert_groups=8, top_groups=4
    ),
    "qwen3-30b-a3b": with_experts(_QWEN3, experts=128, top_k=8, hidden=768),
    "olmoe-1b-7b": with_experts(_OLMOE, experts=64, top_k=8, hidden=1024),
    "gpt-oss-120b": _gpt_oss(layers=36, experts=128),
    "gpt-oss-20b": _gpt_oss(layers=24, experts=32),
    "deepspeed-350m-moe-128": replace(
        with_experts(_GPT_350M, experts=128, top_k=1, hidden=4096), moe_every=2, expert_bias=True
    ),
    # meta-llama config.json files
    "llama2-7b": llama(layers=32, dim=4096, ffn=11_008, heads=32, kv_heads=32, vocab=32_000),
    "llama2-13b": llama(layers=40, dim=5120, ffn=13_824, heads=40, kv_heads=40, vocab=32_000),
    "llama2-70b": llama(layers=80, dim=8192, ffn=28_672, heads=64, kv_heads=8, vocab=32_000),
    "llama3-8b": llama(layers=32, dim=4096, ffn=14_336, heads=32, kv_heads=8, vocab=128_256),
    "llama3-70b": _LLAMA3_70B,
    "llama3.1-405b": llama(layers=126, dim=16_384, ffn=53_248, heads=128, kv_heads=8, vocab=128_256),
    # Megatron and NeMo benchmark models: arXiv:2104.04473 table 1, NeMo docs/performance_summary, arXiv:2402.15627
    "gpt3-5b": gpt(layers=24, dim=4096, heads=32, vocab=51_200),
    "gpt3-20b": gpt(layers=44, dim=6144, heads=48, vocab=51_200),
    "gpt3-175b": gpt(layers=96, dim=12_288, heads=96, vocab=51_200),
    "megascale-175b": gpt(layers=96, dim=12_288, heads=128, vocab=64_000),
    "mtnlg-530b": gpt(layers=105, dim=20_480, heads=128, vocab=51_200),
    "nemotron-8b": _nemotron(layers=32, dim=4096, heads=32, kv_heads=32),
    "nemotron-22b": _nemotron(layers=40, dim=6144, heads=48, kv_heads=48),
    "nemotron4-340b": _nemotron(layers=96, dim=18_432, heads=96, kv_heads=8),
    # arXiv:2405.04434 section 3.1.2
    "deepseek-v2": replace(
        with_experts(_DEEPSEEK_V2, experts=160, top_k=6, hidden=1536, shared=3072), expert_groups=8, top_groups=3
    ),
    # arXiv:2504.14960 (MoE Parallel Folding), section 4.1
    "mixtral-8x22b-g8t8": with_experts(_MIXTRAL_22B, experts=64, top_k=8, hidden=2048),
    "llama3-8x70b": with_experts(_LLAMA3_70B, experts=8, top_k=2, hidden=28_672),
    # config.json of Qwen/Qwen2-57B-A14B
    "qwen2-57b-a14b": replace(with_experts(_QWEN2, experts=64, top_k=8, hidden=2560, shared=20_480), shared_gates=1),
    # arXiv:2204.02311 table 1: parallel blocks, multi-query, SwiGLU
    "palm-540b": replace(
        llama(layers=118, dim=18_432, ffn=73_728, heads=48, kv_heads=1, vocab=256_000),
        head_dim=256,
        tied_embeddings=True,
        norms_per_layer=1,
    ),
    # arXiv:2406.06563 table 1
    "skywork-moe-146b": with_experts(
        llama(layers=52, dim=4608, ffn=12_288, heads=36, kv_heads=36, vocab=65_532), experts=16, top_k=2, hidden=12_288
    ),
    # arXiv:2006.16668: 36 blocks, every other with 2048 experts ("36,684" experts in all, read as 18 x 2048)
    "gshard-600b": replace(
        with_experts(gpt(layers=18, dim=1024, heads=16, vocab=64_000, ffn=8192), experts=2048, top_k=2, hidden=8192),
        encoder_layers=18,
        moe_every=2,
        learned_positions=0,
    ),
    "gpt4-moe": with_experts(_GPT4_BLOCKS, experts=16, top_k=2, hidden=43_008),
    # the same with one expert, which every token meets
    "gpt4-dense": _GPT4_BLOCKS,
}

for _name, _shape in _ROWS.items():
    SHAPES.register(_name)(replace(_shape, name=_name))
