"""Every router with each policy and each backend equals the oracle, and docs/support.md says so of every row."""

import re

import pytest

from tests.contracts.dense import KNOWN_LOSSES, KNOWN_POLICIES, KNOWN_ROUTERS
from tests.contracts.support import ASKED, JUDGES, PAGE, backends, drawn, judge, support
from turnout.contracts import CapacityPolicy, Loss, RouterConfig


@pytest.mark.parametrize("router", RouterConfig.TABLE.names())
def test_every_router_with_each_policy_and_each_backend_equals_the_oracle(router: str) -> None:
    found = [support(*names) for names in drawn(router)]
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


def test_the_page_has_every_router_policy_and_loss() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for table in (RouterConfig.TABLE, CapacityPolicy.TABLE, Loss.TABLE):
        assert all(name in text for name in table.names())
