"""Every router with each policy and each backend equals the oracle, and docs/support.md says so of every row."""

import re

import pytest

from tests.contracts.cases import draw, simple_case
from tests.contracts.dense import KNOWN_LOSSES, KNOWN_POLICIES, KNOWN_ROUTERS
from tests.contracts.support import (
    ASKED,
    JUDGES,
    LOSSES_ALONE,
    NUM_EXPERTS,
    PAGE,
    SETTINGS,
    backends,
    drawn,
    judge,
    refused_cell,
    support,
    with_settings,
)
from turnout.contracts import CapacityPolicy, ExpertBackend, Loss, RouterConfig


@pytest.mark.parametrize("router", RouterConfig.TABLE.names())
def test_every_router_with_each_policy_and_each_backend_equals_the_oracle(router: str) -> None:
    found = [support(*names) for names in {*drawn(router), (router, *LOSSES_ALONE)}]
    assert {row.capacity for row in found} == set(CapacityPolicy.TABLE.names())
    assert {row.backend for row in found} == set(backends())
    for row in found:
        assert set(row.losses) | set(row.refused) == set(Loss.TABLE.names())
        assert ("load_balance" in row.losses) == RouterConfig.TABLE[router]().scores_have_gradient


TABLES = ((RouterConfig.TABLE, KNOWN_ROUTERS), (CapacityPolicy.TABLE, KNOWN_POLICIES), (Loss.TABLE, KNOWN_LOSSES))


def test_the_page_claims_the_oracle_for_the_rows_it_knows_alone() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    for table, known in TABLES:
        for name, row in table.items():
            (line,) = (line for line in lines if line.startswith(f"| {name} |"))
            assert (ASKED in line) is not issubclass(row, known), line
            assert judge(name, row, known) in line


def test_a_row_that_is_asked_is_judged_where_the_page_says() -> None:
    asked = {name: row for table, known in TABLES for name, row in table.items() if not issubclass(row, known)}
    assert asked.keys() == JUDGES.keys()
    for name, row in asked.items():
        text = (PAGE.parents[1] / "tests" / "contracts" / JUDGES[name]).read_text(encoding="utf-8")
        assert re.search(rf"\b{row.__name__}\(", text), (name, JUDGES[name])


def test_the_page_lists_the_rows_of_the_tables_and_no_others() -> None:
    rows = [line.split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    names = [row[0].removeprefix("| ") for row in rows]
    heads = (names.index("router"), names.index("capacity policy or loss"))
    assert heads[0] == 0
    assert names[1 : heads[1]] == RouterConfig.TABLE.names()
    assert names[heads[1] + 1 :] == [*CapacityPolicy.TABLE.names(), *Loss.TABLE.names()]
    columns = [column.partition(" (")[0] for column in rows[0][2:-1]]
    assert set(backends()) <= set(columns) <= set(ExpertBackend.TABLE.names())
    for name, *cells in rows[1 : heads[1]]:
        assert cells[-1] == f"{refused_cell(RouterConfig.TABLE[name.removeprefix('| ')]())} |"


def test_settings_that_stand_for_a_row_are_of_that_row_and_not_its_defaults() -> None:
    for name, settings in SETTINGS.items():
        row = RouterConfig.TABLE[name]
        assert all(type(config) is row and (config, training) != (row(), True) for config, training in settings)


def test_a_switch_of_mode_is_tried_before_it_and_after() -> None:
    cases = with_settings(simple_case(num_experts=NUM_EXPERTS, shape=(3, 14), padding=0.3), "locmoe_plus")
    routers = [draw(case)[0].router for case in cases if getattr(case.router, "switch_step", 0)]
    assert {bool(router.get_buffer("switched")) for router in routers} == {False, True}
