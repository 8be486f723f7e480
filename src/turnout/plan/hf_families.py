"""Families of models that a config.json may be of, and what their files do not say.

Each is compared with transformers' own model in tests/plan/test_hf_config.py; a family that is not here is refused.
"""

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Family:
    """What the code of a family does where its config.json leaves a field out, or has none."""

    gated: bool = True  # its FFN has three matrices
    tied: bool = False  # one matrix reads and writes tokens, unless the file says otherwise
    layer_norm: bool = False  # norms have biases
    norms_per_layer: int = 2
    attention_bias: bool = False  # its projections have biases, unless the file says otherwise
    biased: Literal["all", "qkv"] = "all"  # projections of attention that then have them
    ffn_bias: bool = False  # unless the file says otherwise
    expert_bias: bool = False  # experts and router have biases
    sinks: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    positions: str = ""  # the field that says how many positions are learned; empty: none are
    more_positions: int = 0  # rows of each table beyond these
    top_k: int = 0  # experts a token meets, where the file has no field for it
    shared: int = 0  # shared experts, where the file has no field for it
    full_every: int = 0  # with a window, every n-th block sees all, where the file does not say


_LLAMA = Family()
_GPT = Family(
    gated=False, tied=True, layer_norm=True, attention_bias=True, ffn_bias=True, positions="n_positions"
)  # fmt: skip
_NEOX = replace(_GPT, tied=False, positions="")
_BART = replace(_GPT, positions="max_position_embeddings", more_positions=2)
_SINUS = replace(_GPT, positions="")  # positions are computed
_T5 = Family(gated=False, tied=True)
_GEMMA = Family(tied=True)
_QWEN2 = Family(attention_bias=True, biased="qkv")
_QWEN3 = Family(qk_norm="head")
_GLM = Family(attention_bias=True, biased="qkv")

# model_type of config.json -> family; "" is a file that does not say, read as Llama's
FAMILIES: dict[str, Family] = {
    "": _LLAMA,
    # as Llama
    **dict.fromkeys(
        ("llama", "mistral", "mixtral", "ministral", "ministral3", "phi3", "internlm3", "smollm3", "helium",
         "granite", "granitemoe", "granitemoeshared", "seed_oss", "olmo", "dbrx", "minicpm3"),
        _LLAMA,
    ),
    "ernie4_5": replace(_LLAMA, tied=True),
    "ernie4_5_moe": replace(_LLAMA, tied=True),
    "arctic": replace(_LLAMA, norms_per_layer=3),  # a third before the dense part beside the experts
    "llama4_text": replace(_LLAMA, shared=1),
    # latent attention: DeepSeek's code is Kimi K2's too
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "kimi_k2"), _LLAMA),
    # norms of queries and keys
    **dict.fromkeys(("qwen3", "qwen3_moe", "exaone4"), _QWEN3),
    "dots1": _QWEN3,
    **dict.fromkeys(("olmo2", "olmo3", "olmoe", "flex_olmo", "minimax_m2"), replace(_LLAMA, qk_norm="full")),
    # biases
    **dict.fromkeys(("qwen2", "qwen2_moe"), _QWEN2),
    **dict.fromkeys(("glm", "glm4_moe"), _GLM),
    "glm4": replace(_GLM, norms_per_layer=4),
    "phimoe": replace(_LLAMA, layer_norm=True),
    "gpt_oss": Family(attention_bias=True, expert_bias=True, sinks=True, full_every=2),
    # one matrix for tokens in and out
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA, norms_per_layer=4, full_every=2),
    "gemma3_text": replace(_GEMMA, norms_per_layer=4, qk_norm="head", full_every=6),
    **dict.fromkeys(("cohere", "cohere2"), replace(_GEMMA, norms_per_layer=1, full_every=4)),
    # two matrices, LayerNorm
    **dict.fromkeys(("gpt2", "gpt_bigcode"), _GPT),
    "starcoder2": replace(_GPT, positions=""),
    "gpt_neox": _NEOX,
    "phi": replace(_NEOX, norms_per_layer=1),
    "bloom": _SINUS,
    "opt": _BART,
    "falcon": replace(_SINUS, attention_bias=False, ffn_bias=False, norms_per_layer=1),
    "nemotron": replace(_NEOX, attention_bias=False, ffn_bias=False),
    "stablelm": replace(_LLAMA, layer_norm=True, biased="qkv"),
    # encoder and decoder
    **dict.fromkeys(("t5", "mt5", "umt5"), _T5),
    "switch_transformers": replace(_T5, top_k=1),
    **dict.fromkeys(("bart", "mbart"), _BART),
    **dict.fromkeys(("m2m_100", "marian", "pegasus"), _SINUS),
    "nllb-moe": replace(_SINUS, top_k=2, expert_bias=True),
}  # fmt: skip
