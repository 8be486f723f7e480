"""The one dimension legend, and the values that travel between the parts of a layer.

Tensors end in their shape, in letters of this legend (the suffix describes the tensor itself):

    T tokens   R routed tokens (tokens that are not padding)   D model width   F expert hidden
    E experts  K choices per token   N assignments   M rows dispatched (kept assignments)
    L experts on this rank   C capacity   G gate-and-up columns (F, or 2F when gated)
    V vocabulary   S sequence   B batch   H heads   X head width   Z latent width

Scalars and lists carry no suffix.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property, wraps
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from turnout.errors import ConfigError, ShapeError

Scope = Literal["micro_batch", "sequence", "data_parallel", "global"]
Value = TypeVar("Value")


class found_once(cached_property[Value]):
    """A cached property that torch.compile can take, which then keeps nothing: before Python 3.12 they have a lock."""

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is not None and torch.compiler.is_compiling():
            return self.func(instance)
        return super().__get__(instance, owner)


@dataclass(frozen=True, kw_only=True)
class BlockCounts:
    """Choices of each expert among every so many tokens, counted by the kernel that made the choices."""

    expert_N: Int64[Tensor, "N"]  # the choices themselves: of others these are not the counts
    count_BE: Int32[Tensor, "blocks E"]


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """N triples (token, expert, weight): what every router returns, whatever its idea.

    Token choice, expert choice, hash, top-p and replay all fit, so nothing after the router knows which one ran.
    """

    token_N: Int64[Tensor, "N"]  # index into the layer's T tokens
    expert_N: Int64[Tensor, "N"]
    weight_N: Float[Tensor, "N"]  # at least float32; carries the gradient to the router
    choice_N: Int64[Tensor, "N"]  # which of the token's choices this is, 0 first
    num_tokens: int
    num_experts: int
    declined_N: Bool[Tensor, "N"] | None = None  # choices the router will not send, which still hold their place
    top_k: int | None = None  # K, when rows are token-major and every routed token has exactly K choices
    priority_N: Float[Tensor, "N"] | None = None  # what a capacity by score keeps first; None: the weights
    least_capacity: Int64[Tensor, ""] | None = None  # rows the router wants an expert to have room for, at least
    block_counts: BlockCounts | None = None  # where the choices were counted as they were made

    @found_once
    def counts_E(self) -> Int64[Tensor, "E"]:
        """Assignments per expert, counted once; a declined choice counts, a padding token has none."""
        count_BE = self.count_BE
        return counted(self.expert_N, self.num_experts) if count_BE is None else count_BE.sum(dim=0)

    @property
    def count_BE(self) -> "Int32[Tensor, 'blocks E'] | None":
        """Counts of blocks of these very choices; None where nobody counted, or counted others than these."""
        found = self.block_counts
        return found.count_BE if found is not None and found.expert_N is self.expert_N else None

    def first_choice_counts_E(self) -> Int64[Tensor, "E"]:
        """First choices per expert."""
        # no choices picked out: how many there are would have to be known
        first_N = (self.choice_N == 0).long()
        return first_N.new_zeros(self.num_experts).scatter_add_(0, self.expert_N, first_N)

    def as_topk(self) -> "tuple[Int64[Tensor, 'R K'], Float[Tensor, 'R K']]":
        """The same as (expert_RK, weight_RK).

        Raises: ShapeError unless every routed token has exactly K choices.
        """
        if self.top_k is None:
            raise ShapeError("as_topk() needs a router that gives every token exactly K choices")
        return self.expert_N.view(-1, self.top_k), self.weight_N.view(-1, self.top_k)


@dataclass(frozen=True, kw_only=True)
class RouterInput:
    """What a router sees of one call of the layer: R tokens, none of them padding."""

    x_RD: Float[Tensor, "R D"]  # at least float32
    token_ids_R: Int64[Tensor, "R"] | None
    token_R: Int64[Tensor, "R"]  # index of each row in the layer's T tokens
    num_tokens: int  # T, padding included
    generator: torch.Generator | None
    top_k: int | None = None  # choices per token this call asks for, instead of the router's own


@dataclass(frozen=True, kw_only=True)
class LossTerm:
    """One auxiliary loss: the total adds `coefficient * value`."""

    name: str
    value: Float[Tensor, ""]
    coefficient: float
    scope: Scope


@dataclass(frozen=True, kw_only=True)
class RouterOutput:
    """An assignment with what the losses need. Rows are the R routed tokens: padding never reaches a router."""

    assignment: Assignment
    logits_RE: Float[Tensor, "R E"]
    scores_RE: Float[Tensor, "R E"]  # each row sums to 1
    token_R: Int64[Tensor, "R"]  # index of each row in the layer's T tokens
    losses: tuple[LossTerm, ...] = ()  # terms only this router can form
    smooth_load_E: Float[Tensor, "E"] | None = None  # expected load as a function with a gradient (noisy routers)
    tally: Float[Tensor, "..."] | None = None  # sums over the tokens that after_step wants of the whole step


class SoftmaxChoice(NamedTuple):
    """All that a router does: the k best of softmax(x W^T + b), and as weights their shares of it.

    Where those are to be renormalised they sum to 1.
    """

    weight_ED: Float[Tensor, "E D"]
    bias_E: Float[Tensor, "E"] | None
    k: int
    renormalize: bool


@dataclass(frozen=True, kw_only=True)
class Admission:
    """Which assignments are sent. kept + dropped = all, by expert and by reason."""

    keep_N: Bool[Tensor, "N"] | None  # None: every one
    capacity: int | None  # most rows an expert takes; None when it takes all
    dropped_E: Mapping[str, Int64[Tensor, "E"]]  # reason (capacity, policy) -> dropped per expert


@dataclass(frozen=True, kw_only=True)
class DispatchPlan:
    """Where each kept assignment stands among the dispatched rows; rows are ordered by (expert, queue place)."""

    assignment_M: Int64[Tensor, "M"]  # index into the N assignments
    token_M: Int64[Tensor, "M"]
    counts_E: Int64[Tensor, "E"]
    row_by_token_M: Int64[Tensor, "M"]  # rows again, ordered by token: what each token takes back
    row_offset_T: Int64[Tensor, "T"]  # start of each token's run in row_by_token_M


@dataclass(frozen=True, kw_only=True)
class Ragged:
    """Rows of all experts one after another, expert by expert."""

    x_MD: Tensor
    counts_L: Int64[Tensor, "L"]

    @property
    def x(self) -> Tensor:
        """The rows, in whichever layout."""
        return self.x_MD


@dataclass(frozen=True, kw_only=True)
class Padded:
    """Rows of each expert in a block of C; rows past an expert's count are zero and are not read back."""

    x_LCD: Tensor
    counts_L: Int64[Tensor, "L"]

    @property
    def x(self) -> Tensor:
        """The rows, in whichever layout."""
        return self.x_LCD


