"""vTrain's rows of one node are its simulator's answers, not measurements: no run repeats itself to the microsecond."""

from collections import defaultdict
from statistics import median
from typing import Any

import pytest

from turnout.plan.data import SIMULATED, vtrain_one_node_rows
from turnout.plan.validate import Validation

# bus bandwidth in GB/s of its largest all-reduce over so many ranks of an A100 node, and what its table says of sizes
# it has: https://github.com/VIA-Research/vTrain, trace/a100/AR_GPU*_LUT, in place
LARGEST = {2: 196.89, 4: 221.37}
TABLE_US = {(2, 243): 1389.1, (2, 244): 1394.2, (4, 243): 1834.0, (4, 244): 1842.3}
MIB = 2**20


@pytest.fixture(scope="module")
def step_us() -> dict[tuple[int, ...], float]:
    """Microseconds by (hidden, layers, tp, pp, dp, micro-batch, micro-batches)."""
    return {_key(row): 1e6 * row["value"] for row in vtrain_one_node_rows()}


def _key(row: dict[str, Any]) -> tuple[int, ...]:
    dims, layout = row["dims"], row["layout"]
    micro_batches = row["gbs"] // (row["mbs"] * layout["dp"])
    return dims["hidden"], dims["layers"], *(layout[axis] for axis in ("tp", "pp", "dp")), row["mbs"], micro_batches


def _gradients_mib(hidden: int, layers: int, tp: int) -> int:
    """What vTrain's `model_params` add up to on a rank without a pipeline, in 2 bytes each, in whole MiB."""
    tables = 2 * (50_257 // tp) * hidden + 1024 * hidden
    block = 12 * hidden * hidden // tp + 7 * hidden // tp + 6 * hidden
    return round(2 * (tables + layers * block) / MIB)


def test_summing_gradients_takes_the_same_microseconds_whatever_else_a_step_does(
    step_us: dict[tuple[int, ...], float],
) -> None:
    added: dict[tuple[int, ...], list[float]] = defaultdict(list)
    for (*model, dp, mbs, micro_batches), us in step_us.items():
        alone = step_us.get((*model, 1, mbs, micro_batches))
        if dp > 1 and alone is not None:
            added[*model, dp].append(us - alone)
    assert sum(map(len, added.values())) == 560
    assert max(us for each in added.values() for us in each) > 6000
    # the file has whole microseconds, of steps of 0.06 to 2 s
    assert all(max(each) - min(each) < 1.5 for each in added.values())


def test_sums_take_what_its_table_says(step_us: dict[tuple[int, ...], float]) -> None:
    size = _gradients_mib(1024, 12, 2)
    for dp in (2, 4):
        added = step_us[1024, 12, 2, 1, dp, 1, 2] - step_us[1024, 12, 2, 1, 1, 1, 2]
        assert added == pytest.approx(TABLE_US[dp, size], abs=1.5)


@pytest.mark.parametrize("layers", [20, 24])
@pytest.mark.parametrize("dp", [2, 4])
def test_sums_beyond_its_table_have_its_fault(step_us: dict[tuple[int, ...], float], layers: int, dp: int) -> None:
    """It divides by the bus bandwidth and forgets 2 (n-1) / n, so that more bytes over four ranks take less time."""
    added = step_us[2048, layers, 2, 1, dp, 1, 2] - step_us[2048, layers, 2, 1, 1, 1, 2]
    size = _gradients_mib(2048, layers, 2)
    assert size > 1024
    assert added == pytest.approx(1e6 * size / (LARGEST[dp] * 1024), abs=1.5)


def test_time_is_linear_in_micro_batches_and_in_blocks(step_us: dict[tuple[int, ...], float]) -> None:
    bent = []
    for (*model, mbs, micro_batches), us in step_us.items():
        if micro_batches == 8:
            two, four = (step_us[*model, mbs, m] for m in (2, 4))
            bent.append(abs((us - four) - 2 * (four - two)) / us)
    assert len(bent) == 288
    assert max(bent) < 1.5e-5  # repeats of a measured run differ by 1 to 6 %
    curved = []
    for (hidden, layers, *rest), us in step_us.items():
        if layers == 24:
            twelve, sixteen, twenty = (step_us[hidden, number, *rest] for number in (12, 16, 20))
            curved.append(abs((us - twenty) - (sixteen - twelve)) / us)
    assert median(curved) < 1e-5


def test_no_headline_counts_them(judged: tuple[Validation, float]) -> None:
    (row,) = [each for each in judged[0].suites if each.suite == "vtrain_one_node"]
    assert (row.split, row.n) == (SIMULATED, 1440)
    # groups are of one model: two widths, four depths
    assert row.groups == 136
