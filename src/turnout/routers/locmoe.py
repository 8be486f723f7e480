"""LocMoE: top-1 routing by a gate without parameters, whose rows are fixed and orthogonal."""

from dataclasses import dataclass

from torch.nn import functional as F

from turnout.contracts import Router, RouterConfig
from turnout.routers.grap import block_means, check_blocks
from turnout.routers.pieces import from_topk, select_topk
from turnout.tensors import RouterInput, RouterOutput


@RouterConfig.TABLE.register("locmoe")
@dataclass(frozen=True, kw_only=True)
class LocMoE(RouterConfig):
    """Each token goes to the expert whose block of features has the highest mean; its weight is the softmax of those.

    The gate learns nothing: the layers below it learn to write an expert's block, through the weight and the losses,
    which in the paper are `load_balance` and `locality`, both of coefficient 0.01. The paper's logits are
    ReLU(w x + eps) with an eps it does not define: it is left out, and the ReLU is a setting, because behind it a token
    whose means are all negative ties and goes to expert 0. The paper's lower bound of an expert's capacity is
    `affinity_theory.min_capacity`; measured on the first batch it is the `minimum` of a fixed capacity.
    Source: Li et al. 2024, arXiv:2401.13920.
    """

    relu: bool = False  # logits are ReLU(mean), as printed; false: the mean

    @property
    def choices(self) -> int:
        return 1

    def build(self, dim: int, num_experts: int) -> Router:
        check_blocks(dim, num_experts)
        return LocMoERouter(dim, num_experts, self)


class LocMoERouter(Router):
    """The module of `LocMoE`: owns nothing."""

    def __init__(self, dim: int, num_experts: int, config: LocMoE) -> None:
        super().__init__(dim, num_experts)
        self.config = config

    def route(self, tokens: RouterInput) -> RouterOutput:
        logits_RE = block_means(tokens.x_RD, self.num_experts)
        if self.config.relu:
            logits_RE = F.relu(logits_RE)
        scores_RE = logits_RE.softmax(dim=1)
        expert_R1 = select_topk(logits_RE, 1)
        assignment = from_topk(expert_R1, scores_RE.gather(1, expert_R1), tokens, num_experts=self.num_experts)
        return RouterOutput(assignment=assignment, logits_RE=logits_RE, scores_RE=scores_RE, token_R=tokens.token_R)
