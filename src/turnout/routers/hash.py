"""Hash: a token's experts are a fixed function of its id; nothing is learned, so nothing has to be balanced."""

import heapq
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from turnout.contracts import Router, RouterConfig
from turnout.errors import ConfigError, ShapeError
from turnout.routers.pieces import check_choices, check_scale, from_topk
from turnout.tensors import RouterInput, RouterOutput

# a product of two numbers below it fits int64
PRIME = 2**31 - 1
# each reads the counts of the whole vocabulary before the first step
MOST_TRIES = 1000


@RouterConfig.TABLE.register("hash")
@dataclass(frozen=True, kw_only=True)
class Hash(RouterConfig):
    """Routing by token id: every token of one id takes the same k experts, each with weight scale / k.

    Each layer draws its own function, so tokens that share an expert in one layer part in the next. An expert is as
    busy as the ids it was given are frequent; a new run draws `tries` functions and keeps the evenest on its text.
    With `vocab_size` the layer has a table instead, in which a new run gives the most frequent ids to the emptiest
    experts: evener, at V x k integers a layer.
    Source: Roller et al. 2021, arXiv:2106.04426 (random hash, balanced hash); the functions are universal, Carter &
        Wegman 1979.
    """

    k: int = 1  # experts per token
    scale: float = 1.0  # sum of a token's weights
    tries: int = 64  # functions drawn before training, of which the one with the lowest greatest load is kept
    vocab_size: int = 0  # ids in a table balanced by their frequency, in place of a function; 0: no table

    def __post_init__(self) -> None:
        for name in ("k", "tries"):
            if getattr(self, name) < 1:
                raise ConfigError(f"router.{name}={getattr(self, name)} must be at least 1")
        if self.tries > MOST_TRIES:
            raise ConfigError(f"router.tries={self.tries} must be at most {MOST_TRIES}: more draws find no evener one")
        check_scale(self.scale)
        if self.vocab_size < 0:
            raise ConfigError(f"router.vocab_size={self.vocab_size} must be at least 0; 0: a function, no table")

    @property
    def choices(self) -> int:
        return self.k

    @property
    def own_balance(self) -> str:
        return "table of token ids, balanced by frequency" if self.vocab_size else "fixed hash of the token id"

    @property
    def scores_have_gradient(self) -> bool:
        return False

    def build(self, dim: int, num_experts: int) -> Router:
        check_choices(self.k, num_experts)
        return HashRouter(dim, num_experts, self)


