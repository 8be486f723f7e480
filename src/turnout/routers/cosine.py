"""Cosine: experts are directions in a small space; a token takes the k nearest."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from turnout.contracts import Router, RouterConfig
from turnout.errors import ConfigError
from turnout.routers.pieces import LinearScore, check_choices, from_topk, select_topk
from turnout.tensors import RouterInput, RouterOutput

LOWEST_TEMPERATURE = 0.01
# below this length a vector is not scaled up: a zero token must not get a gradient without bound
LEAST_NORM = 1e-4


@RouterConfig.TABLE.register("cosine")
@dataclass(frozen=True, kw_only=True)
class Cosine(RouterConfig):
    """Top-k routing by the cosine of projected token and expert, over a learned temperature.

    The temperature is stored as log(1 / temperature), and never falls below 0.01. A call may ask for any number of
    choices; one choice renormalised has weight 1. The projection has a bias, as in Tutel's code.
    Source: Hwang et al. 2022 (Tutel), arXiv:2206.03382; tutel/gates/cosine_top.py of
        https://github.com/microsoft/tutel; the idea: Chi et al. 2022 (X-MoE), arXiv:2204.09179.
    """

    k: int = 2  # experts per token
    renormalize: bool = True  # the k weights of a token sum to 1; else they are those of the full softmax
    proj_dim: int = 256  # width of the space of directions
    temperature: float = 0.5  # what the cosines are divided by, at the start
    init_std: float = 0.01  # standard deviation of the initial weights; cosines do not depend on it

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"router.k={self.k} must be at least 1")
        if self.k == 1 and self.renormalize:
            raise ConfigError(
                "router.k=1 with renormalize=true gives every token weight 1 and the router no gradient; "
                "set renormalize=false"
            )
        if self.proj_dim < 2:
            raise ConfigError(f"router.proj_dim={self.proj_dim} must be at least 2: in one dimension no vector turns")
        if not (self.temperature >= LOWEST_TEMPERATURE and math.isfinite(self.temperature)):
            raise ConfigError(
                f"router.temperature={self.temperature} must be a number of at least {LOWEST_TEMPERATURE}"
            )
        if not self.init_std > 0:
            raise ConfigError(f"router.init_std={self.init_std} must be above 0: a zero vector has no direction")

    @property
    def choices(self) -> int:
        return self.k

    def build(self, dim: int, num_experts: int) -> Router:
        check_choices(self.k, num_experts)
        return CosineRouter(dim, num_experts, self)


class CosineRouter(Router):
    """The module of `Cosine`: owns the projection, the experts' directions and the temperature."""

    any_top_k: ClassVar[bool] = True

    def __init__(self, dim: int, num_experts: int, config: Cosine) -> None:
        super().__init__(dim, num_experts)
        self.config = config
        self.projection = LinearScore(dim, config.proj_dim, bias=True, init_std=config.init_std)
        self.directions = nn.Parameter(torch.empty(num_experts, config.proj_dim))
        self.log_scale = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The projection resets itself."""
        nn.init.normal_(self.directions, std=self.config.init_std)
        nn.init.constant_(self.log_scale, -math.log(self.config.temperature))

    def route(self, tokens: RouterInput) -> RouterOutput:
        logits_RE = self._logits(tokens.x_RD)
        expert_RK = select_topk(logits_RE, self.config.k if tokens.top_k is None else tokens.top_k)
        scores_RE = logits_RE.softmax(dim=1)
        if self.config.renormalize:
            weight_RK = logits_RE.gather(1, expert_RK).softmax(dim=1)
        else:
            weight_RK = scores_RE.gather(1, expert_RK)
        assignment = from_topk(expert_RK, weight_RK, tokens, num_experts=self.num_experts)
        return RouterOutput(assignment=assignment, logits_RE=logits_RE, scores_RE=scores_RE, token_R=tokens.token_R)

    def _logits(self, x_RD: Tensor) -> Tensor:
        tokens = F.normalize(self.projection(x_RD), dim=1, eps=LEAST_NORM)
        experts = F.normalize(self.directions.to(x_RD.dtype), dim=1, eps=LEAST_NORM)
        log_scale = self.log_scale.to(x_RD.dtype).clamp(max=-math.log(LOWEST_TEMPERATURE))
        return F.linear(tokens, experts) * log_scale.exp()
