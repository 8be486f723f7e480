"""The peer: DeepSpeed's MoE layers in our decoder, over gloo; everything but the layers is ours."""

import importlib
import math
import os
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from turnout.bench.mixtral import mixtral
from turnout.data.sampler import Batch
from turnout.errors import ConfigError
from turnout.layers.mlp import MLP
from turnout.layers.moe import MoEConfig
from turnout.losses import LoadBalance
from turnout.models import Decoder, ModelConfig
from turnout.routers import TopK
from turnout.tensors import LossTerm, total_loss
from turnout.train.optimizer import build_optimizer
from turnout.train.recipe import Recipe

# coefficient of the balance loss in DeepSpeed's layers and in what routes like them; it costs the same at any value
BALANCE = LoadBalance(coefficient=0.01)


def routed_like_deepspeed(model: ModelConfig) -> ModelConfig:
    """The model with the routing of DeepSpeed's gate: k of the full softmax, a balance loss; but nothing is dropped."""
    assert model.moe is not None
    k = model.moe.router.choices
    return replace(model, moe=replace(model.moe, router=TopK(k=k, renormalize=k > 1), losses=(BALANCE,)))


def check_deepspeed() -> None:
    """Raises: ConfigError if DeepSpeed is not installed."""
    if find_spec("deepspeed") is None:
        raise ConfigError("the peer needs deepspeed: pip install 'turnout[peers]'")


def check_experts(recipe: Recipe) -> None:
    """Raises: ConfigError naming what DeepSpeed's layers cannot have."""
    moe = recipe.model.moe
    assert moe is not None
    odd = [
        f"model.moe.{name} is {have}, DeepSpeed's {want}"
        for name, have, want in (
            ("bias", moe.bias, False),
            ("latent_dim", moe.latent_dim, 0),
            ("router.choices", min(moe.router.choices, 2), moe.router.choices),
        )
        if have != want
    ]
    if odd:
        raise ConfigError(
            f"DeepSpeed's layers cannot have the shape of the recipe {recipe.name!r}: {'; '.join(odd)}; "
            "leave them out: --peers turnout"
        )


