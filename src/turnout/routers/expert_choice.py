"""Expert choice: every expert takes its best tokens, so that all take equally many."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from turnout.contracts import Router, RouterConfig
from turnout.errors import ConfigError
from turnout.routers.pieces import LinearScore, check_choices, from_chosen, marked_topk
from turnout.tensors import RouterInput, RouterOutput


@RouterConfig.TABLE.register("expert_choice")
@dataclass(frozen=True, kw_only=True)
class ExpertChoice(RouterConfig):
    """Each expert takes its ceil(k T / E) best tokens; a token may have any number of experts, none among them.

    The weights are those of the full softmax. Who else is in the call decides who is taken, in evaluation too.
    Source: Zhou et al. 2022, arXiv:2202.09368; without their cap on the experts of a token.
    """

    k: int = 2  # experts per token on average (the paper's capacity factor c)
    in_decoder: Literal["refuse", "allow"] = "refuse"  # inside a decoder, where it lets a token see later ones
    init_std: float = 0.02  # standard deviation of the score's initial weights

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"router.k={self.k} must be at least 1")

    @property
    def choices(self) -> int:
        return self.k

    @property
    def exact_choices(self) -> bool:
        return False

    @property
    def causal(self) -> bool:
        return False

    @property
    def own_balance(self) -> str:
        return "experts choose equally many tokens"

    def check_decoder(self) -> None:
        """Raises: ConfigError unless `in_decoder` allows it.

        Source of the bound: Wang et al. 2024, arXiv:2408.15664.
        """
        if self.in_decoder == "refuse":
            raise ConfigError(
                "expert choice lets a token's experts depend on later tokens: in training up to k * log2(E / k - 1) "
                "bits a token and layer leak from the future, and a token that is decoded alone goes to every expert; "
                "use a router by token choice, or set router.in_decoder='allow' if you want that"
            )

    def build(self, dim: int, num_experts: int) -> Router:
        check_choices(self.k, num_experts)
        return ExpertChoiceRouter(dim, num_experts, self)


class ExpertChoiceRouter(Router):
    """The module of `ExpertChoice`."""

    def __init__(self, dim: int, num_experts: int, config: ExpertChoice) -> None:
        super().__init__(dim, num_experts)
        self.config = config
        self.score = LinearScore(dim, num_experts, bias=False, init_std=config.init_std)

    def route(self, tokens: RouterInput) -> RouterOutput:
        logits_RE = self.score(tokens.x_RD)
        scores_RE = logits_RE.softmax(dim=1)
        # in the logarithm no score underflows into a tie
        chosen_RE = chosen_by_experts(logits_RE.detach().log_softmax(dim=1), self.config.k)
        return RouterOutput(
            assignment=from_chosen(chosen_RE, scores_RE, tokens),
            logits_RE=logits_RE,
            scores_RE=scores_RE,
            token_R=tokens.token_R,
        )


def chosen_by_experts(scores_RE: Tensor, k: int) -> Tensor:
    """Marks for each expert its ceil(k R / E) highest scores, ties broken by the earlier token.

    Shapes: scores_RE (R, E); returns (R, E) bool.
    """
    num_tokens, num_experts = scores_RE.shape
    per_expert = -(-k * num_tokens // num_experts)
    if not per_expert:
        return torch.zeros_like(scores_RE, dtype=torch.bool)
    return marked_topk(scores_RE.t().contiguous(), per_expert).t()
