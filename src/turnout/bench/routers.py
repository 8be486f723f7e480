"""Case routers: one layer with each router in turn, forward and backward in training, against softmax top-k.

Everybody has the same experts, the same tokens and the backend the layer chooses. A router gets the shape's `k` where
it may, and is compared with softmax top-k of as many choices as it then has; the balance loss is on for those that need
one, top-k among them. Rows say how many experts a token really had: that, and not the router, is most of the time.
The row `topk` is measured against another layer like itself: how far it is from 1 is what this machine cannot tell.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from turnout.bench.mixtral import routing_words
from turnout.bench.race import race, ratio
from turnout.bench.run import check_gate, ratio_keys, result, row
from turnout.contracts import Router, RouterConfig
from turnout.errors import ConfigError
from turnout.experts import FFNExperts
from turnout.experts.activations import Activation
from turnout.layers import MoE, MoEConfig
from turnout.layers.soft_moe import SoftMoE
from turnout.losses import LoadBalance
from turnout.models import ModelConfig
from turnout.routers import ReMoE, Switch, TopK
from turnout.tensors import total_loss
from turnout.train.compared_losses import balance_alone
from turnout.train.recipe import Recipe
from turnout.train.variants import with_routers

SOFT = "soft_moe"
VOCAB = 4096


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the layer and of its batch."""

    tokens: int  # of a call
    dim: int
    hidden: int  # of one expert
    experts: int
    k: int  # choices of a token
    expert: str = "swiglu"  # kind of expert
    seq_len: int = 256  # tokens of a sequence, which soft MoE mixes

    def __post_init__(self) -> None:
        for name in ("tokens", "dim", "hidden", "experts", "k", "seq_len"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        if self.k > self.experts:
            raise ConfigError(f"--k {self.k} must be at most --experts {self.experts}")
        if self.tokens % self.seq_len:
            raise ConfigError(f"--seq-len {self.seq_len} must divide --tokens {self.tokens}")
        if self.expert not in Activation.TABLE:
            Activation.TABLE[self.expert]

    def __str__(self) -> str:
        return f"T={self.tokens} d={self.dim} f={self.hidden} E={self.experts} k={self.k} {self.expert}"


# few wide experts, many with many choices, very many small ones
SHAPES = {
    "a": Shape(tokens=4096, dim=512, hidden=2048, experts=8, k=2, expert="gelu"),
    "b": Shape(tokens=4096, dim=512, hidden=1024, experts=64, k=8),
    "c": Shape(tokens=16_384, dim=256, hidden=512, experts=128, k=1),
}


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A layer and what there is to say about it."""

    step: Callable[[], float]  # forward and backward once; returns experts a token was sent to
    choices: int  # of softmax top-k that it is compared with
    routing: str
    causal: bool


def run(shapes: Sequence[Shape], *, names: Sequence[str] = (), rounds: int, warmup: int) -> dict[str, Any]:
    """A row for each shape and router: those of the table and `soft_moe`, or `names` alone.

    `not_built` has those the shape does not allow, with the reason.
    Raises: ConfigError if a router is unknown, or one that was asked for by name cannot be built; TurnoutError, before
    anything is timed, if a backend does not compute what the oracle computes.
    """
    for name in names:
        if name not in (*RouterConfig.TABLE.names(), SOFT):
            raise ConfigError(f"unknown router {name!r}; available: {', '.join([*RouterConfig.TABLE.names(), SOFT])}")
    check_gate()
    rows: list[dict[str, Any]] = []
    not_built: list[dict[str, Any]] = []
    for shape in shapes:
        # everybody's: a hundred million weights for each router would not fit
        torch.manual_seed(0)
        experts = FFNExperts(shape.dim, shape.hidden, shape.experts, kind=shape.expert)
        found, refused = contestants(shape, experts, names)
        rows += _rows(shape, found, _baselines(shape, experts, found), rounds=rounds, warmup=warmup)
        not_built += [{"shape": asdict(shape), "peer": name, "reason": reason} for name, reason in refused.items()]
    return result(rows, not_built=not_built)


def contestants(
    shape: Shape, experts: FFNExperts, names: Sequence[str] = ()
) -> tuple[dict[str, Contestant], dict[str, str]]:
    """Name -> layer with these experts, and name -> why the shape does not allow it.

    Raises: ConfigError if one of `names` cannot be built.
    """
    found, refused = {}, {}
    for name in names or (*RouterConfig.TABLE.names(), SOFT):
        try:
            found[name] = _soft(shape, experts) if name == SOFT else _contestant(shape, _moe(shape, name), experts)
        except ConfigError as error:
            if names:
                raise
            refused[name] = str(error)
    return found, refused


def _rows(
    shape: Shape, found: dict[str, Contestant], baselines: dict[str, Contestant], *, rounds: int, warmup: int
) -> list[dict[str, Any]]:
    experts_per_token = {name: one.step() for name, one in found.items()}
    steps = {name: one.step for name, one in (found | baselines).items()}
    timings = race(steps, rounds=rounds, warmup=warmup)
    return [
        {
            **row("routers", name, timings[name]),
            "shape": asdict(shape),
            "routing": one.routing,
            "causal": one.causal,
            "experts_per_token": experts_per_token[name],
            "compared_with": _baseline_name(one.choices),
            **ratio_keys("time_over_topk", ratio(timings[name], timings[_baseline_name(one.choices)])),
        }
        for name, one in found.items()
    ]


def _baselines(shape: Shape, experts: FFNExperts, found: dict[str, Contestant]) -> dict[str, Contestant]:
    return {
        _baseline_name(k): _contestant(shape, _moe(replace(shape, k=k), "topk"), experts)
        for k in sorted({one.choices for one in found.values()})
    }


def _baseline_name(k: int) -> str:
    return f"softmax top-{k}"


def _moe(shape: Shape, name: str) -> MoEConfig:
    """The layer of a shape with a router as `turnout compare --routers` takes it, set to do what it is for."""
    moe = MoEConfig(
        num_experts=shape.experts,
        hidden=shape.hidden,
        router=TopK(k=shape.k, renormalize=shape.k > 1),
        losses=(LoadBalance(),),
        expert=shape.expert,
    )
    (variant,) = with_routers(Recipe(model=ModelConfig(dim=shape.dim, moe=moe)), [name])
    assert variant.recipe.model.moe is not None
    router = _at_work(variant.recipe.model.moe.router, shape)
    # one loss for all, not each paper's: what is timed is the router
    return replace(variant.recipe.model.moe, router=router, losses=balance_alone(router))


def _at_work(router: RouterConfig, shape: Shape) -> RouterConfig:
    """Defaults of these would idle (one group is no group), or send a fresh router's tokens to most experts."""
    k, num_experts = shape.k, shape.experts
    groups = {"groups": 4, "top_groups": 2} if num_experts % 8 == 0 and router.choices <= num_experts // 2 else {}
    settings: dict[str, dict[str, Any]] = {
        "top_p": {"most": k, "expected_choices": k},
        "hierarchical": {"inner": TopK(k=k) if k > 1 else Switch()},
        "deepseek_v3": groups,
        "device_limited": groups,
    }
    return replace(router, **settings.get(RouterConfig.TABLE.name_of(type(router)), {}))  # pyright: ignore[reportArgumentType]


def _contestant(shape: Shape, moe: MoEConfig, experts: FFNExperts) -> Contestant:
    layer = MoE.from_config(shape.dim, moe)
    layer.experts = experts
    x_BSD, token_ids_BS = _batch(shape)
    if isinstance(moe.router, ReMoE):
        _settle(layer, x_BSD, shape)

    def step() -> float:
        out = layer(x_BSD, token_ids=token_ids_BS)
        _backward(layer, x_BSD, out.y, total_loss(out.losses))
        if isinstance(layer.router, Router):
            layer.router.after_step(out.stats)
        stats = out.stats
        sent = stats.assigned_E.sum() - stats.dropped_capacity_E.sum() - stats.dropped_policy_E.sum()
        return float(sent / stats.num_routed)

    return Contestant(step=step, choices=moe.router.choices, routing=routing_words(moe), causal=moe.router.causal)


def _soft(shape: Shape, experts: FFNExperts) -> Contestant:
    """With as many slots in a sequence as softmax top-k has choices there, so that experts see as many rows."""
    slots = max(1, shape.k * shape.seq_len // shape.experts)
    layer = SoftMoE(shape.dim, shape.hidden, shape.experts, slots=slots, expert=shape.expert)
    layer.experts = experts
    x_BSD, _ = _batch(shape)

    def step() -> float:
        _backward(layer, x_BSD, layer(x_BSD).y, torch.zeros(()))
        return slots * shape.experts / shape.seq_len

    words = f"{SOFT}(slots={slots} of {shape.seq_len} tokens)"
    return Contestant(step=step, choices=shape.k, routing=words, causal=SoftMoE.causal)


def _batch(shape: Shape) -> tuple[Tensor, Tensor]:
    """The same for everybody; the first feature is always 1."""
    generator = torch.Generator().manual_seed(0)
    batch = (shape.tokens // shape.seq_len, shape.seq_len)
    x_BSD = torch.randn(*batch, shape.dim, generator=generator)
    x_BSD[..., 0] = 1
    return x_BSD.requires_grad_(), torch.randint(VOCAB, batch, generator=generator)


@torch.no_grad()
def _settle(layer: MoE, x_BSD: Tensor, shape: Shape) -> None:
    """Where training brings ReMoE: k experts a token, by the threshold that the always-1 feature gives each expert."""
    weight_ED = layer.router.get_parameter("score.weight_ED")
    logits_TE = x_BSD.flatten(0, 1) @ weight_ED.T
    most = max(1, shape.tokens * shape.k // shape.experts)
    highest = logits_TE.topk(min(most + 1, shape.tokens), dim=0).values
    # between the last token an expert takes and the first it does not
    weight_ED[:, 0] -= highest[-2:].mean(dim=0)


def _backward(layer: nn.Module, x_BSD: Tensor, y_BSD: Tensor, loss: Tensor) -> None:
    # a gradient of its own memory, as the next layer would hand it down: that of a sum is one number, expanded
    (y_BSD * x_BSD.detach()).sum().add(loss).backward()
    for tensor in (x_BSD, *layer.parameters()):
        tensor.grad = None
