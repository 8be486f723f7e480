"""Random MoE layers, drawn from the tables: a new row is drawn without a change here."""

import random
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from turnout import MoE, MoEOutput, total_loss
from turnout.contracts import CapacityPolicy, ExpertBackend, Loss, RouterConfig
from turnout.errors import ConfigError
from turnout.experts import FFNExperts
from turnout.experts.activations import Activation
from turnout.losses import LoadBalance, RouterZ
from turnout.tensors import Assignment

Row = TypeVar("Row")
Content = Literal["normal", "lattice", "crowded"]

MODULES = "modules"  # the expert kind that stands for a user's own nn.Modules
TOKENS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 16, 17, 19, 24, 31, 33, 48, 64, 97, 128, 257)
EXPERTS = (1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 8, 9, 10, 11, 12, 13, 16, 17, 24, 32, 64)
# values tried for settings that are numbers, by name; other numbers keep their default
NUMBERS: dict[str, tuple[float, ...]] = {
    "k": (1, 2, 3, 4, 5, 6, 7, 8),
    "groups": (1, 1, 2, 4),
    "top_groups": (1, 1, 2),
    "scale": (1.0, 2.5),
    "jitter": (0.0, 0.01, 0.3),
    "factor": (0.1, 0.5, 1.0, 1.1, 1.25, 2.0, 9.0),
    "minimum": (0, 1, 4),
    "group_size": (0, 0, 1, 5, 16),
    "coefficient": (0.0, 0.01, 1.0),
    "p": (0.1, 0.4, 0.7, 1.0),
    "most": (0, 0, 1, 3),
    "expected_choices": (1, 2),
    "proj_dim": (2, 16),
    "alignment": (1, 1, 4),
    "threshold": (0.1, 0.3, 0.45, 0.75),
    "eval_factor": (0.0, 0.0, 0.5, 2.0),
    "vocab_size": (0, 64),
    "skew": (0.0, 1.0),
    "rounds": (1, 2, 3),
    "switch_step": (0, 5),
    "temperature": (0.1, 0.5),
}
# what routers have learned between steps, by name: at its start each of them is idle
BUFFERS: dict[str, Callable[[torch.Size, torch.Generator], Tensor]] = {
    "bias_E": lambda shape, g: torch.randn(shape, generator=g).double() / 4,
    "price_E": lambda shape, g: torch.randn(shape, generator=g).double() / 4,
    "least_capacity": lambda shape, g: torch.randint(6, shape, generator=g),
    "switched": lambda shape, g: torch.rand(shape, generator=g) < 0.5,
    "growths": lambda shape, g: torch.randint(100, shape, generator=g),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Everything that determines a layer, its input and its randomness."""

    seed: int
    shape: tuple[int, ...]  # of x, without its last axis
    dim: int
    hidden: int
    num_experts: int
    router: RouterConfig
    capacity: CapacityPolicy
    losses: tuple[Loss, ...]
    expert: str  # an expert kind, or MODULES
    bias: bool
    shared_hidden: int
    padding: float | None  # share of padding; None: no mask at all
    training: bool
    content: Content  # lattice: exact logits, so ties are exact; crowded: most tokens want one expert

    @property
    def num_tokens(self) -> int:
        return int(torch.Size(self.shape).numel())


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Values for a case: float64 tensors of float32 numbers, so that both dtypes start from the same."""

    x: Tensor
    mask: Tensor | None
    token_ids: Tensor
    y_grad: Tensor  # gradient of the main loss in y
    parameters: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Result:
    """Everything the layer and the oracle must agree on."""

    y: Tensor
    losses: dict[str, Tensor]
    grads: dict[str, Tensor | None]  # x and every parameter
    kept_E: Tensor
    gate_grad: float = 0.0  # largest gradient of a gate


def takers(dtype: torch.dtype) -> list[str]:
    """Backends that take feed-forward experts of this dtype on this machine."""
    experts = FFNExperts(2, 2, 2).to(dtype)
    cpu = torch.device("cpu")
    answers = {name: row.refusal(experts, dtype=dtype, device=cpu) for name, row in ExpertBackend.TABLE.items()}
    return [name for name, refusal in answers.items() if refusal is None]


@cache
def draw_case(seed: int) -> Case:
    """The case number `seed`; neighbours take different rows of each table."""
    rng = random.Random(seed)
    names = RouterConfig.TABLE.names()
    num_experts, router = _draw_router(RouterConfig.TABLE[names[seed % len(names)]], rng)
    expert = rng.choice([*Activation.TABLE.names(), MODULES])
    training = rng.random() < 0.7
    jittered = training and bool(getattr(router, "jitter", 0))
    return Case(
        seed=seed,
        shape=_draw_shape(rng),
        dim=fitting_dim(router, num_experts, rng.randint(1, 24)),
        hidden=rng.randint(1, 24),
        num_experts=num_experts,
        router=router,
        capacity=_must(draw_settings(CapacityPolicy.TABLE[rng.choice(CapacityPolicy.TABLE.names())], rng)),
        losses=tuple(loss for loss in map(partial(_draw_loss, num_experts, router, rng), LOSS_ROWS) if loss),
        expert=expert,
        bias=rng.random() < 0.5,
        shared_hidden=rng.choice([0, 0, 1, 7, 12]),
        padding=rng.choice([None, None, None, 0.0, 0.3, 0.9, 1.0]),
        training=training,
        # rounding would break the ties of a jittered lattice at random
        content=rng.choice(["normal", "crowded"] if jittered else ["normal", "crowded", "lattice"]),
    )


def draw_settings(row: Callable[..., Row], rng: random.Random, fits: Callable[[Row], object] = bool) -> Row | None:
    """`row` with random settings for which `fits` does not raise ConfigError; None if 20 tries find none."""
    for _ in range(20):
        chosen = {name: rng.choice(values) for name, values in _choices(row).items()}
        try:
            part = row(**chosen)
            fits(part)
        except ConfigError:
            continue
        return part
    return None


def draw(case: Case, *, backend: str = "loop", dtype: torch.dtype = torch.float64) -> tuple[MoE, Inputs]:
    """The layer and the inputs of the case, the same for every backend; some tokens are zero, so all logits tie."""
    generator = torch.Generator().manual_seed(case.seed)
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(case.seed)  # what a router draws when it is built
        layer = MoE(
            case.dim,
            case.hidden,
            case.num_experts,
            router=case.router,
            expert=own_expert(case) if case.expert == MODULES else case.expert,
            bias=case.bias,
            capacity=case.capacity,
            losses=case.losses,
            shared_hidden=case.shared_hidden,
            backend=backend,
        )
    layer = layer.to(dtype).train(case.training)
    x = _draw(case.content, (*case.shape, case.dim), generator)
    inputs = Inputs(
        x=x * (torch.rand((*case.shape, 1), generator=generator) < 0.9),
        mask=None if case.padding is None else torch.rand(case.shape, generator=generator) >= case.padding,
        token_ids=torch.randint(0, 50, case.shape, generator=generator),
        y_grad=_draw("normal", x.shape, generator),
        parameters={name: _draw_parameter(case, name, p, generator) for name, p in layer.named_parameters()},
    )
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(inputs.parameters[name])
        for name, buffer in layer.router.named_buffers():
            learned = BUFFERS.get(name.rpartition(".")[2])
            if learned is not None:
                buffer.copy_(learned(buffer.shape, generator))
    return layer, inputs


def own_expert(case: Case) -> Callable[[], nn.Module]:
    """A factory of modules no backend but the loop knows."""
    return lambda: nn.Sequential(
        nn.Linear(case.dim, case.hidden, bias=case.bias), nn.Tanh(), nn.Linear(case.hidden, case.dim), nn.Softsign()
    )


def run_layer(layer: MoE, inputs: Inputs, seed: int) -> tuple[Result, MoEOutput]:
    """Forward and backward of main loss plus auxiliary losses, in the dtype of the layer."""
    layer.zero_grad(set_to_none=True)
    dtype = next(layer.parameters()).dtype
    x = inputs.x.to(dtype, copy=True).requires_grad_()
    out = layer(x, mask=inputs.mask, token_ids=inputs.token_ids, generator=torch.Generator().manual_seed(seed))
    (main_loss(out.y, inputs.y_grad) + total_loss(out.losses)).backward()
    grads = {"x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    stats = out.stats
    kept_E = stats.assigned_E - stats.dropped_capacity_E - stats.dropped_policy_E
    losses = {term.name: term.value.detach() for term in out.losses}
    return Result(y=out.y.detach(), losses=losses, grads=grads, kept_E=kept_E), out


def own_selection(layer: MoE, inputs: Inputs, seed: int, generator: torch.Generator | None = None) -> Assignment:
    """What the layer's router chooses in the layer's dtype; draws go on from a generator that is given."""
    x = inputs.x.to(next(layer.parameters()).dtype)
    mask_T = None if inputs.mask is None else inputs.mask.reshape(-1)
    generator = torch.Generator().manual_seed(seed) if generator is None else generator
    return layer.router(x.reshape(-1, layer.dim), inputs.token_ids.reshape(-1), mask_T, generator).assignment


def main_loss(y: Tensor, y_grad: Tensor) -> Tensor:
    """A loss whose gradient in y is `y_grad`."""
    return (y * y_grad.to(y.dtype)).sum()


def error(got: Tensor, want: Tensor, *, terms: float = 1.0) -> float:
    """Largest difference, relative to the largest value wanted or to the terms it is summed from; infinite for NaN."""
    if got.shape != want.shape:
        return float("inf")
    if got.numel() == 0:
        return 0.0
    got, want = got.detach().double(), want.detach()
    worst = float((got - want).abs().max() / want.abs().max().clamp(min=terms))
    return worst if worst == worst else float("inf")


def simple_case(**changes: Any) -> Case:
    """A middling case to vary by hand."""
    router: RouterConfig = changes.get("router", RouterConfig.TABLE["topk"]())
    losses = (LoadBalance(coefficient=0.5), RouterZ(coefficient=0.5))
    base = Case(
        seed=0,
        shape=(3, 11),
        dim=12,
        hidden=10,
        num_experts=5,
        router=router,
        capacity=CapacityPolicy.TABLE["none"](),
        losses=losses if router.scores_have_gradient else (),
        expert="swiglu",
        bias=True,
        shared_hidden=0,
        padding=None,
        training=True,
        content="normal",
    )
    case = replace(base, **changes)
    return replace(case, dim=fitting_dim(case.router, case.num_experts, case.dim))


LOSS_ROWS = dict(Loss.TABLE.items())


def _draw_router(row: Callable[..., RouterConfig], rng: random.Random) -> tuple[int, RouterConfig]:
    for num_experts in (rng.choice(EXPERTS) for _ in range(1000)):
        router = draw_settings(row, rng, fits=partial(_builds, num_experts))
        if router is not None:
            return num_experts, router
    raise AssertionError(f"no settings of {row} fit any number of experts")


def _draw_loss(num_experts: int, router: RouterConfig, rng: random.Random, name: str) -> Loss | None:
    """A loss of that row which the router can feed; None when it is not drawn, or none fits."""
    if rng.random() >= 0.7:
        return None
    return draw_settings(LOSS_ROWS[name], rng, fits=lambda loss: loss.check(router, num_experts))


def loss_of(name: str, num_experts: int, **settings: Any) -> Loss:
    """The row, over as few devices as can hold equally many experts: over one, the balance of devices is constant.

    Locality is that of a node with half of the experts, for with all of them it is constant.
    """
    if name in ("device_balance", "communication_balance"):
        settings["groups"] = min(n for n in range(2, num_experts + 1) if num_experts % n == 0)
    if name == "locality":
        settings["local"] = tuple(range(num_experts // 2))
    return Loss.TABLE[name](**settings)


def fitting_dim(router: RouterConfig, num_experts: int, wanted: int) -> int:
    """The least width from `wanted` on for which the router builds; GrAP needs num_experts to divide it."""
    for dim in range(wanted, wanted + num_experts):
        try:
            router.build(dim, num_experts)
        except ConfigError:
            continue
        return dim
    return wanted


def _builds(num_experts: int, router: RouterConfig) -> object:
    return router.build(fitting_dim(router, num_experts, 4), num_experts)


def _draw_shape(rng: random.Random) -> tuple[int, ...]:
    num_tokens = (
        rng.choice(TOKENS) if rng.random() < 0.5 else min(rng.randint(0, 257), rng.randint(0, 257), rng.randint(0, 257))
    )
    num_sequences = rng.choice([1, 2, 3, 4])
    form = rng.random()
    if form < 0.5:
        return (num_tokens,)
    if form < 0.9:
        return (num_sequences, num_tokens // num_sequences)
    return (2, 1, num_tokens // 2)


def _draw(content: Content, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if content == "lattice":
        return torch.randint(-2, 3, shape, generator=generator).double() / 2
    values = torch.randn(shape, generator=generator).double()
    return values.abs() if content == "crowded" else values


def _draw_parameter(case: Case, name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """Weights that keep the scale of their input; biases are not zero, or their gradients alone would be tested."""
    is_router_weight = name.startswith("router.") and like.ndim == 2
    if is_router_weight and case.content == "lattice":
        return _draw("lattice", like.shape, generator)
    value = _draw("normal", like.shape, generator) * (like.shape[-1] if like.ndim > 1 else 1.0) ** -0.5
    if is_router_weight and case.content == "crowded":
        value[case.seed % len(value)] += 4.0 / case.dim
    return value.float().double()


@cache
def _choices(row: Callable[..., object]) -> dict[str, tuple[Any, ...]]:
    """The values to try for each setting of a row: all of a Literal, both of a bool, NUMBERS for a number."""
    hints = get_type_hints(row)
    found: dict[str, tuple[Any, ...]] = {}
    for field in fields(row):  # type: ignore[arg-type]
        hint = hints[field.name]
        if hint is bool:
            found[field.name] = (False, True)
        elif get_origin(hint) is Literal:
            found[field.name] = get_args(hint)
        elif field.name in NUMBERS:
            found[field.name] = NUMBERS[field.name]
    return found


def _must(part: Row | None) -> Row:
    assert part is not None, "no legal settings found"
    return part
