"""The replaceable parts of a layer, each an interface on this page."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from turnout.config import Settings, is_whole
from turnout.errors import ConfigError, ShapeError
from turnout.placement import Site
from turnout.registry import Table
from turnout.tensors import (
    Admission,
    Assignment,
    DispatchPlan,
    LossTerm,
    MoEStats,
    Ragged,
    RouterInput,
    RouterOutput,
    Rows,
    SoftmaxChoice,
    as_token_ids,
)


class Router(nn.Module, ABC):
    """Chooses experts for tokens.

    `forward` is final: it takes padding out before `route` sees the tokens, and computes in at least float32,
    so no router can count, send or give room to a padding token, or lose precision to the model's dtype.
    """

    any_top_k: ClassVar[bool] = False  # a call may ask for any number of choices, 1 to E

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.dim = dim
        self.num_experts = num_experts

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Buffers move and keep their dtype: bfloat16 would round away what a router learns between steps."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, value in before.items():
            now = self.get_buffer(name)
            if now.dtype != value.dtype:
                known = now if value.is_meta else value
                setattr(self, name, known.to(now.device, value.dtype))
        return self

    def forward(
        self,
        x_TD: Float[Tensor, "T D"],
        token_ids_T: Int64[Tensor, "T"] | None = None,
        mask_T: Bool[Tensor, "T"] | None = None,
        generator: torch.Generator | None = None,
        *,
        top_k: int | None = None,
    ) -> RouterOutput:
        """Route the tokens whose mask is true (all, without a mask); `top_k` replaces the router's own for this call.

        Raises: ShapeError if width, mask or ids do not fit; ConfigError if the router cannot give top_k choices.
        """
        num_tokens, dim = x_TD.shape
        if dim != self.dim:
            raise ShapeError(f"router got width {dim}; it was built for dim={self.dim}")
        if top_k is not None:
            self._check_top_k(top_k)
        token_ids_T = as_token_ids(token_ids_T)
        token_R = torch.arange(num_tokens, device=x_TD.device) if mask_T is None else _real_tokens(mask_T, num_tokens)
        if mask_T is not None:
            x_TD = x_TD[token_R]
            token_ids_T = None if token_ids_T is None else token_ids_T[token_R]
        x_RD = x_TD if x_TD.dtype.itemsize >= 4 else x_TD.float()
        with _full_precision(x_TD.device.type):
            return self.route(
                RouterInput(
                    # one reader of x: its gradients add up in the same order with and without a mask
                    x_RD=x_RD.view_as(x_RD) if torch.is_grad_enabled() else x_RD,
                    token_ids_R=token_ids_T,
                    token_R=token_R,
                    num_tokens=num_tokens,
                    generator=generator,
                    top_k=top_k,
                )
            )

    @abstractmethod
    def route(self, tokens: RouterInput) -> RouterOutput:
        """Route the R tokens of one call, none of them padding."""

    def softmax_choice(self) -> SoftmaxChoice | None:
        """What a kernel needs to route tokens as `route` does now, gradients apart; None: this router does more."""
        return None

    def _check_top_k(self, top_k: int) -> None:
        if not self.any_top_k:
            raise ConfigError(
                f"top_k={top_k} for one call: a {type(self).__name__} has its own number of choices; "
                "leave top_k out, or use the topk router"
            )
        if not is_whole(top_k) or not 1 <= top_k <= self.num_experts:
            raise ConfigError(
                f"top_k={top_k!r} for one call must be a whole number from 1 to num_experts={self.num_experts}"
            )

    def before_training(self, token_counts_V: Int64[Tensor, "V"]) -> None:
        """Called once before a new run with how often its text has each token id; routers by token id override it."""

    def after_step(self, stats: MoEStats) -> None:
        """Called once per optimizer step with the whole step's stats; routers that learn from load override it."""


class RouterConfig(Settings, ABC):
    """A row of the router table: settings without sizes; `build` adds the sizes."""

    TABLE: ClassVar[Table[type["RouterConfig"]]] = Table("router")

    @property
    @abstractmethod
    def choices(self) -> int:
        """Experts a token has: exactly, at most, or on average where the router aims at an average."""

    @property
    def causal(self) -> bool:
        """Whether, out of training, a token's experts do not depend on the tokens after it."""
        return True

    @property
    def exact_choices(self) -> bool:
        """Whether, out of training, every token has exactly `choices` experts."""
        return True

    @property
    def own_balance(self) -> str:
        """How the router balances load by itself, without a loss, in a few words; empty if it does not."""
        return ""

    @property
    def gives_smooth_load(self) -> bool:
        """Whether its output has `smooth_load_E`."""
        return False

    @property
    def scores_have_gradient(self) -> bool:
        """Whether a gradient of the scores reaches anything: the router's parameters, or x."""
        return True

    @property
    def needs_whole_layer(self) -> str:
        """What of a step only the router of a whole layer is told, and this one learns from; empty: nothing."""
        return ""

    def remark(self, site: Site) -> str:
        """What its settings say of devices or nodes and does not hold there, in a sentence; empty: nothing.

        Routers with groups that stand for ranks or nodes override it.
        """
        del site
        return ""

    def check_decoder(self) -> None:
        """Called by a model that reads from left to right.

        Raises: ConfigError if a token's experts depend on later tokens.
        """

    @abstractmethod
    def build(self, dim: int, num_experts: int) -> nn.Module:
        """The module, which keeps the contract of `Router.forward`.

        Raises: ConfigError if the settings do not fit the sizes.
        """