class HashRouter(Router):
    """The module of `Hash`: owns the coefficients of its two functions, and the table, as buffers checkpoints keep."""

    coefficients: Tensor  # (2 functions, factor and summand) int64
    expert_VK: Tensor | None  # the table; None without a vocab_size

    def __init__(self, dim: int, num_experts: int, config: Hash) -> None:
        super().__init__(dim, num_experts)
        self.config = config
        self.register_buffer("coefficients", torch.empty(2, 2, dtype=torch.int64))
        table = torch.empty(config.vocab_size, config.k, dtype=torch.int64) if config.vocab_size else None
        self.register_buffer("expert_VK", table)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws both functions anew; they also fill the table."""
        self.coefficients.random_(1, PRIME)
        if self.expert_VK is not None:
            id_V = torch.arange(self.config.vocab_size, device=self.expert_VK.device)
            self.expert_VK.copy_(self._hashed(id_V))

    def route(self, tokens: RouterInput) -> RouterOutput:
        """Raises: ShapeError without token ids, or with one that the table does not have."""
        if tokens.token_ids_R is None:
            raise ShapeError("the hash router chooses by token id: call the layer with token_ids, one for each token")
        expert_RK = self._experts(tokens.token_ids_R)
        share, shape_RE = 1 / self.config.k, (len(tokens.token_R), self.num_experts)
        assignment = from_topk(
            expert_RK,
            tokens.x_RD.new_full(expert_RK.shape, share * self.config.scale),
            tokens,
            num_experts=self.num_experts,
        )
        # the log of the scores, written down: log(0) is slow
        logits_RE = tokens.x_RD.new_full(shape_RE, -math.inf).scatter_(1, expert_RK, math.log(share))
        scores_RE = tokens.x_RD.new_zeros(shape_RE).scatter_(1, expert_RK, share)
        return RouterOutput(assignment=assignment, logits_RE=logits_RE, scores_RE=scores_RE, token_R=tokens.token_R)

    @torch.no_grad()
    def before_training(self, token_counts_V: Tensor) -> None:
        """Keeps the evenest of `tries` functions, the present one among them; or balances the table.

        Raises: ConfigError if the text has more ids than the table.
        """
        if self.expert_VK is not None:
            self._balance_table(self.expert_VK, token_counts_V)
            return
        id_V = torch.arange(len(token_counts_V), device=token_counts_V.device)
        lowest, best = math.inf, self.coefficients.clone()
        for attempt in range(self.config.tries):
            if attempt:
                self.reset_parameters()
            expert_N = self._hashed(id_V.to(self.coefficients.device)).reshape(-1)
            count_N = token_counts_V.to(expert_N.device).repeat_interleave(self.config.k)
            load_E = count_N.new_zeros(self.num_experts).index_add_(0, expert_N, count_N)
            if (greatest := int(load_E.max())) < lowest:
                lowest, best = greatest, self.coefficients.clone()
        self.coefficients.copy_(best)

    def _balance_table(self, expert_VK: Tensor, token_counts_V: Tensor) -> None:
        num_ids = len(token_counts_V)
        if num_ids > self.config.vocab_size:
            raise ConfigError(
                f"router.vocab_size={self.config.vocab_size} is less than the {num_ids} ids of the text's tokenizer; "
                f"legal: {num_ids} or more, or 0 for a function of any id"
            )
        # in strict order of frequency every layer would part the ids alike
        order_V = (token_counts_V * (1 + torch.rand(num_ids, dtype=torch.float64))).argsort(descending=True)
        # ids the text does not have stay where the function put them
        seen_V = order_V[token_counts_V[order_V] > 0]
        table_VK = emptiest_experts(token_counts_V[seen_V].tolist(), self.num_experts, self.config.k)
        expert_VK[seen_V.to(expert_VK.device)] = table_VK.to(expert_VK.device)

    def _experts(self, token_ids_R: Tensor) -> Tensor:
        if self.expert_VK is None:
            return self._hashed(token_ids_R)
        _require_below(self.config.vocab_size, token_ids_R)
        return self.expert_VK[token_ids_R]

    def _hashed(self, token_ids_R: Tensor) -> Tensor:
        """Double hashing: from a first expert on by a stride that shares no factor with E, so all k differ."""
        id_R = token_ids_R.remainder(PRIME)
        start_R = _universal(id_R, self.coefficients[0], self.num_experts)
        if self.config.k == 1:
            return start_R.unsqueeze(1)
        coprime = [s for s in range(1, self.num_experts + 1) if math.gcd(s, self.num_experts) == 1]
        strides = torch.tensor(coprime, device=id_R.device)
        stride_R = strides[_universal(id_R, self.coefficients[1], len(coprime))]
        step_K = torch.arange(self.config.k, device=id_R.device)
        return (start_R.unsqueeze(1) + stride_R.unsqueeze(1) * step_K) % self.num_experts


def _require_below(vocab_size: int, token_ids_R: Tensor) -> None:
    if token_ids_R.is_cuda or torch.compiler.is_compiling():
        # nothing waits for the device, which ends the program at its next step
        torch._assert_async(((token_ids_R >= 0) & (token_ids_R < vocab_size)).all(), "hash router: id beyond its table")
    elif len(token_ids_R) and not 0 <= int(token_ids_R.min()) <= int(token_ids_R.max()) < vocab_size:
        raise ShapeError(
            f"token_ids go from {int(token_ids_R.min())} to {int(token_ids_R.max())}; the hash router's table has "
            f"0 to {vocab_size - 1}: raise router.vocab_size, or set it to 0 for a function of any id"
        )


def _universal(id_R: Tensor, coefficients: Tensor, size: int) -> Tensor:
    """((a * id + b) mod p) mod size."""
    factor, summand = coefficients.unbind()
    return torch.addcmul(summand, id_R, factor).remainder_(PRIME).remainder_(size)


def emptiest_experts(counts: list[int], num_experts: int, k: int) -> Tensor:
    """The k experts of each id, which are the k with the least load when its turn comes.

    Shapes: returns (len(counts), k) int64, ids in the order of `counts`.
    Source: Roller et al. 2021, arXiv:2106.04426 (balanced hash), for any k.
    """
    heap = [(0, expert) for expert in range(num_experts)]
    rows = []
    for count in counts:
        emptiest = [heapq.heappop(heap) for _ in range(k)]
        rows.append([expert for _, expert in emptiest])
        for load, expert in emptiest:
            heapq.heappush(heap, (load + count, expert))
    return torch.tensor(rows, dtype=torch.int64).view(-1, k)
