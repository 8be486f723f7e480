"""What several tests of the planner ask for and is expensive: worked out once."""

import time

import pytest

from turnout.plan.validate import Validation, validate


@pytest.fixture(scope="session")
def judged() -> tuple[Validation, float]:
    """The report on the visible suites, and the processor's seconds it took."""
    started = time.process_time()
    report = validate()
    return report, time.process_time() - started
