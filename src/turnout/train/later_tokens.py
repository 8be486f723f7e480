"""Whether what becomes of a token depends on tokens after it: found by trying, whatever a router says of itself."""

from typing import Literal

import torch
from torch import Tensor, nn

from turnout.contracts import RouterConfig
from turnout.layers.moe import MoEConfig
from turnout.tensors import RouterOutput

SeesLater = Literal["", "training", "evaluation", "training and evaluation"]
TRIALS = 16
TOKENS_PER_EXPERT, MOST_TOKENS = 8, 1024  # of a trial
HALF = 2
IDS = 16  # few, so that a table of token ids has them


@torch.no_grad()
def sees_later_tokens(dim: int, moe: MoEConfig) -> SeesLater:
    """When a change of later tokens changes experts, weights or drops of earlier ones: "" if never.

    A router with random weights and the capacity policy see pairs of calls whose first halves are equal; a token's
    noise is the same in both. All tokens of a call stand in one row, as one sequence would. A dependence so rare that
    no trial shows it is not found.
    """
    with torch.random.fork_rng(devices=()):
        found = [phase for phase in ("training", "evaluation") if _depends(dim, moe, training=phase == "training")]
    return " and ".join(found)  # pyright: ignore[reportReturnType]


def _depends(dim: int, moe: MoEConfig, *, training: bool) -> bool:
    torch.manual_seed(0)
    router = _with_weights(moe.router, dim, moe.num_experts).train(training)
    return any(_one_depends(router, dim, moe, seed) for seed in range(TRIALS))


def _with_weights(config: RouterConfig, dim: int, num_experts: int) -> nn.Module:
    """As if it had learned something: weights that start at zero would hide what x does."""
    router = config.build(dim, num_experts)
    for parameter in router.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=dim**-0.5)
    return router


def _one_depends(router: nn.Module, dim: int, moe: MoEConfig, seed: int) -> bool:
    g = torch.Generator().manual_seed(seed)
    num_tokens = min(TOKENS_PER_EXPERT * moe.num_experts, MOST_TOKENS) // HALF * HALF
    # halves that crowd at some experts, in every other trial: so that a roomy capacity drops, too
    crowd = 2.0 * (seed % 2)
    earlier, one, other = (_tokens(num_tokens // HALF, dim, crowd, g) for _ in range(3))
    ids = torch.randint(IDS, (3, num_tokens // HALF), generator=g)
    fates = [
        _fate(router, moe, torch.cat([earlier, later]), torch.cat([ids[0], ids_later]), seed)
        for later, ids_later in ((one, ids[1]), (other, ids[2]))
    ]
    first, second = (fate[: num_tokens // HALF] for fate in fates)
    return not torch.allclose(first, second, rtol=1e-5, atol=1e-7)


def _tokens(num_tokens: int, dim: int, crowd: float, g: torch.Generator) -> Tensor:
    return torch.randn(num_tokens, dim, generator=g) + crowd * torch.randn(dim, generator=g)


def _fate(router: nn.Module, moe: MoEConfig, x_TD: Tensor, token_ids_T: Tensor, seed: int) -> Tensor:
    """Weight of each expert that a token is sent to, and whether it is: (T, 2E)."""
    g = torch.Generator().manual_seed(seed)
    routing: RouterOutput = router(x_TD, token_ids_T, None, g)
    given = routing.assignment
    admission = moe.capacity.admit(given, training=router.training, generator=g)
    sent_N = torch.ones_like(given.weight_N) if admission.keep_N is None else admission.keep_N.to(given.weight_N.dtype)
    fate = x_TD.new_zeros(2, given.num_tokens, given.num_experts)
    place = (given.token_N, given.expert_N)
    fate[0].index_put_(place, sent_N * given.weight_N, accumulate=True)
    fate[1].index_put_(place, sent_N, accumulate=True)
    return torch.cat([fate[0], fate[1]], dim=1)
