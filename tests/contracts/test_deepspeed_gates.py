"""Our routers and capacities against DeepSpeed's gates: the same experts, rows kept, weights and balance loss.

Needs deepspeed (`make peers`). What differs is said where it is tested: DeepSpeed's top-2 and top-k gates give a token
whose one choice was dropped to the others whole, where GShard's algorithm 1 and ours leave the weights as they were.
"""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from turnout.contracts import CapacityPolicy, RouterConfig
from turnout.dispatch import AffinityThreshold, Dropless, FixedCapacity
from turnout.losses import LoadBalance
from turnout.routers import GShardTop2, Switch, TopK
from turnout.routers.pieces import gumbel
from turnout.tensors import Admission, RouterOutput

NUM_EXPERTS, DIM = 8, 16
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def gates() -> ModuleType:
    return pytest.importorskip("deepspeed.moe.sharded_moe", reason="deepspeed is not installed: make peers")


class Ours:
    """One of our routers with one of our capacities, on drawn tokens."""

    def __init__(
        self, router: RouterConfig, capacity: CapacityPolicy, seed: int, *, num_tokens: int = 61, training: bool = True
    ) -> None:
        torch.manual_seed(seed)
        module = router.build(DIM, NUM_EXPERTS).train(training)
        x_TD = 20 * torch.randn(num_tokens, DIM)
        # what a call of ours draws, in order; the same draws are handed to theirs
        self.draws = torch.Generator().manual_seed(seed)
        self.routing: RouterOutput = module(x_TD, generator=torch.Generator().manual_seed(seed))
        self.admission: Admission = capacity.admit(
            self.routing.assignment, training=training, generator=torch.Generator().manual_seed(seed)
        )

    @property
    def logits(self) -> Tensor:
        return self.routing.logits_RE.detach().clone()

    def kept(self, *, renormalized: bool = False) -> Tensor:
        """Weights of what is kept, (T, E), 0 elsewhere."""
        assignment, keep_N = self.routing.assignment, self.admission.keep_N
        weight_N = assignment.weight_N.detach()
        weight_N = weight_N if keep_N is None else weight_N * keep_N
        weight_TE = torch.zeros(assignment.num_tokens, NUM_EXPERTS)
        weight_TE[assignment.token_N, assignment.expert_N] = weight_N
        return weight_TE / weight_TE.sum(dim=1, keepdim=True).clamp(min=1e-30) if renormalized else weight_TE

    def balance(self, loss: LoadBalance) -> Tensor:
        return loss.term(self.routing, self.admission, sequence_length=61).value.detach()

    @property
    def num_dropped(self) -> int:
        return int(self.admission.dropped_E["capacity"].sum())


def assert_same_weights(ours_TE: Tensor, combine_TEC: Tensor, dispatch_TEC: Tensor) -> None:
    assert torch.equal(dispatch_TEC.any(dim=2), ours_TE > 0)
    # no two rows in one place of an expert
    assert int(dispatch_TEC.sum(dim=0).max()) <= 1
    torch.testing.assert_close(ours_TE, combine_TEC.sum(dim=2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.3])
@pytest.mark.parametrize("seed", range(5))
def test_top_1_with_random_token_selection(gates: ModuleType, seed: int, factor: float) -> None:
    """The same draws choose the same rows; the loss is ours for k = 1."""
    ours = Ours(Switch(), FixedCapacity(factor=factor, priority="random"), seed)
    draw_T1 = torch.rand(len(ours.logits), 1, generator=ours.draws)
    gates.exp_selection_uniform_map[CPU] = draw_T1.expand
    loss, combine, dispatch, counts = gates.top1gating(ours.logits, factor, 1, use_rts=True)
    assert_same_weights(ours.kept(), combine, dispatch)
    assert torch.equal(counts, ours.routing.assignment.counts_E)
    assert float(loss) == pytest.approx(float(ours.balance(LoadBalance())), rel=1e-6)
    assert ours.num_dropped > 0 or factor > 1


@pytest.mark.parametrize("seed", range(5))
def test_top_1_without_drops(gates: ModuleType, seed: int) -> None:
    ours = Ours(Switch(), Dropless(), seed)
    _, combine, dispatch, _ = gates.top1gating(ours.logits, 1.0, 1, drop_tokens=False, use_rts=False)
    assert_same_weights(ours.kept(), combine, dispatch)


@pytest.mark.parametrize("factor", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("seed", range(5))
def test_top_2(gates: ModuleType, seed: int, factor: float) -> None:
    """First choices are queued before second ones, in both; the loss counts first choices."""
    ours = Ours(GShardTop2(second_expert="all"), FixedCapacity(factor=factor), seed)
    loss, combine, dispatch, counts = gates.top2gating(ours.logits, factor, 1, top2_2nd_expert_sampling=False)
    assert_same_weights(ours.kept(renormalized=True), combine, dispatch)
    assert torch.equal(counts, ours.routing.assignment.counts_E)
    assert float(loss) == pytest.approx(float(ours.balance(LoadBalance(count="first"))), rel=1e-6)
    assert (ours.num_dropped > 0) == (factor < 4)
    if factor == 4:
        assert_same_weights(ours.kept(), combine, dispatch)


@pytest.mark.parametrize("seed", range(5))
def test_top_2_with_a_sampled_second_expert(gates: ModuleType, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Ours(GShardTop2(second_expert="sampled"), FixedCapacity(factor=1.0), seed)
    noise_TE = gumbel(torch.rand(ours.logits.shape, generator=ours.draws))
    monkeypatch.setattr(gates, "gumbel_rsample", lambda _, device: noise_TE.to(device))
    _, combine, dispatch, _ = gates.top2gating(ours.logits, 1.0, 1, top2_2nd_expert_sampling=True)
    assert_same_weights(ours.kept(renormalized=True), combine, dispatch)
    best_two = ours.logits.topk(2, dim=1).indices
    assert not torch.equal(ours.routing.assignment.as_topk()[0], best_two)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("factor", [0.5, 1.0, 8.0])
@pytest.mark.parametrize("seed", range(3))
def test_top_k_that_drops_the_lowest_scores(gates: ModuleType, seed: int, factor: float, k: int) -> None:
    router = TopK(k=k, renormalize=False)
    ours = Ours(router, AffinityThreshold(threshold=1.0, factor=factor), seed)
    loss, combine, dispatch, counts = gates.topkgating(ours.logits, k, factor, 1)
    assert_same_weights(ours.kept(renormalized=True), combine, dispatch)
    assert torch.equal(counts, ours.routing.assignment.counts_E)
    assert float(loss) == pytest.approx(float(ours.balance(LoadBalance())), rel=1e-6)
    assert (ours.num_dropped > 0) == (factor < 8)


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_top_k_without_drops(gates: ModuleType, seed: int, k: int) -> None:
    ours = Ours(TopK(k=k), Dropless(), seed)
    _, combine, dispatch, _ = gates.topkgating(ours.logits, k, 1.0, 1, drop_tokens=False)
    assert_same_weights(ours.kept(), combine, dispatch)