@dataclass(frozen=True, kw_only=True)
class GivenRouter(RouterConfig):
    """A router module of the user's own, which keeps the contract of `Router.forward`; it has no row in the table."""

    module: nn.Module
    most_choices: int

    @property
    def gives_smooth_load(self) -> bool:
        """Not known before it has run: `load_cv` finds out then."""
        return True

    @property
    def choices(self) -> int:
        return self.most_choices

    @property
    def exact_choices(self) -> bool:
        """Not known before it has run."""
        return False

    def build(self, dim: int, num_experts: int) -> nn.Module:
        """Raises: ConfigError if it is called in another way, or was built for other sizes."""
        module, name = self.module, type(self.module).__name__
        try:
            inspect.signature(module.forward).bind(None, None, None, None)
        except TypeError as error:
            raise ConfigError(
                f"router={name} is not called as a Router is, with (x_TD, token_ids_T, mask_T, generator): {error}"
            ) from error
        if isinstance(module, Router) and (module.dim, module.num_experts) != (dim, num_experts):
            raise ConfigError(
                f"router={name} was built for dim={module.dim}, num_experts={module.num_experts}; "
                f"the layer has dim={dim}, num_experts={num_experts}"
            )
        return module

    def check_output(self, routing: object, *, num_tokens: int, num_experts: int) -> None:
        """Raises: ConfigError unless `routing` is a RouterOutput for these sizes, with every index within them."""
        name = type(self.module).__name__
        if not isinstance(routing, RouterOutput):
            raise ConfigError(f"router={name} returned {type(routing).__name__}; a Router returns a RouterOutput")
        given = routing.assignment
        if (given.num_tokens, given.num_experts) != (num_tokens, num_experts):
            raise ConfigError(
                f"router={name} gave an assignment of num_tokens={given.num_tokens}, num_experts={given.num_experts}; "
                f"this call has num_tokens={num_tokens}, num_experts={num_experts}"
            )
        if torch.compiler.is_compiling():
            return
        for field, index_N, size in (("token_N", given.token_N, num_tokens), ("expert_N", given.expert_N, num_experts)):
            if len(index_N) and not 0 <= int(index_N.min()) <= int(index_N.max()) < size:
                raise ConfigError(
                    f"router={name} gave {field} from {int(index_N.min())} to {int(index_N.max())}; "
                    f"legal: 0 to {size - 1}"
                )


class CapacityPolicy(Settings, ABC):
    """Decides which assignments are sent. A frozen dataclass of settings; pure."""

    TABLE: ClassVar[Table[type["CapacityPolicy"]]] = Table("capacity policy")

    def check_decoder(self, router: RouterConfig, num_experts: int) -> None:
        """Called by a model that reads from left to right.

        Raises: ConfigError if, out of training, what is sent of a token depends on later tokens.
        """

    @abstractmethod
    def admit(
        self,
        assignment: Assignment,
        *,
        training: bool = True,
        generator: torch.Generator | None = None,
        factor: float | None = None,
    ) -> Admission:
        """Admission over the same N assignments; kept + dropped = all.

        `factor` replaces the policy's own capacity factor for this call.
        Raises: ConfigError if the policy has no such factor.
        """


