"""The peer: transformers' Mixtral in the shape of a recipe; what it cannot be, and what it does otherwise."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from turnout.bench.run import words
from turnout.contracts import RouterConfig
from turnout.dispatch import Dropless
from turnout.errors import ConfigError
from turnout.layers import MoEConfig
from turnout.layers.attention import AttentionConfig, AttentionKind
from turnout.losses import LoadBalance
from turnout.models import ModelConfig
from turnout.routers import TopK
from turnout.train.recipe import Recipe

# coefficient of the load-balance loss in Mixtral and in what routes like it; it costs the same at any value
BALANCE = LoadBalance(coefficient=0.01)


def mixtral(model: ModelConfig, implementation: str) -> Any:
    """transformers' MixtralForCausalLM of that shape, its balance loss switched on, with those experts.

    Raises: ConfigError if transformers is not installed.
    """
    try:
        from transformers import MixtralConfig, MixtralForCausalLM
    except ImportError as error:
        raise ConfigError("the peer needs transformers: pip install 'turnout[bench]'") from error
    moe, attention = model.moe, model.attention
    assert moe is not None
    assert isinstance(attention, AttentionConfig)
    config = MixtralConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.dim,
        intermediate_size=moe.hidden,
        num_hidden_layers=model.num_layers,
        num_attention_heads=attention.num_heads,
        num_key_value_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        num_local_experts=moe.num_experts,
        num_experts_per_tok=_active(moe),
        max_position_embeddings=model.max_seq_len,
        tie_word_embeddings=model.tie_embeddings,
        output_router_logits=True,
        router_aux_loss_coef=BALANCE.coefficient,
        use_cache=False,
        sliding_window=None,
        experts_implementation=implementation,  # pyright: ignore[reportCallIssue]
    )
    return MixtralForCausalLM(config)


def routed_like_mixtral(model: ModelConfig) -> ModelConfig:
    """The model with Mixtral's routing: softmax top-k of as many experts, weights that sum to 1, a balance loss.

    Its keys are plain, as Mixtral's are; a shared expert becomes as many routed ones as it is wide. Of one expert
    Mixtral's weight is always 1, from which no router learns: there ours is that of the full softmax.
    """
    assert model.moe is not None
    k = _active(model.moe)
    attention = model.attention
    if isinstance(attention, AttentionConfig):
        attention = replace(attention, smear_keys=False)
    moe = replace(model.moe, router=TopK(k=k, renormalize=k > 1), losses=(BALANCE,), shared_hidden=0)
    return replace(model, attention=attention, moe=moe)


def check_shape(recipe: Recipe) -> None:
    """Raises: ConfigError naming each setting that makes another network than Mixtral's of the recipe's model."""
    odd = [f"{name} is {have}, Mixtral's {want}" for name, have, want in _shape(recipe) if have != want]
    if odd:
        raise ConfigError(
            f"transformers' Mixtral cannot have the shape of the recipe {recipe.name!r}: {'; '.join(odd)}; "
            "leave its peers out: --peers turnout,dense-twin,gemm-limit"
        )


def differences(recipe: Recipe) -> list[str]:
    """What Mixtral does otherwise than a recipe whose shape it has: one text each for router and losses."""
    own, like = recipe.model.moe, routed_like_mixtral(recipe.model).moe
    assert own is not None
    assert like is not None
    found = []
    if _router_kind(own) != _router_kind(like):
        theirs = f"a learned softmax top-{like.router.choices}, its weights summing to 1"
        found.append(f"router: {words(own.router)} in the recipe, {theirs}, in Mixtral")
    if own.shared_hidden:
        wide = own.shared_hidden // own.hidden
        found.append(f"experts: a shared one as wide as {wide} in the recipe, all routed, as many FLOPs, in Mixtral")
    if isinstance(recipe.model.attention, AttentionConfig) and recipe.model.attention.smear_keys:
        found.append("keys: smeared in the recipe, plain in Mixtral")
    if _loss_kinds(own) != _loss_kinds(like):
        found.append(f"auxiliary losses: {_loss_kinds(own)} in the recipe, {_loss_kinds(like)} in Mixtral")
    return found


def routing_words(moe: MoEConfig) -> str:
    """Router and losses in a few words."""
    losses = [words(loss) for loss in moe.losses]
    return " + ".join([words(moe.router), *(losses or ["no loss"])])


def _active(moe: MoEConfig) -> int:
    """Experts a token meets, the shared one counted as routed ones."""
    return moe.router.choices + moe.shared_hidden // moe.hidden


def _router_kind(moe: MoEConfig) -> RouterConfig:
    """The router without the values that cost no time."""
    return replace(moe.router, init_std=0.02, scale=1.0) if isinstance(moe.router, TopK) else moe.router


def _loss_kinds(moe: MoEConfig) -> str:
    losses = [
        replace(one, coefficient=BALANCE.coefficient) if isinstance(one, LoadBalance) else one for one in moe.losses
    ]
    return ", ".join(words(loss) for loss in losses) or "none"


def _shape(recipe: Recipe) -> Iterator[tuple[str, object, object]]:
    """(setting, the recipe's value, Mixtral's)."""
    model, moe = recipe.model, recipe.model.moe
    yield "model.attention", AttentionKind.TABLE.name_of(type(model.attention)), "gqa"
    if isinstance(model.attention, AttentionConfig):
        attention = model.attention
        yield "model.attention.qk_norm", attention.qk_norm, "none"
        yield "model.attention.bias", attention.bias, False
        yield "model.attention.sinks", attention.sinks, False
        # a window as long as the sequence hides nothing
        yield "model.attention.window", attention.window if attention.window < recipe.loop.seq_len else 0, 0
    yield "model.positions", model.positions, "rope"
    yield "model.norm", model.norm, "rms"
    yield "the number of blocks with experts", len(model.moe_layers()), model.num_layers
    if moe is not None:
        yield "model.moe.expert", moe.expert, "swiglu"
        yield "model.moe.bias", moe.bias, False
        # one as wide as some routed ones stands for as many choices
        yield "model.moe.shared_hidden", moe.shared_hidden if moe.shared_hidden % moe.hidden else 0, 0
        yield "model.moe.latent_dim", moe.latent_dim, 0
        yield "model.moe.capacity", moe.capacity, Dropless()
        yield "the number of experts of a token", _experts_of_a_token(model.dim, moe), moe.router.choices


@torch.no_grad()
def _experts_of_a_token(dim: int, moe: MoEConfig) -> int | str:
    """Known by trying: `choices` may be the most or a mean."""
    router = moe.router.build(dim, moe.num_experts)
    assignment = router(torch.randn(16, dim), torch.zeros(16, dtype=torch.int64)).assignment
    if assignment.top_k is None or assignment.declined_N is not None:
        return f"left to the router {words(moe.router)}"
    return assignment.top_k
