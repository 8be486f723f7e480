"""Every legal combination of the tables equals the oracle, and docs/support.md says so of every row."""

import pytest

from tests.contracts.support import PAGE, backends, combinations, support
from turnout.contracts import CapacityPolicy, Loss, RouterConfig


@pytest.mark.parametrize("router", RouterConfig.TABLE.names())
def test_every_combination_equals_the_oracle(router: str) -> None:
    found = [support(*names) for names in combinations() if names[0] == router]
    assert len(found) == len(CapacityPolicy.TABLE) * len(backends())
    for row in found:
        assert set(row.losses) | set(row.refused) == set(Loss.TABLE.names())
        assert ("load_balance" in row.losses) == RouterConfig.TABLE[router]().scores_have_gradient


def test_the_page_has_every_router_policy_and_loss() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for table in (RouterConfig.TABLE, CapacityPolicy.TABLE, Loss.TABLE):
        assert all(name in text for name in table.names())
