"""Who runs in the case `generate`: our decoder, the same with experts of 8 bits, and transformers' Mixtral, two ways.

All continue the same prompts by the best token, all sequences of a batch together, and say when each position was
there.
"""

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from turnout.bench.mixtral import mixtral
from turnout.experts import quantize_experts
from turnout.infer.generate import GenerateConfig, generate_tokens
from turnout.layers.attention import AttentionConfig
from turnout.layers.kv_cache import KVCache
from turnout.models import Decoder, ModelConfig

OURS, INT8, LOOP, THEIRS = "turnout", "turnout-int8", "transformers-loop", "transformers-generate"
PEERS = (OURS, INT8, LOOP, THEIRS)
IMPLEMENTATION = "grouped_mm"
NO_END = -1  # a token that no model gives out
Tokens = list[list[int]]  # position by position, those of all sequences
# prompts (B, S), number of new tokens -> the tokens, and when each position was there, in seconds
Generate = Callable[[Tensor, int], tuple[Tokens, list[float]]]


def like(model: ModelConfig, theirs: Any) -> ModelConfig:
    """The model with the settings that transformers' has and that cost no time."""
    assert isinstance(model.attention, AttentionConfig)
    attention = replace(model.attention, rope_theta=float(theirs.config.rope_parameters["rope_theta"]))
    return replace(model, attention=attention, norm_eps=theirs.config.rms_norm_eps)


def built(model: ModelConfig) -> tuple[Decoder, Decoder, Any]:
    """Ours, ours with experts of 8 bits, and transformers' Mixtral: random weights, the same in all three."""
    torch.manual_seed(0)
    theirs = mixtral(model, IMPLEMENTATION).eval()
    theirs.config.output_router_logits, theirs.config.use_cache = False, True
    theirs.generation_config.eos_token_id = theirs.generation_config.pad_token_id = None
    ours = Decoder(like(model, theirs)).eval()
    give_weights(ours, theirs)
    return ours, quantize_experts(copy.deepcopy(ours)), theirs


@torch.no_grad()
def give_weights(ours: Decoder, theirs: Any) -> None:
    """Initial weights of ours, with the learned scores of routers, become those of transformers' model."""
    inner = theirs.model
    inner.embed_tokens.weight.copy_(ours.embedding_VD)
    if ours.head_VD is not None:
        theirs.lm_head.weight.copy_(ours.head_VD)
    for block, layer in zip(ours.blocks, inner.layers, strict=True):
        weights, attention = dict(block.named_parameters()), layer.self_attn
        parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        rows = weights["attention.qkv"].split([len(part) for part in parts])
        for part, own in zip(parts, rows, strict=True):
            part.copy_(own)
        attention.o_proj.weight.copy_(weights["attention.out"])
        layer.mlp.gate.weight.copy_(weights["ffn.router.score.weight_ED"])
        layer.mlp.experts.gate_up_proj.copy_(weights["ffn.experts.up_EDG"].transpose(1, 2))
        layer.mlp.experts.down_proj.copy_(weights["ffn.experts.down_EFD"].transpose(1, 2))


def generating(model: Decoder) -> Generate:
    """One sequence by `infer.generate`, as `turnout generate` does; several by a loop over the same model and cache."""

    def run(prompt_BS: Tensor, new: int) -> tuple[Tokens, list[float]]:
        if len(prompt_BS) > 1:
            return _timed(_batch(model, prompt_BS, new))
        config = GenerateConfig(max_new_tokens=new, temperature=0.0)
        tokens = generate_tokens(model, prompt_BS[0].tolist(), config, end=NO_END)
        return _timed([token] for token in tokens)

    return run


def by_loop(theirs: Any) -> Generate:
    """transformers' model and its cache in a loop of nothing else."""

    def run(prompt_BS: Tensor, new: int) -> tuple[Tokens, list[float]]:
        return _timed(_loop(theirs, prompt_BS, new))

    return run


def by_generate(theirs: Any) -> Generate:
    """transformers' own `generate`."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Watch(StoppingCriteria):
        """Asked after every token whether to stop: notes when."""

        def __init__(self) -> None:
            self.at_s: list[float] = []

        def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            self.at_s.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    def run(prompt_BS: Tensor, new: int) -> tuple[Tokens, list[float]]:
        watch, begun = Watch(), time.perf_counter()
        found = theirs.generate(
            prompt_BS,
            attention_mask=torch.ones_like(prompt_BS),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([watch]),
        )
        return found[:, prompt_BS.shape[1] :].t().tolist(), [at - begun for at in watch.at_s]

    return run


@torch.inference_mode()
def logits_of(model: Any, prompt_BS: Tensor) -> Tensor:
    """Of all positions: (B, S, V)."""
    if isinstance(model, Decoder):
        return model.logits(model(prompt_BS).h_BSD)
    return model(input_ids=prompt_BS).logits


def _timed(tokens: Iterator[list[int]]) -> tuple[Tokens, list[float]]:
    found, at_s, begun = [], [], time.perf_counter()
    for of_position in tokens:
        at_s.append(time.perf_counter() - begun)
        found.append(of_position)
    return found, at_s


@torch.inference_mode()
def _batch(model: Decoder, prompt_BS: Tensor, new: int) -> Iterator[list[int]]:
    cache = KVCache(model.config.num_layers, prompt_BS.shape[1] + new - 1)
    fed_BS = prompt_BS
    for _ in range(new):
        fed_BS = model.logits(model(fed_BS, cache=cache).h_BSD[:, -1]).argmax(dim=1, keepdim=True)
        yield fed_BS[:, 0].tolist()


@torch.inference_mode()
def _loop(theirs: Any, prompt_BS: Tensor, new: int) -> Iterator[list[int]]:
    cache, fed_BS = None, prompt_BS
    for _ in range(new):
        out = theirs(input_ids=fed_BS, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, fed_BS = out.past_key_values, out.logits[:, -1].argmax(dim=1, keepdim=True)
        yield fed_BS[:, 0].tolist()
