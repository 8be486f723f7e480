"""nanotron's tensors, one by one: what its rank 0 printed where nothing is late, and laws."""

from dataclasses import replace
from statistics import mean, median
from typing import Any

import pytest

from turnout.errors import ConfigError
from turnout.plan.job import Job
from turnout.plan.memory import GIB, memory_by_stage
from turnout.plan.nanotron import host_of, nanotron_cases
from turnout.plan.nanotron_step import reserved_bytes
from turnout.plan.parameters import fitted
from turnout.plan.pipeline import stages
from turnout.plan.rows import job_of


def one_node() -> list[tuple[dict[str, Any], Job]]:
    return [(row, job_of(row, {})) for row in nanotron_cases(nodes=1)]


def test_without_tensor_parallelism_reserved_memory_is_that_of_the_runs() -> None:
    pairs = [(row, job) for row, job in one_node() if job.strategy.tp == 1]
    errors = [reserved_bytes(job) / GIB / float(row["peak_mem_gib"]) - 1 for row, job in pairs]
    assert len(errors) == 23
    assert mean(map(abs, errors)) <= 0.035
    plain = [e for e, (_, job) in zip(errors, pairs, strict=True) if job.strategy.zero == 0 and job.strategy.pp > 1]
    assert max(map(abs, plain)) <= 0.03


def test_with_it_tensors_that_collectives_read_are_free_late() -> None:
    pairs = [(row, job) for row, job in one_node() if job.strategy.tp > 1]
    late, early = (
        [abs(reserved_bytes(job, host) / GIB / float(row["peak_mem_gib"]) - 1) for row, job in pairs]
        for host in ("ahead", "behind")
    )
    assert median(late) <= 0.035
    assert median(early) >= 0.09
    assert {host_of(row, job, fitted()) for row, job in pairs} == {"ahead"}


def test_it_holds_no_less_than_what_lives() -> None:
    for _, job in one_node():
        held = [reserved_bytes(job, host) for host in ("behind", "filling", "ahead")]
        assert held[0] > memory_by_stage(job)[0].resting_bytes
        if job.strategy.tp == 1:
            assert held == [held[0]] * 3
        else:
            assert held[2] > held[0]


def test_blocks_are_cut_as_nanotron_cuts_them() -> None:
    """What rank 0 printed between steps tells its parameters, and so its blocks: 20 bytes each, 18 without copies."""
    shapes = {row["dims"]["layers"]: job.shape for row, job in one_node()}
    assert [len(stages(shapes[16], pp, 1, "flops")[0].layers) for pp in (2, 4, 8)] == [10, 5, 3]
    assert [len(stages(shapes[28], pp, 1, "flops")[0].layers) for pp in (2, 4, 8)] == [16, 8, 4]


def test_a_job_whose_tensors_are_not_known_is_refused() -> None:
    _, job = one_node()[0]
    for changes in ({"zero": 3}, {"recompute": "full"}, {"pp": 2, "virtual_stages": 2, "schedule": "interleaved"}):
        with pytest.raises(ConfigError, match="tensors are known one by one"):
            reserved_bytes(replace(job, strategy=replace(job.strategy, **changes)))
