"""Statistics say what happened to every assignment, and add up."""

import math
from dataclasses import fields, replace
from functools import reduce
from typing import Any

import pytest
import torch

from tests.contracts.cases import Case, draw, draw_case, error, own_selection, simple_case
from turnout import MoE, MoEStats
from turnout.dispatch import Dropless, FixedCapacity
from turnout.layers import stats as layer_stats
from turnout.layers.stats import collect_stats
from turnout.routers import Forced, GShardTop2, Quantile

COUNTS = ("assigned_E", "dropped_capacity_E", "dropped_policy_E", "num_routed", "num_padding")


def stats_of(case: Case) -> MoEStats:
    layer, inputs = draw(case)
    generator = torch.Generator().manual_seed(case.seed)
    return layer(inputs.x, mask=inputs.mask, token_ids=inputs.token_ids, generator=generator).stats


def test_a_call_computes_no_stats_until_they_are_asked_for_and_then_once(monkeypatch: pytest.MonkeyPatch) -> None:
    collected = []

    def counting(*parts: Any) -> MoEStats:
        collected.append(parts)
        return collect_stats(*parts)

    monkeypatch.setattr(layer_stats, "collect_stats", counting)
    layer, inputs = draw(simple_case())
    out = layer(inputs.x, mask=inputs.mask, token_ids=inputs.token_ids)
    assert not collected
    assert out.stats is out.stats
    assert len(collected) == 1


def test_stats_count_every_token_and_every_assignment_once() -> None:
    for seed in range(100):
        case = draw_case(seed)
        layer, inputs = draw(case)
        generator = torch.Generator().manual_seed(case.seed)
        stats = layer(inputs.x, mask=inputs.mask, token_ids=inputs.token_ids, generator=generator).stats
        generator = torch.Generator().manual_seed(case.seed)
        assignment = own_selection(layer, inputs, case.seed, generator)
        admission = case.capacity.admit(assignment, training=case.training, generator=generator)
        keep_N = torch.ones_like(assignment.token_N) if admission.keep_N is None else admission.keep_N.long()
        kept_E = torch.zeros(case.num_experts, dtype=torch.int64).index_add(0, assignment.expert_N, keep_N)
        assert torch.equal(kept_E + stats.dropped_capacity_E + stats.dropped_policy_E, stats.assigned_E), case
        assert torch.equal(stats.assigned_E, assignment.counts_E), case
        assert int(stats.num_routed + stats.num_padding) == case.num_tokens, case
        assert int(stats.num_padding) == (0 if inputs.mask is None else int((~inputs.mask).sum())), case


def test_stats_of_micro_batches_add_to_the_stats_of_the_batch() -> None:
    for seed in range(40):
        case = replace(draw_case(seed), shape=(37,), capacity=Dropless(), training=False)
        if not case.router.causal or isinstance(case.router, Forced):
            continue  # here a token's experts depend on the tokens of its batch
        layer, inputs = draw(case)
        mask = torch.ones(37, dtype=torch.bool) if inputs.mask is None else inputs.mask
        whole = layer(inputs.x, mask=mask, token_ids=inputs.token_ids).stats
        parts = [
            layer(inputs.x[part], mask=mask[part], token_ids=inputs.token_ids[part]).stats
            for part in (slice(0, 5), slice(5, 5), slice(5, 36), slice(36, 37))
        ]
        added = reduce(MoEStats.__add__, parts)
        for name in COUNTS:
            assert torch.equal(getattr(added, name), getattr(whole, name)), (name, case)
        assert error(added.entropy_sum, whole.entropy_sum) < 1e-12, case
        assert error(added.margin_sum, whole.margin_sum) < 1e-12, case


def test_adding_stats_adds_every_field() -> None:
    seen = set()
    for router in (GShardTop2(), Quantile()):
        stats = stats_of(simple_case(capacity=FixedCapacity(factor=0.5), padding=0.3, router=router))
        for field in fields(MoEStats):
            assert torch.equal(getattr(stats + stats, field.name), 2 * getattr(stats, field.name))
        seen |= {field.name for field in fields(MoEStats) if getattr(stats, field.name).any()}
    assert seen == {field.name for field in fields(MoEStats)}, "a field that is zero proves nothing"


def test_entropy_and_margin_are_those_of_the_scores() -> None:
    for seed in range(40):
        case = draw_case(seed)
        layer, inputs = draw(case)
        mask_T = None if inputs.mask is None else inputs.mask.reshape(-1)
        generator = torch.Generator().manual_seed(case.seed)
        x_TD = inputs.x.reshape(-1, case.dim)
        scores_RE = layer.router(x_TD, inputs.token_ids.reshape(-1), mask_T, generator).scores_RE
        entropy = sum(-p * math.log(p) for row in scores_RE.tolist() for p in row if p > 0)
        ranked = [[*sorted(row, reverse=True), 0.0] for row in scores_RE.tolist()]
        stats = stats_of(case)
        assert abs(float(stats.entropy_sum) - entropy) < 1e-9, case
        assert abs(float(stats.margin_sum) - sum(row[0] - row[1] for row in ranked)) < 1e-9, case


def test_stats_carry_no_gradient() -> None:
    stats = stats_of(simple_case())
    assert not any(getattr(stats, field.name).requires_grad for field in fields(MoEStats))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_stats_stand_on_the_device_of_the_layer() -> None:
    layer = MoE(8, 6, 4).cuda()
    stats = layer(torch.randn(5, 8, device="cuda")).stats
    assert {getattr(stats, field.name).device.type for field in fields(MoEStats)} == {"cuda"}


def test_entropy_and_margin_of_many_tokens_are_measured_on_some_from_every_place() -> None:
    layer = MoE(4, 4, 8)
    x_BSD = torch.zeros(64, 64, 4)
    x_BSD[:, 17] = 5.0 * torch.randn(4)
    x_BSD[:, 40] = 5.0 * torch.randn(4)
    stats, one = layer(x_BSD).stats, layer(x_BSD[:1]).stats
    for many, few in ((stats.entropy_sum, one.entropy_sum), (stats.margin_sum, one.margin_sum)):
        # 64 tokens that repeat 64 times, measured on 820 of 4,096
        assert float(many) / 4096 == pytest.approx(float(few) / 64, rel=0.03)
    assert float(one.margin_sum) > 0
    assert int(stats.num_routed) == 4096
