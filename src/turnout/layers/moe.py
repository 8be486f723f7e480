"""The MoE layer: the one conductor of router, capacity, dispatch, experts and combine."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from turnout.config import Settings
from turnout.contracts import CapacityPolicy, Dispatcher, ExpertBackend, GivenRouter, Loss, RouterConfig
from turnout.dispatch import Dropless, LocalDispatcher
from turnout.errors import ConfigError, ShapeError
from turnout.experts import FFNExperts, ModuleExperts, choose_backend
from turnout.experts.activations import Activation
from turnout.experts.cut import Cut
from turnout.layers.expert_pass import pass_experts
from turnout.layers.few_tokens import Admitted, FewTokens
from turnout.layers.latent import Latent
from turnout.layers.mlp import MLP
from turnout.layers.stats import Decided, routed
from turnout.losses import LoadBalance
from turnout.placement import Site
from turnout.registry import nearest
from turnout.routers import TopK
from turnout.tensors import Admission, MoEOutput, MoEStats, RouterOutput, as_token_ids, check_derivatives

# far beyond any layer, and small enough that no product of sizes is beyond 64 bits
RANGES = {
    "num_experts": (1, 1 << 16),
    "hidden": (1, 1 << 20),
    "shared_hidden": (0, 1 << 20),
    "latent_dim": (0, 1 << 20),
}


@dataclass(frozen=True, kw_only=True)
class MoEConfig(Settings):
    """Settings of the MoE layers of a model; widths of the model itself are not in here."""

    num_experts: int = 8  # routed experts in a layer
    hidden: int = 512  # hidden width of one routed expert
    router: RouterConfig = TopK()  # how tokens choose experts
    capacity: CapacityPolicy = Dropless()  # which choices are sent
    losses: tuple[Loss, ...] = (LoadBalance(),)  # auxiliary losses on routing
    expert: str = "swiglu"  # kind of expert: swiglu, gelu, relu, swiglu_clamped
    bias: bool = False  # experts have biases
    shared_hidden: int = 0  # hidden width of the shared expert that sees every token; 0: none
    latent_dim: int = 0  # width in which the routed experts work, between two projections they share; 0: the model's
    backend: str = "auto"  # auto, loop, padded_bmm, grouped_mm, threaded_mm, or fused_: cpu, triton, int8, fp8
    init_std: float = 0.02  # standard deviation of the experts' initial weights

    def __post_init__(self) -> None:
        for name, (least, most) in RANGES.items():
            if not least <= getattr(self, name) <= most:
                raise ConfigError(f"moe.{name}={getattr(self, name)} must be from {least} to {most}")
        if not 0 <= self.init_std < math.inf:
            raise ConfigError(f"moe.init_std={self.init_std} must be at least 0 and finite")
        if self.router.choices > self.num_experts:
            raise ConfigError(f"moe.router takes {self.router.choices} experts a token; num_experts={self.num_experts}")
        for loss in self.losses:
            loss.check(self.router, self.num_experts)
        if self.expert not in Activation.TABLE:
            Activation.TABLE[self.expert]
        legal = ["auto", *ExpertBackend.TABLE.names()]
        if self.backend not in legal:
            raise ConfigError(
                f"unknown moe.backend {self.backend!r}; available: {', '.join(legal)}{nearest(self.backend, legal)}"
            )


class MoE(nn.Module):
    """A Mixture-of-Experts layer: y = sum over a token's experts of weight * expert(x), plus the shared expert.

    The way of a token:
    1. the router turns T tokens into N triples (token, expert, weight); padding never reaches it;
    2. the capacity policy says which of them are sent;
    3. `pass_experts` orders those by expert, and the dispatcher brings their rows to them, here or on other ranks;
    4. the backend computes each expert of this process on its rows;
    5. the dispatcher adds each token's rows, weighted; a token without rows gets exactly zero
    (on one rank a fused backend does 3 to 5 in one pass, and of a few tokens in inference 1 to 5).

    With a `latent_dim` steps 3 to 5 work in that width: x is projected down before them and y up after them.

    A first layer, whose x needs no gradient, learns nothing under torch's checkpoint(use_reentrant=True), like any
    module there: use use_reentrant=False. Second derivatives (create_graph=True) are an error.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        *,
        router: RouterConfig | nn.Module | None = None,
        expert: str | Callable[[], nn.Module] = "swiglu",
        bias: bool = False,
        capacity: CapacityPolicy | None = None,
        losses: tuple[Loss, ...] = (LoadBalance(),),
        shared_hidden: int = 0,
        latent_dim: int = 0,
        backend: str = "auto",
        init_std: float = 0.02,
    ) -> None:
        """`router` is a row of the table or any module that keeps the Router contract; `expert` a kind or a factory.

        Beside a factory's experts the shared expert is a swiglu.
        Raises: ConfigError naming the setting and the legal values.
        """
        super().__init__()
        if not 1 <= dim <= RANGES["hidden"][1]:
            raise ConfigError(f"dim={dim} must be from 1 to {RANGES['hidden'][1]}")
        if not isinstance(expert, str) and (isinstance(expert, nn.Module) or not callable(expert)):
            raise ConfigError(
                f"expert={expert!r} must be a kind, one of {', '.join(Activation.TABLE.names())}, or a function that "
                "makes a new module for each expert: lambda: nn.Linear(dim, dim)"
            )
        if isinstance(router, nn.Module):
            # nothing says how many experts it gives a token: at most all of them
            router = GivenRouter(module=router, most_choices=num_experts)
        config = MoEConfig(
            num_experts=num_experts,
            hidden=hidden,
            router=_default_router(num_experts) if router is None else router,
            capacity=Dropless() if capacity is None else capacity,
            losses=losses,
            expert=expert if isinstance(expert, str) else "swiglu",
            bias=bias,
            shared_hidden=shared_hidden,
            latent_dim=latent_dim,
            backend=backend,
            init_std=init_std,
        )
        self.config = config
        self.losses = config.losses
        self.dim = dim
        self.router = config.router.build(dim, num_experts)
        self.experts: nn.Module
        if isinstance(expert, str):
            self.experts = FFNExperts(latent_dim or dim, hidden, num_experts, kind=expert, bias=bias, init_std=init_std)
        else:
            self.experts = ModuleExperts(expert, num_experts)
        shared = MLP(dim, shared_hidden, kind=config.expert, bias=bias, init_std=init_std) if shared_hidden else None
        self.shared = shared
        self.latent = Latent(dim, latent_dim, init_std=init_std) if latent_dim else None
        self.dispatcher: Dispatcher = LocalDispatcher()
        self._few = FewTokens()

    @classmethod
    def from_config(cls, dim: int, config: MoEConfig) -> "MoE":
        """The layer a model's settings describe."""
        return cls(
            dim,
            config.hidden,
            config.num_experts,
            router=config.router,
            expert=config.expert,
            bias=config.bias,
            capacity=config.capacity,
            losses=config.losses,
            shared_hidden=config.shared_hidden,
            latent_dim=config.latent_dim,
            backend=config.backend,
            init_std=config.init_std,
        )

    def share_experts(self, dispatcher: Dispatcher, cuts: Mapping[str, Cut], rank: int) -> None:
        """From here on this process computes its part of the experts, and `dispatcher` reaches those of the others.

        The weights are parts of the same logical (E, ...) tensors, under the same names, as `cuts` says.
        """
        assert isinstance(self.experts, FFNExperts)
        self.experts.keep(cuts, rank)
        self.reach(dispatcher)

    def reach(self, dispatcher: Dispatcher) -> None:
        """From here on `dispatcher` reaches the experts of other processes; what this one keeps of them it keeps."""
        self.dispatcher = dispatcher

    def stand(self, site: Site) -> None:
        """From here on the losses know which experts are near this process.

        Raises: ConfigError if the settings of a loss say that already.
        """
        self.form(tuple(loss.placed(site) for loss in self.config.losses))

    def form(self, losses: tuple[Loss, ...]) -> None:
        """From here on these losses are formed, which are those of the settings on some layout."""
        self.losses = losses

    def forward(
        self,
        x: Float[Tensor, "*batch D"],
        *,
        mask: Bool[Tensor, "*batch"] | None = None,
        token_ids: Int64[Tensor, "*batch"] | None = None,
        generator: torch.Generator | None = None,
        top_k: int | None = None,
        capacity_factor: float | None = None,
        step_stats: MoEStats | None = None,
    ) -> MoEOutput:
        """Shapes: x (..., D), the axis before D being the sequence; mask and token_ids (...), mask False = padding.

        `top_k` and `capacity_factor` replace those of the router and the capacity policy for this call (Tutel).
        `step_stats`, for losses of scope `global`: what all micro-batches and ranks of the optimizer step do here.
        Under activation checkpointing leave `generator` None: a recomputation restores torch's own state alone, and
        would draw anew from any other.
        Raises: ShapeError if they do not fit; ConfigError if the router or the policy cannot take such a change, and
        for derivatives other than a backward pass's.
        """
        few = None
        # other ids are checked on the long way
        fit = token_ids is None or (token_ids.dtype == torch.int64 and token_ids.shape == x.shape[:-1])
        if fit and mask is None and top_k is None and capacity_factor is None and self.latent is None:
            few = self._few.run(
                x,
                router=self.router,
                experts=self.experts,
                backend=self.config.backend,
                capacity=self.config.capacity,
                dispatcher=self.dispatcher,
            )
        if few is None:
            check_derivatives(x, self)
            self._check(x, mask, token_ids)
            y_TD, decided = self._run(x, mask, token_ids, generator, top_k, capacity_factor)
            y = y_TD.to(x.dtype).view_as(x)
        else:
            y, route = few
            decided = Admitted(route, self.config.capacity)
            if self.shared is not None:
                y = (y + self.shared(x.view(-1, self.dim)).view_as(y)).to(x.dtype)
        sequence_length = x.shape[-2] if x.ndim > 2 else max(x.numel() // self.dim, 1)
        return MoEOutput(
            y=y, routed=routed(decided, self.losses, sequence_length=sequence_length, step_stats=step_stats)
        )

    def _run(
        self,
        x: Tensor,
        mask: Tensor | None,
        token_ids: Tensor | None,
        generator: torch.Generator | None,
        top_k: int | None,
        capacity_factor: float | None,
    ) -> tuple[Tensor, Decided]:
        """y_TD, and how its tokens were routed and admitted."""
        x_TD = x.reshape(-1, self.dim)
        # a user's router need not know of top_k
        asked = {} if top_k is None else {"top_k": self._check_takes_top_k(top_k)}
        routing = self.router(x_TD, _flat(as_token_ids(token_ids)), _flat(mask), generator, **asked)
        if isinstance(self.config.router, GivenRouter):
            self.config.router.check_output(routing, num_tokens=len(x_TD), num_experts=self.config.num_experts)
        admission = self.config.capacity.admit(
            routing.assignment, training=self.training, generator=generator, factor=capacity_factor
        )
        backend = choose_backend(self.experts, self.config.backend, dtype=_row_dtype(x), device=x.device)
        narrow = x_TD if self.latent is None else self.latent.down(x_TD, _flat(mask))
        y = pass_experts(
            self.experts,
            backend,
            narrow.to(_row_dtype(x)),
            routing.assignment,
            admission,
            dispatcher=self.dispatcher,
        )
        y_TD = y if self.latent is None else self.latent.up(y)
        if self.shared is not None:
            y_TD = _add_shared(y_TD, x_TD, self.shared, None if mask is None else routing.token_R)
        return y_TD, partial(_as_given, routing, admission)

    def _check_takes_top_k(self, top_k: int) -> int:
        if "top_k" not in inspect.signature(self.router.forward).parameters:
            raise ConfigError(
                f"top_k={top_k} for one call: the forward of {type(self.router).__name__} takes no top_k; leave it "
                "out, or give that forward such an argument"
            )
        return top_k

    def _check(self, x: Tensor, mask: Tensor | None, token_ids: Tensor | None) -> None:
        if x.shape[-1] != self.dim:
            raise ShapeError(f"x has width {x.shape[-1]}; the layer was built for dim={self.dim}")
        if not x.is_floating_point():
            raise ShapeError(f"x has {x.dtype}; the layer computes in floating point: pass x.float()")
        for name, value in (("mask", mask), ("token_ids", token_ids)):
            if value is not None and value.shape != x.shape[:-1]:
                raise ShapeError(
                    f"{name} has shape {tuple(value.shape)}; x of shape {tuple(x.shape)} needs {tuple(x.shape[:-1])}"
                )


def _default_router(num_experts: int) -> TopK:
    # fewer than one expert is the config's error, not that of a router nobody asked for
    return TopK() if num_experts > 1 else TopK(k=1, renormalize=False)


def _as_given(routing: RouterOutput, admission: Admission) -> tuple[RouterOutput, Admission]:
    return routing, admission


def _add_shared(y_TD: Tensor, x_TD: Tensor, shared: MLP, token_R: Tensor | None) -> Tensor:
    """Padding is left out rather than multiplied by zero: it may hold NaN, and more rows may round differently."""
    if token_R is None:
        return y_TD + shared(x_TD)
    return y_TD.index_add(0, token_R, shared(x_TD[token_R]).to(y_TD.dtype))


def _flat(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.reshape(-1)


def _row_dtype(x: Tensor) -> torch.dtype:
    """grouped_mm and bmm see autocast differently; the layer decides once. float64 stays, as under torch's own."""
    device_type = x.device.type
    is_cast = torch.is_autocast_enabled(device_type) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device_type) if is_cast else x.dtype
