"""Bills, twins, what-ifs and remedies: their arithmetic, and what must hold of any of them."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest

from turnout.clusters import CLUSTERS
from turnout.errors import ConfigError
from turnout.plan import Query
from turnout.plan.bill import bill, priced
from turnout.plan.layout import layout_of, layout_text
from turnout.plan.memory import memory
from turnout.plan.remedies import over_bytes, remedies
from turnout.plan.shapes import SHAPES
from turnout.plan.time import step_time
from turnout.plan.twin import active_hidden, all_hidden, dense_twin, tokens_to_save, twins
from turnout.plan.whatif import what_ifs
from turnout.strategy import Strategy

V3 = Query(
    model="deepseek-v3", cluster="h800", nodes=256, global_batch=15_360,
    strategy=layout_of("pp=16,ep=64,folded=true,alltoall=node_dedup,zero=1"),
)  # fmt: skip
MIXTRAL = Query(model="mixtral-8x7b", nodes=4, global_batch=256, strategy=layout_of("tp=2,pp=4,ep=4"))


# --- the bill ---


def test_the_bill_of_deepseek_v3_is_its_own_arithmetic() -> None:
    """2.664 M device-hours of pre-training at $2: arXiv:2412.19437, table 1."""
    hours, tokens = 2.664e6, 14.8e12
    step_tokens = 15_360 * 4096
    step_s = hours * 3600 / 2048 / (tokens / step_tokens)
    cost = bill(CLUSTERS["h800"], devices=2048, step_s=step_s, step_tokens=step_tokens, run_tokens=tokens)
    assert cost.run_usd == pytest.approx(5.328e6)
    assert cost.run_s == pytest.approx(hours * 3600 / 2048)
    assert cost.usd_per_million_tokens == pytest.approx(5.328e6 / 14.8e6)


def test_energy_and_network_follow_from_the_description() -> None:
    machine = priced(CLUSTERS["dgx-h100"], 3.0)
    cost = bill(machine, devices=16, step_s=2.0, step_tokens=1000, run_tokens=1e6)
    assert cost.kilowatt == pytest.approx(16 * 1.275)
    assert cost.joules_per_token == pytest.approx(16 * 1275 * 2 / 1000)
    assert cost.run_mwh == pytest.approx(16 * 1275 * 2000 / 3.6e9)
    assert cost.usd_per_step == pytest.approx(16 * 3 * 2 / 3600)
    assert cost.network_usd == pytest.approx(16 * 4390)


def test_what_a_description_does_not_say_is_not_on_the_bill() -> None:
    machine = replace(CLUSTERS["dgx-h100"], device_watt=0.0, network_usd_per_device=0.0)
    cost = bill(machine, devices=16, step_s=2.0, step_tokens=1000)
    assert set(cost.to_json().values()) == {None}
    with pytest.raises(ConfigError, match=r"bill\.run_tokens=-1 must be at least 0"):
        bill(machine, devices=16, step_s=2.0, step_tokens=1000, run_tokens=-1)


# --- experts or not ---


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if shape.num_experts])
def test_dense_twins_have_the_parameters_they_are_named_for(name: str) -> None:
    shape = SHAPES[name]
    routers = sum(map(shape.router_params, range(shape.all_layers)))
    dense = dense_twin(shape, active_hidden(shape))
    assert dense.total_params == pytest.approx(shape.active_params - routers, rel=0.02)
    assert dense_twin(shape, all_hidden(shape)).total_params == pytest.approx(shape.total_params - routers, rel=0.02)


def test_experts_cost_time_and_memory_beside_their_dense_twin() -> None:
    mixed, active, total = twins(MIXTRAL)
    assert mixed.total_params > 3 * active.total_params
    assert mixed.step_s > active.step_s
    assert mixed.peak_bytes > active.peak_bytes
    assert total.step_s > mixed.step_s
    assert tokens_to_save((mixed, active, total)) == pytest.approx(1 - active.step_s / mixed.step_s)
    assert twins(replace(MIXTRAL, model="llama3-8b", strategy=Strategy(tp=2))) == ()


# --- what if ---


def test_what_ifs_are_steps_of_the_changed_job() -> None:
    rows = {row.change: row for row in what_ifs(MIXTRAL)}
    fp8 = step_time(MIXTRAL.with_strategy(replace(MIXTRAL.strategy, dispatch_precision="fp8")).job(), MIXTRAL.machine)
    assert rows["fp8 dispatch"].step_s == pytest.approx(fp8.step_s)
    base_s = step_time(MIXTRAL.job(), MIXTRAL.machine).step_s
    assert all(row.saved == pytest.approx(1 - row.step_s / base_s) for row in rows.values() if row.step_s is not None)
    for name in ("network cards twice as fast", "NVL72: a scale-up domain of 72", "fp8 dispatch"):
        saved = rows[name].saved
        assert saved is not None
        assert saved >= 0


@pytest.mark.parametrize("query", [MIXTRAL, V3], ids=["mixtral", "deepseek-v3"])
def test_a_faster_network_is_asked_about_on_the_machine_it_names(query: Query) -> None:
    rows = {row.change: row.step_s for row in what_ifs(query)}
    machine = query.machine
    card = replace(machine.inter, bytes_per_s=2 * machine.inter.bytes_per_s)
    for change, other in (
        ("network cards twice as fast", replace(machine, inter=card)),
        ("NVL72: a scale-up domain of 72", replace(machine, devices_per_node=72)),
    ):
        assert rows[change] == pytest.approx(step_time(query.job(), other).step_s, rel=1e-12)
        assert rows[change] < step_time(query.job(), machine).step_s


def test_what_ifs_that_do_not_apply_say_why_and_those_in_force_are_undone() -> None:
    rows = {row.change: row for row in what_ifs(V3)}
    for undone in ("each copy sent by itself (flat)", "routing not limited to 4 of 8 nodes"):
        saved = rows[undone].saved
        assert saved is not None
        assert saved < 0
    few = {row.change: row for row in what_ifs(MIXTRAL)}["routing limited to 4 nodes, their copies merged"]
    assert few.why_not == "the experts are on 1 node"
    dense = what_ifs(Query(model="llama3-8b", nodes=1, global_batch=64))
    assert {row.why_not for row in dense if row.step_s is None} == {"the model has no experts"}


def test_limiting_nodes_saves_time_where_many_experts_are_far() -> None:
    free = replace(V3, model=replace(SHAPES["deepseek-v3"], expert_groups=0, top_groups=0))
    rows = {row.change: row for row in what_ifs(free)}
    limited = rows["routing limited to 4 nodes, their copies merged"]
    assert limited.saved is not None
    assert limited.saved > 0
    assert limited.step_s == pytest.approx(step_time(V3.job(), V3.machine).step_s)


# --- remedies ---


def test_remedies_fit_and_come_cheapest_first() -> None:
    tight = replace(MIXTRAL, strategy=layout_of("tp=2,ep=4"))
    assert over_bytes(tight.job(), tight.machine.device.memory_bytes) > 0
    ways = remedies(tight)
    assert ways
    for way in ways:
        job = tight.with_strategy(way.strategy).job()
        assert memory(job).fits(tight.machine.device.memory_bytes)
        assert way.peak_bytes == pytest.approx(memory(job).allocated_bytes)
    assert [way.step_s for way in ways] == sorted(way.step_s for way in ways)


def test_where_nothing_fits_the_closest_is_named() -> None:
    hopeless = Query(model="llama3.1-405b", nodes=1, global_batch=8, strategy=layout_of("tp=8"))
    (way,) = remedies(hopeless)
    assert way.over_bytes > 0
    assert way.over_bytes < over_bytes(hopeless.job(), hopeless.machine.device.memory_bytes)


# --- layouts as text ---


@pytest.mark.parametrize(
    "text", ["tp=8,pp=16,ep=64", "tp=2,cp=2,pp=4,ep=1,sp=true,zero=1", "tp=1,pp=4,ep=8,vp=2,mbs=2,alltoall=node_dedup"]
)
def test_a_layout_is_read_as_it_is_written(text: str) -> None:
    strategy = layout_of(text)
    assert layout_of(layout_text(strategy)) == strategy


def test_several_virtual_stages_are_interleaved() -> None:
    assert layout_of("pp=4,vp=2").schedule == "interleaved"
    assert layout_of("pp=4,vp=2,schedule=zero_bubble").schedule == "zero_bubble"
    assert layout_of("") == Strategy()


@pytest.mark.parametrize("before", ["", "import turnout.plan.search; ", "from turnout.plan.search import search; "])
def test_query_and_search_are_public_whatever_was_imported_before(before: str) -> None:
    code = f"{before}import sys, turnout; assert callable(turnout.plan.search) and turnout.plan.Query; "
    code += "assert not {'torch', 'numpy', 'rich', 'typer'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_query_checks_itself() -> None:
    import turnout

    query = turnout.plan.Query(model="deepseek-v3", cluster="dgx-h100", nodes=128)
    assert query.world == 1024
    for field, value in (("seq_len", 0), ("global_batch", -1), ("nodes", -1), ("skew", math.nan)):
        with pytest.raises(ConfigError, match=rf"query\.{field}="):
            replace(query, **{field: value})