Rows = Ragged | Padded


@dataclass(frozen=True, kw_only=True)
class MoEStats:
    """What one layer did with its tokens; adding two gives the stats of both micro-batches (or ranks)."""

    assigned_E: Int64[Tensor, "E"]
    dropped_capacity_E: Int64[Tensor, "E"]
    dropped_policy_E: Int64[Tensor, "E"]
    num_routed: Int64[Tensor, ""]  # tokens that are not padding
    num_padding: Int64[Tensor, ""]
    entropy_sum: Float[Tensor, ""]  # nats, summed over routed tokens; estimated of more than 1,024
    margin_sum: Float[Tensor, ""]  # best score minus second best, summed alike
    tally: Float[Tensor, "..."] = field(default_factory=lambda: torch.zeros(0))  # the router's own sums, see there

    def __add__(self, other: "MoEStats") -> "MoEStats":
        return MoEStats(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True, kw_only=True)
class Routed:
    """What a layer decided in one call and what follows from it, each computed when first asked for.

    Few who generate text ever ask. The output of the layer is not in here, so that its memory may go.
    """

    decide: Callable[[], tuple[Assignment, Tensor | None]]
    formed: tuple[LossTerm, ...] | None  # by the layer itself, where gradients are recorded or ranks compute
    form: Callable[[], tuple[LossTerm, ...]]
    collect: Callable[[], MoEStats]

    @property
    def decided(self) -> tuple[Assignment, Tensor | None]:
        """Who was to go where, for a recording or a picture; and which of these were sent, None: every one."""
        return self.decide()

    @property
    def losses(self) -> tuple[LossTerm, ...]:
        """Auxiliary losses."""
        return self._formed_later if self.formed is None else self.formed

    @found_once
    def _formed_later(self) -> tuple[LossTerm, ...]:
        return self.form()

    @found_once
    def stats(self) -> MoEStats:
        """What the layer did with its tokens."""
        return self.collect()