class Loss(Settings, ABC):
    """An auxiliary loss on routing. A frozen dataclass of settings; pure. `check` is final."""

    TABLE: ClassVar[Table[type["Loss"]]] = Table("loss")
    balances: ClassVar[bool] = False  # its gradient moves tokens from full experts to empty ones

    @property
    def spans_step(self) -> bool:
        """Whether the term of a micro-batch depends on the others of its optimizer step: it wants `step_stats`."""
        return False

    def check(self, router: RouterConfig, num_experts: int) -> None:
        """Called when a layer is built.

        Raises: ConfigError if the loss cannot be formed on that router, or would be a constant there.
        """
        if not router.scores_have_gradient:
            raise ConfigError(
                f"the loss {type(self).__name__} would be a constant: nothing in the router {type(router).__name__} "
                "learns, or passes a gradient on; leave auxiliary losses out: losses=(), in a recipe "
                "model.moe.losses=[]"
            )
        self.check_own(router, num_experts)

    def check_own(self, router: RouterConfig, num_experts: int) -> None:
        """What this loss alone needs. Raises: ConfigError if the router or the sizes lack it."""

    def placed(self, site: Site) -> "Loss":
        """This loss for a process that stands there; one that asks which experts are near overrides it.

        Raises: ConfigError if its settings say already where the process stands.
        """
        del site
        return self

    def remark(self, site: Site) -> str:
        """What of it does not hold on such a layout, in a sentence; empty: nothing. Losses over devices override it."""
        del site
        return ""

    @abstractmethod
    def term(
        self,
        routing: RouterOutput,
        admission: Admission,
        *,
        sequence_length: int,
        step_stats: MoEStats | None = None,
    ) -> LossTerm:
        """The term for one call of the layer; tokens t of one sequence share t // sequence_length.

        A term is a mean over the call's tokens: parts of a step add up weighed by their share of its tokens.
        `step_stats`: what the whole step, all its micro-batches and ranks, does in this layer; None: not known.
        """


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why a backend will not take a job, and what would."""

    reason: str


class ExpertBackend(ABC):
    """Computes all experts on their rows. Stateless."""

    TABLE: ClassVar[Table["ExpertBackend"]] = Table("expert backend")
    layout: ClassVar[Literal["ragged", "padded"]]
    trains: ClassVar[bool] = True  # has a backward pass

    @abstractmethod
    def refusal(self, experts: nn.Module, *, dtype: torch.dtype, device: torch.device) -> Refusal | None:
        """None when this backend can run these experts on such rows, forward and, if it `trains`, backward."""

    def held_back(self, experts: nn.Module, *, dtype: torch.dtype, device: torch.device) -> Refusal | None:
        """Why "auto" does not take this backend even where it runs; one that must win a race first overrides it."""
        return None

    @abstractmethod
    def run(self, experts: nn.Module, rows: Rows) -> Rows:
        """Outputs in the layout of the input; padding rows are unspecified but finite."""


class FewCall(ABC):
    """A layer's few tokens, routed and computed in one call that is put together once."""

    reads: tuple[Tensor, ...]  # good for as long as these lie where they lay then

    @abstractmethod
    def __call__(self, x: Tensor) -> tuple[Tensor, Callable[[], RouterOutput]]:
        """y, and what says how the tokens were routed.

        Shapes: x (..., D), contiguous and not empty; y likewise, in its dtype.
        """


class FusedBackend(ExpertBackend):
    """A backend that also orders tokens by expert and adds up what the experts say, in one pass.

    As a plain backend it takes rows too, for layers that have no assignment.
    """

    layout = "ragged"

    def run(self, experts: nn.Module, rows: Rows) -> Rows:
        """As if each row were a token of its own."""
        assert isinstance(rows, Ragged)
        num_rows, num_experts = len(rows.x_MD), len(rows.counts_L)
        device = rows.x_MD.device
        row_M = torch.arange(num_rows, device=device)
        assignment = Assignment(
            token_N=row_M,
            expert_N=torch.arange(num_experts, device=device).repeat_interleave(rows.counts_L, output_size=num_rows),
            weight_N=torch.ones(num_rows, device=device),
            choice_N=torch.zeros_like(row_M),
            num_tokens=num_rows,
            num_experts=num_experts,
            top_k=1,
        )
        admission = Admission(keep_N=None, capacity=None, dropped_E={})
        return Ragged(x_MD=self.run_tokens(experts, rows.x_MD, assignment, admission), counts_L=rows.counts_L)

    def few_call(self, experts: nn.Module, choice: SoftmaxChoice, *, dtype: torch.dtype) -> "FewCall | None":
        """Router and experts of a few tokens of `dtype` in one call, without gradients; None: there is no such call."""
        del experts, choice, dtype
        return None

    @abstractmethod
    def run_tokens(self, experts: nn.Module, x_TD: Tensor, assignment: Assignment, admission: Admission) -> Tensor:
        """y[t] = sum of weight * expert(x[t]) over the admitted assignments, in a fixed order; zeros without one.

        Differentiable in x_TD, the weights of the assignment and the parameters.
        Shapes: x_TD (T, D); returns (T, D) in the dtype of x_TD.
        """


@dataclass(frozen=True, kw_only=True)
class ExpertCall:
    """The experts of this process in one call of a layer."""

    layout: Literal["ragged", "padded"]  # that the backend wants rows in
    capacity: int | None  # bounds the rows that this process's tokens have for one expert; None: nothing does
    weights: Mapping[str, Tensor]  # what this process keeps of them, by name
    compute: Callable[[Rows, Mapping[str, Tensor] | None], Rows]  # with other weights than those it keeps, or None


class Dispatcher(ABC):
    """Brings the kept assignments of a call to the experts, and their outputs back to the tokens."""

    @abstractmethod
    def run(self, x_TD: Tensor, assignment: Assignment, plan: DispatchPlan, experts: ExpertCall) -> Tensor:
        """Each token's rows as their experts made them, weighted and added; differentiable in x and in the weights.

        Shapes: x_TD (T, D); returns (T, D).
        """


def _full_precision(device_type: str) -> "torch.autocast | nullcontext[None]":
    # asked first: switching off what is off takes a tenth of a router's time for one token
    is_cast = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if is_cast else nullcontext()


def _real_tokens(mask_T: Tensor, num_tokens: int) -> Tensor:
    if mask_T.shape != (num_tokens,) or mask_T.dtype != torch.bool:
        raise ShapeError(f"mask has shape {tuple(mask_T.shape)} and {mask_T.dtype}; needs ({num_tokens},) torch.bool")
    return mask_T.nonzero().squeeze(1)