def deepspeed_step(recipe: Recipe, batch: Batch, *, drop_tokens: bool) -> Callable[[], object]:
    """A training step of this rank, all ranks of the process group being one expert-parallel group.

    As in its engine, gradients of what all ranks have go through one collective in one flat tensor, and experts' stay
    where they are; nothing else of the engine is paid for. AdamW is fused, the norm is that over all ranks, as ours.
    """
    model = Decoder(recipe.model)
    ranks = dist.get_world_size()
    layers = _exchange_layers(model, recipe.model, ranks, drop_tokens=drop_tokens)
    for layer in layers:
        layer.moe.set_deepspeed_parallelism()
    experts = [weight for layer in layers for weight in layer.moe.get_submodule("deepspeed_moe.experts").parameters()]
    held = {id(weight) for weight in experts}
    dense = [weight for weight in model.parameters() if id(weight) not in held]
    optimizer = build_optimizer(model, recipe.optimizer)

    def step() -> None:
        (model.loss(batch.tokens_BS, batch.targets_BS).total / ranks).backward()
        _sum_over_ranks(dense)
        _clip(dense, experts, recipe.optimizer.max_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def engine_step(recipe: Recipe, batch: Batch) -> Callable[[], object]:
    """The same model in DeepSpeed's engine, as its users train: its collectives and clipping, torch's fused AdamW."""
    model = Decoder(recipe.model)
    _exchange_layers(model, recipe.model, dist.get_world_size(), drop_tokens=True)
    return _in_engine(_Loss(model), recipe, batch)


def mixtral_engine_step(recipe: Recipe, batch: Batch) -> Callable[[], object]:
    """DeepSpeed's layers and engine around transformers' Mixtral: what one has who writes no model of one's own.

    Raises: ConfigError if transformers is not installed.
    """
    assert recipe.model.moe is not None
    model, module = mixtral(recipe.model, "eager"), _deepspeed()
    model.config.output_router_logits = False  # of routers that are no longer in it
    layers = []
    for block in model.model.layers:
        moe = _layer(module, recipe.model.dim, recipe.model.moe, dist.get_world_size(), drop_tokens=True)
        layers.append(_OutputAlone(moe))
        block.mlp = layers[-1]
    return _in_engine(_MixtralLoss(model, layers), recipe, batch)


def _in_engine(model: nn.Module, recipe: Recipe, batch: Batch) -> Callable[[], object]:
    settings = recipe.optimizer
    adamw = {
        "lr": settings.lr,
        "betas": [settings.beta1, settings.beta2],
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
        "torch_adam": True,
        "fused": True,
    }
    engine, *_ = importlib.import_module("deepspeed").initialize(
        model=model,
        model_parameters=list(model.parameters()),
        config={
            "train_micro_batch_size_per_gpu": len(batch.tokens_BS),
            "gradient_clipping": settings.clip,
            "optimizer": {"type": "AdamW", "params": adamw},
            "zero_optimization": {"stage": 0},
        },
        dist_init_required=False,
    )

    def step() -> None:
        engine.backward(engine(batch.tokens_BS, batch.targets_BS))
        engine.step()

    return step


class _Loss(nn.Module):
    """A model whose forward pass is its loss, which is what an engine wraps."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens_BS: Tensor, targets_BS: Tensor) -> Tensor:
        return self.model.loss(tokens_BS, targets_BS).total


class _Layer(nn.Module):
    """DeepSpeed's MoE beside the recipe's shared expert, called as our layer is."""

    def __init__(self, moe: Any, shared: MLP | None) -> None:
        super().__init__()
        self.moe, self.shared = moe, shared

    def forward(self, x_BSD: Tensor, **_: object) -> SimpleNamespace:
        y_BSD, balance, _ = self.moe(x_BSD)
        if self.shared is not None:
            y_BSD = y_BSD + self.shared(x_BSD)
        term = LossTerm(name="load_balance", value=balance, coefficient=BALANCE.coefficient, scope="micro_batch")
        routed = SimpleNamespace(losses=(term,), stats=None)
        return SimpleNamespace(y=y_BSD, losses=(term,), routed=routed)


class _OutputAlone(nn.Module):
    """A layer as transformers' blocks call theirs; what it adds to the loss waits for who sums it."""

    def __init__(self, layer: _Layer) -> None:
        super().__init__()
        self.layer = layer
        self.term: LossTerm | None = None

    def forward(self, x_BSD: Tensor) -> Tensor:
        output = self.layer(x_BSD)
        (self.term,) = output.losses
        return output.y


class _MixtralLoss(nn.Module):
    """transformers' Mixtral around layers of DeepSpeed's; its forward pass is the loss with their balance terms."""

    def __init__(self, model: nn.Module, layers: list[_OutputAlone]) -> None:
        super().__init__()
        self.model, self.layers = model, layers

    def forward(self, tokens_BS: Tensor, targets_BS: Tensor) -> Tensor:
        loss = self.model(input_ids=tokens_BS, labels=tokens_BS, shift_labels=targets_BS).loss
        return loss + total_loss(tuple(layer.term for layer in self.layers if layer.term is not None))


def _exchange_layers(model: Decoder, config: ModelConfig, ranks: int, *, drop_tokens: bool) -> list[_Layer]:
    assert config.moe is not None
    layer_module = _deepspeed()
    layers = []
    for index in config.moe_layers():
        layers.append(_layer(layer_module, config.dim, config.moe, ranks, drop_tokens=drop_tokens))
        model.blocks[index].ffn = layers[-1]
    return layers


def _layer(module: ModuleType, dim: int, moe: MoEConfig, ranks: int, *, drop_tokens: bool) -> _Layer:
    expert = MLP(dim, moe.hidden, kind=moe.expert, init_std=moe.init_std)
    theirs = module.MoE(
        dim,
        expert,
        num_experts=moe.num_experts,
        ep_size=ranks,
        k=moe.router.choices,
        drop_tokens=drop_tokens,
        top2_2nd_expert_sampling=False,
    )
    shared = MLP(dim, moe.shared_hidden, kind=moe.expert, init_std=moe.init_std) if moe.shared_hidden else None
    return _Layer(theirs, shared)


def _deepspeed() -> ModuleType:
    """Its module of layers, with its own communication set up over our process group."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))
    # it would compile a sum through shared memory, which only its inference calls: minutes on two cores, and for ever
    # where a compilation that was killed has left its lock
    importlib.import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
    importlib.import_module("deepspeed.comm").init_distributed(dist_backend="gloo", verbose=False)
    return importlib.import_module("deepspeed.moe.layer")


def _sum_over_ranks(weights: list[nn.Parameter]) -> None:
    grads = [weight.grad for weight in weights if weight.grad is not None]
    flat = _flatten_dense_tensors(grads)
    dist.all_reduce(flat)
    for grad, summed in zip(grads, _unflatten_dense_tensors(flat, grads), strict=True):
        grad.copy_(summed)


def _clip(dense: list[nn.Parameter], experts: list[nn.Parameter], max_norm: float) -> None:
    squares = torch.stack([_norm(experts) ** 2, _norm(dense) ** 2 / dist.get_world_size()]).sum()
    dist.all_reduce(squares)
    if math.isfinite(max_norm):
        nn.utils.clip_grads_with_norm_([*dense, *experts], max_norm, squares.sqrt())


def _norm(weights: list[nn.Parameter]) -> Tensor:
    return nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
