"""Explain: the published table of the claim comes out row by row, and the closed form is exact."""

import subprocess
import sys
from dataclasses import replace

import pytest

from turnout.clusters import CLUSTERS
from turnout.errors import ConfigError
from turnout.plan.explain import SCENARIOS, ExplainRow, alltoall_over_tensor, base_step, explain
from turnout.plan.shapes import SHAPES
from turnout.plan.volume import volume

ROWS = {row.scenario: row for row in explain("gpt4-moe")}


@pytest.mark.parametrize(
    ("scenario", "intra_gb", "inter_gb", "ratio"),
    [
        ("no experts", 347.4, 17.9, 0.052),
        ("no experts, scatter-gather", 347.4, 7.1, 0.020),
        ("no experts, fp32 gradients", 347.4, 23.5, 0.068),
        ("no experts, batch of 4M tokens", 23.2, 6.3, 0.274),
        ("16 experts, top-2", 347.4, 389.8, 1.12),
        ("16 experts, scatter-gather", 347.4, 379.0, 1.09),
        ("16 experts, full recompute", 521.1, 389.8, 0.748),
        ("16 experts, capacity factor 1.25", 347.4, 482.9, 1.39),
        ("16 experts, fp32 gradients", 347.4, 395.1, 1.137),
        ("16 experts, batch of 4M tokens", 23.2, 30.9, 1.334),
        ("16 experts, top-1", 347.4, 203.8, 0.587),
        ("16 experts, every other layer", 347.4, 203.8, 0.587),
        ("tokens shared over tp", 347.4, 64.2, 0.185),
        ("tokens shared over tp, scatter-gather", 347.4, 53.3, 0.154),
    ],
)
def test_the_table_of_the_claim_comes_out(scenario: str, intra_gb: float, inter_gb: float, ratio: float) -> None:
    row = ROWS[scenario]
    assert row.intra_bytes / 1e9 == pytest.approx(intra_gb, abs=0.06)
    # the table leaves token embeddings out of data parallelism: 0.04 to 0.08 GB
    assert row.inter_bytes / 1e9 == pytest.approx(inter_gb, abs=0.15)
    assert row.inter_over_intra == pytest.approx(ratio, abs=0.006)


def test_the_claim_holds_for_replicated_tokens_and_fails_for_shared_ones() -> None:
    dense = [row.inter_over_intra for row in ROWS.values() if row.scenario.startswith("no experts")]
    assert [ratio for ratio in dense if not 0.02 <= ratio <= 0.10] == [pytest.approx(0.276, abs=0.01)]  # 4M tokens
    assert 1.0 <= ROWS["16 experts, top-2"].inter_over_intra <= 1.2
    assert ROWS["16 experts, all-to-all alone"].inter_over_intra == pytest.approx(15 / 14, rel=1e-9)
    assert ROWS["tokens shared over tp, all-to-all alone"].inter_over_intra == pytest.approx(15 / 112, rel=1e-9)
    assert all(row.inter_over_intra < 0.25 for row in ROWS.values() if row.scenario.startswith("sequence parallel"))


@pytest.mark.parametrize(
    ("experts", "shared", "ratio"), [(8, False, 1.00), (16, False, 1.07), (256, False, 1.14), (16, True, 0.134)]
)
def test_the_closed_form_has_the_published_values(experts: int, shared: bool, ratio: float) -> None:
    got = alltoall_over_tensor(top_k=2, num_experts=experts, tp=8, shared=shared)
    assert got == pytest.approx(ratio, abs=0.005)


def test_the_closed_form_is_that_of_the_rows() -> None:
    for title, shared in (("16 experts, all-to-all alone", False), ("tokens shared over tp, all-to-all alone", True)):
        want = alltoall_over_tensor(top_k=2, num_experts=16, tp=8, shared=shared)
        assert ROWS[title].inter_over_intra == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("merged", [False, True])
def test_the_closed_form_covers_several_experts_a_node_and_merged_copies(merged: bool) -> None:
    shape = replace(SHAPES["gpt4-moe"], top_k=4)
    base = replace(base_step(shape, CLUSTERS["dgx-a100"]), devices_per_node=32)
    strategy = replace(base.strategy, alltoall="node_dedup" if merged else "hierarchical")
    parts = {part.name: part for part in volume(replace(base, strategy=strategy))}
    labels = 2 * 4 * (12 / 16) * 8 / (4 * 10_752 * 2) if merged else 0.0
    want = alltoall_over_tensor(top_k=4, num_experts=16, tp=8, shared=False, experts_per_node=4, merged=merged)
    got = parts["ep all-to-all"].inter_bytes / parts["tp all-reduce"].intra_bytes
    assert got == pytest.approx(want, rel=1e-9 if not merged else labels)
    assert got >= want * (1 - 1e-9)


@pytest.mark.parametrize("model", [name for name, shape in SHAPES.items() if shape.num_experts])
def test_every_model_with_experts_is_explained(model: str) -> None:
    explained = explain(model)
    assert len(explained) == len(SCENARIOS)
    rows = {row.scenario: row for row in explained}
    shape = SHAPES[model]
    if shape.moe_every == 1 and not shape.dense_first and not shape.latent_dim:
        alone = rows[f"{shape.num_experts} experts, all-to-all alone"].inter_over_intra
        want = alltoall_over_tensor(top_k=shape.top_k, num_experts=shape.num_experts, tp=8, shared=False)
        assert alone == pytest.approx(want, rel=1e-9)


def test_seconds_decide_where_bytes_do_not() -> None:
    """46 GB at 23.5 GB/s take longer than 347 GB at 240 GB/s."""
    row = ROWS["tokens shared over tp, all-to-all alone"]
    assert row.inter_bytes < 0.14 * row.intra_bytes
    assert row.inter_bandwidth_s == pytest.approx(46.5 / 23.5, rel=1e-2)
    assert row.intra_bandwidth_s == pytest.approx(347.4 / 240, rel=1e-2)
    assert row.inter_s > row.intra_s
    faster = {each.scenario: each for each in explain("gpt4-moe", CLUSTERS["dgx-h100"])}[row.scenario]
    assert (faster.intra_bytes, faster.inter_bytes) == (row.intra_bytes, row.inter_bytes)
    assert faster.inter_s < row.inter_s


def test_the_parts_of_a_row_sum_to_it() -> None:
    for row in ROWS.values():
        assert sum(row.to_json()["parts"].values()) == pytest.approx(row.intra_bytes + row.inter_bytes, rel=1e-9)
        assert {"scenario", "intra_bytes", "inter_bytes", "inter_over_intra", "intra_s", "inter_s"} <= set(
            row.to_json()
        )


def test_a_model_without_experts_or_an_unknown_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="'llama2-7b' has no experts to explain; try 'gpt4-moe'"):
        explain("llama2-7b")
    with pytest.raises(ConfigError, match=r"'gpt5'"):
        explain("gpt5")


def test_a_row_without_traffic_inside_nodes_has_no_finite_ratio() -> None:
    row = ExplainRow(
        scenario="", intra_bytes=0.0, inter_bytes=1.0, intra_s=0.0, inter_s=0.0, intra_bandwidth_s=0.0,
        inter_bandwidth_s=0.0, parts=(),
    )  # fmt: skip
    assert row.inter_over_intra == float("inf")


def test_the_planner_never_reaches_torch() -> None:
    code = "import sys, turnout.plan.explain as e; e.explain(); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