@dataclass(frozen=True, kw_only=True)
class MoEOutput:
    """The layer's result: output, auxiliary losses and statistics, all returned, none stored."""

    y: Tensor
    routed: Routed

    @property
    def losses(self) -> tuple[LossTerm, ...]:
        """Auxiliary losses of the call."""
        return self.routed.losses

    @property
    def stats(self) -> MoEStats:
        """What the layer did with its tokens."""
        return self.routed.stats

    @property
    def assignment(self) -> Assignment:
        """Who was to go where."""
        return self.routed.decided[0]

    @property
    def keep_N(self) -> Tensor | None:
        """Which of the assignment were sent; None: every one. Shapes: (N,) bool."""
        return self.routed.decided[1]


def is_traced(*tensors: Tensor) -> bool:
    """Whether operators on these are recorded or replaced, rather than run on numbers that lie in memory.

    So do torch.compile, a dispatch mode (fake tensors, make_fx, a counter of FLOPs) and most kinds of tensor that are
    not torch's own: a function that reads addresses would read what is not there, or be left out of the record.
    """
    # torch has no public name for the second
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    return any(type(tensor) is not Tensor and type(tensor) is not nn.Parameter for tensor in tensors)


def counted(index_N: Tensor, size: int) -> Tensor:
    """How often each number below `size` occurs, without a host copy: bincount asks for the largest one.

    Shapes: index_N (N,) int64; returns (size,) int64.
    """
    if index_N.device.type == "cpu" and not is_traced(index_N):
        return torch.bincount(index_N, minlength=size)
    return index_N.new_zeros(size).scatter_add_(0, index_N, torch.ones_like(index_N))


def as_token_ids(ids: Tensor | None) -> Tensor | None:
    """The ids as int64, from any whole numbers: one id is one number, whatever dtype it came in.

    Raises: ShapeError if they are not whole numbers.
    """
    if ids is None:
        return None
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ShapeError(f"token_ids has {ids.dtype}; ids are whole numbers: torch.int64, or any other integer dtype")
    return ids.to(torch.int64)


def fill_normal(weight: Tensor, std: float) -> None:
    """Draws initial weights, in place.

    Raises: ConfigError if no normal distribution has that standard deviation.
    """
    if not 0 <= std < math.inf:
        raise ConfigError(f"init_std={std} must be at least 0 and finite")
    # what has a shape alone has nothing to fill, and torch takes milliseconds to find that out
    if not weight.is_meta:
        torch.nn.init.normal_(weight, std=std)


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For the backward of an autograd function whose gradients have no gradient of their own.

    torch's `once_differentiable` alone says so only where the second pass reaches it, and some do not: the term is
    then missing from the result.
    Raises: ConfigError in a backward pass with create_graph=True.
    """
    once = once_differentiable(backward)

    @wraps(backward)
    def checked(ctx: Any, *grads: Tensor) -> Any:
        # autograd runs a backward with gradients enabled when it is to be differentiated again, and only then
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise ConfigError(
                "create_graph=True: the layers have no second derivatives (gradient penalties, Hessian products); "
                "take finite differences of first gradients, in float64 and with backend='loop'"
            )
        return once(ctx, *grads)

    return checked


# None where there is no transform; torch has no public name for it
_transform = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", lambda: None)


def is_transformed() -> bool:
    """Whether this is within a transform of torch.func, or where forward-mode derivatives are taken."""
    return _transform() is not None or getattr(forward_ad, "_current_level", -1) >= 0


def check_derivatives(x: Tensor, layer: nn.Module) -> None:
    """Of a layer whose kernels have a backward pass and nothing else: a tangent beside what they read would be lost.

    Raises: ConfigError for forward-mode derivatives of x or of a parameter, and within any transform of torch.func.
    """
    # most calls have neither
    if torch.compiler.is_compiling() or not is_transformed():
        return
    tensors = (x, *layer.parameters())
    if _transform() is not None or any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise ConfigError(
            "a MoE layer has gradients by backward() and torch.autograd.grad alone: no forward-mode derivatives, no "
            "vmap, jvp or grad of torch.func; take finite differences, in float64 and with backend='loop'"
        )


def total_loss(losses: tuple[LossTerm, ...]) -> Tensor:
    """Sum of coefficient * value; add it to the task loss.

    Shapes: returns (); a float zero on the CPU when there are no terms.
    """
    return sum((term.coefficient * term.value for term in losses), start=torch.zeros(()))
