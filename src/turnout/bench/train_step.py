"""Case train-step: a whole optimizer step of a recipe's model against transformers' Mixtral of the same shape.

Everybody gets the same tokens, the same fused AdamW, the same clipping, and its balance loss switched on. Ours is the
training loop's own step, with its checks for NaN and its statistics. Mixtral's weights always sum to 1, whatever
`router.scale` says; the work is the same.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from turnout.data.sampler import Batch
from turnout.errors import ConfigError
from turnout.layers.attention import AttentionConfig
from turnout.models import Decoder, ModelConfig
from turnout.train.estimate import step_on
from turnout.train.recipe import Recipe

PEERS = ("turnout", "transformers-grouped_mm", "transformers-eager", "dense-twin", "gemm-limit")


def contestants(recipe: Recipe, dense: Recipe, *, peers: tuple[str, ...] = PEERS) -> dict[str, Callable[[], object]]:
    """Name -> one training step on a fixed batch.

    Raises: ConfigError if a peer is unknown or not installed, or the recipe has what Mixtral lacks.
    """
    return {name: contestant(name, recipe, dense) for name in peers}


def contestant(name: str, recipe: Recipe, dense: Recipe) -> Callable[[], object]:
    """One of PEERS as a function of no arguments."""
    if name not in PEERS:
        raise ConfigError(f"unknown peer {name!r}; available: {', '.join(PEERS)}")
    torch.manual_seed(0)
    tokens_BS = torch.randint(recipe.model.vocab_size, (recipe.loop.batch_size, recipe.loop.seq_len + 1))
    if name == "gemm-limit":
        return _gemms(recipe.model, tokens_BS.shape[0] * recipe.loop.seq_len)
    if name == "turnout":
        return _our_step(Decoder(recipe.model), tokens_BS, recipe)
    if name == "dense-twin":
        return _our_step(Decoder(dense.model), tokens_BS, recipe)
    return _mixtral_step(recipe, tokens_BS, name.removeprefix("transformers-"))


def few_steps(name: str, recipe: Recipe, dense: Recipe) -> None:
    """Three steps of one peer: what the memory measurement runs in a process of its own."""
    step = contestant(name, recipe, dense)
    for _ in range(3):
        step()


def _our_step(model: Decoder, tokens_BS: Tensor, recipe: Recipe) -> Callable[[], object]:
    batch = Batch(tokens_BS=tokens_BS[:, :-1], targets_BS=tokens_BS[:, 1:])
    return step_on(model, [batch], recipe, torch.float32)


def _mixtral_step(recipe: Recipe, tokens_BS: Tensor, implementation: str) -> Callable[[], object]:
    model = _mixtral(recipe.model, implementation)
    inputs_BS = tokens_BS[:, :-1].contiguous()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.optimizer.lr, fused=True)

    def step() -> None:
        model(input_ids=inputs_BS, labels=inputs_BS).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.max_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _mixtral(model: ModelConfig, implementation: str) -> Any:
    try:
        from transformers import MixtralConfig, MixtralForCausalLM
    except ImportError as error:
        raise ConfigError("the peer needs transformers: pip install 'turnout[bench]'") from error
    moe, attention = model.moe, _attention(model)
    if moe is None or moe.shared_hidden or len(model.moe_layers()) != model.num_layers:
        raise ConfigError("transformers' Mixtral has experts in every layer and no shared expert; this recipe differs")
    config = MixtralConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.dim,
        intermediate_size=moe.hidden,
        num_hidden_layers=model.num_layers,
        num_attention_heads=attention.num_heads,
        num_key_value_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        num_local_experts=moe.num_experts,
        num_experts_per_tok=moe.router.choices,
        max_position_embeddings=model.max_seq_len,
        tie_word_embeddings=model.tie_embeddings,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
        use_cache=False,
        sliding_window=None,
    )
    config._experts_implementation = implementation
    return MixtralForCausalLM(config)


def _gemms(model: ModelConfig, num_tokens: int) -> Callable[[], object]:
    """Every product with a weight, forward and backward, as one dense matrix each, and nothing else.

    No layer can be faster than its share of these; attention's products of queries and keys are not among them.
    """
    attention, dim, moe = _attention(model), model.dim, model.moe
    heads, width = attention.num_heads, attention.head_dim
    active = model.hidden if moe is None else moe.router.choices * moe.hidden + moe.shared_hidden
    qkv = (heads + 2 * attention.num_kv_heads) * width
    block = [(qkv, dim), (dim, heads * width), (2 * active, dim), (dim, active)]
    block += [] if moe is None else [(moe.num_experts, dim)]
    shapes = block * model.num_layers + [(model.vocab_size, dim)]
    matrices = [(torch.randn(num_tokens, inner), torch.randn(inner, outer)) for outer, inner in shapes]
    outputs = [torch.empty(num_tokens, weight.shape[1]) for _, weight in matrices]

    def run() -> None:
        for (x, weight), y in zip(matrices, outputs, strict=True):
            torch.mm(x, weight, out=y)
            torch.mm(y, weight.t())
            torch.mm(x.t(), y)

    return run


def _attention(model: ModelConfig) -> AttentionConfig:
    if not isinstance(model.attention, AttentionConfig):
        raise ConfigError("transformers' Mixtral has grouped-query attention; this recipe differs")
    return model.attention
