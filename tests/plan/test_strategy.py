"""Strategy: dp is derived, illegal layouts name the field and the nearest legal value."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnout.config import from_dict, to_dict
from turnout.errors import ConfigError
from turnout.strategy import Strategy, nearest_divisor


def test_the_documented_strategy_is_legal() -> None:
    strategy = Strategy(ep=4, alltoall="hierarchical", overlap=2).check(8, num_experts=16, num_layers=4)
    assert (strategy.dp, strategy.edp(), strategy.world()) == (8, 2, 8)


def test_experts_fold_over_the_ranks_of_attention() -> None:
    strategy = Strategy(tp=2, cp=2, sequence_parallel=True, ep=8, folded=True).check(16, num_experts=8)
    assert (strategy.dp, strategy.edp()) == (4, 2)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"schedule": "1f1"}, r"strategy.schedule='1f1' must be one of: 1f1b, .*did you mean '1f1b'"),
        ({"zero": 4}, "strategy.zero=4 must be one of: 0, 1, 2, 3"),
        ({"dispatch_precision": "int8"}, r"strategy.dispatch_precision='int8' must be one of: \"\", fp32"),
        ({"tp": 0}, "strategy.tp=0 must be at least 1; nearest legal: 1"),
        ({"dp": -1}, "strategy.dp=-1 must be at least 0; nearest legal: 0"),
        ({"schedule": "interleaved"}, "virtual_stages=1 is not interleaved; nearest legal: 2"),
        ({"virtual_stages": 2}, r"virtual_stages=2 needs schedule='interleaved'; nearest legal with '1f1b': 1"),
        ({"virtual_stages": 2, "schedule": "interleaved"}, "pp=1 has none; nearest legal: virtual_stages=1"),
        ({"schedule": "zero_bubble"}, "schedule='zero_bubble' is of a pipeline, and pp=1 has none; nearest"),
        ({"schedule": "gpipe"}, "schedule='gpipe' is of a pipeline, and pp=1 has none; nearest legal: '1f1b', or pp=2"),
        ({"schedule": "dualpipe", "pp": 1}, "strategy.pp=1 must be even under dualpipe; nearest legal: 2"),
        ({"schedule": "dualpipe", "pp": 3}, "strategy.pp=3 must be even under dualpipe; nearest legal: 4"),
        ({"sequence_parallel": True}, "sequence_parallel=True needs tp of at least 2; nearest legal: False"),
    ],
)
def test_fields_out_of_range_are_refused(fields: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Strategy(**fields)


@pytest.mark.parametrize(
    ("fields", "job", "text"),
    [
        ({"tp": 3}, {}, r"tp=3 .* must divide world=16; nearest legal: tp=2, or world=15"),
        ({"tp": 3, "pp": 2}, {"num_heads": 36}, r"tp=3 .* must divide world=16; nearest legal: tp=2, or world=18"),
        ({"tp": 3, "pp": 5}, {}, r"= 15 must divide world=16; nearest legal: world=15"),
        ({"dp": 4, "tp": 2}, {}, "strategy.dp=4 times tp .* must be world=16; nearest legal: 8"),
        ({"ep": 3}, {"num_experts": 8}, "strategy.ep=3 must divide num_experts=8; nearest legal: 2"),
        ({"ep": 2}, {}, "strategy.ep=2 needs experts; nearest legal: 1"),
        ({"ep": 32}, {"num_experts": 64}, r"strategy.ep=32 must divide dp \* cp=16; nearest legal: 16"),
        ({"etp": 3, "tp": 4}, {"num_experts": 8}, "strategy.etp=3 must be 1 or tp=4 unless folded; nearest legal: 4"),
        (
            {"ep": 8, "etp": 4, "folded": True},
            {"num_experts": 8},
            r"strategy.ep \* etp=32 must divide world / pp=16; nearest legal: 16",
        ),
        (
            {"ep": 24, "folded": True},
            {"num_experts": 24},
            r"strategy.ep \* etp=24 must divide world / pp=16; nearest legal: 8",
        ),
        (
            {"tp": 4, "etp": 2, "folded": True},
            {"num_experts": 8},
            "strategy.etp=2 needs tokens sharded over tp=4; nearest legal: 1",
        ),
        ({"pp": 8}, {"num_layers": 4}, r"strategy.pp=8 .* must not exceed num_layers=4; nearest legal: pp=4"),
        ({"tp": 8}, {"num_heads": 12}, "strategy.tp=8 must divide num_heads=12; nearest legal: 6"),
        ({"cp": 8, "cp_kind": "alltoall"}, {"num_heads": 12}, "strategy.cp=8 must divide num_heads / tp=12"),
        ({"cp": 16}, {"seq_len": 1000}, "strategy.cp=16 must divide seq_len=1000; nearest legal: 20"),
        (
            {},
            {"global_batch": 25},
            r"global_batch=25 must be a multiple of strategy.dp \* micro_batch=16; nearest legal: 32",
        ),
        ({"ep": 12, "cp": 2}, {"num_experts": 12}, r"strategy.ep=12 must divide dp \* cp=16; nearest legal: 4"),
        ({"zero_size": 3}, {}, r"strategy.zero_size=3 must divide dp \* cp=16; nearest legal: 2"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(fields: dict[str, object], job: dict[str, int], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Strategy(**fields).check(16, **job)


def test_a_strategy_is_a_table_of_a_recipe() -> None:
    strategy = Strategy(ep=4, dispatch_precision="fp8", zero=3)
    assert from_dict(Strategy, to_dict(strategy)) == strategy
    with pytest.raises(ConfigError, match=r"unknown field 'epp'; .*did you mean"):
        from_dict(Strategy, {"epp": 4})


def test_an_unresolved_strategy_says_so() -> None:
    with pytest.raises(ConfigError, match=r"strategy\.dp=0 is not resolved yet"):
        Strategy().world()


@given(value=st.integers(1, 500), total=st.integers(1, 500))
def test_the_nearest_divisor_is_the_nearest(value: int, total: int) -> None:
    divisors = [d for d in range(1, total + 1) if total % d == 0]
    assert nearest_divisor(value, total) == min(divisors, key=lambda d: (abs(d - value), d))


def test_a_precision_of_what_is_kept_needs_light_recomputation() -> None:
    assert Strategy(recompute="light", kept_precision="fp8").kept_precision == "fp8"
    with pytest.raises(ConfigError, match=r"strategy\.kept_precision='fp8' needs recompute='light' \(it is 'full'\)"):
        Strategy(recompute="full", kept_precision="fp8")


def test_slices_of_experts_without_tensor_parallelism_are_neighbours_with_tokens_of_their_own() -> None:
    sliced = Strategy(ep=2, etp=2).check(8, num_experts=4)
    assert sliced == Strategy(ep=2, etp=2, dp=8, folded=True)
    assert sliced.tokens_sharded
    assert not Strategy(ep=2).tokens_sharded
    assert sliced.edp() == 2
