"""Rows between nodes travel as messages: what arrives, and what the kernel counts, is that of one all-to-all."""

import json
import subprocess
import sys

import pytest

from turnout.comm import kernel_count

# three ranks, uneven splits with empty ones, four exchanges on their way at once, awaited in another order
DRIVER = """
import json
import torch
import torch.distributed as dist
from turnout.bench.ranks import fork_ranks
from turnout.comm import kernel_count
from turnout.comm.pairwise import Pairwise
from turnout.topology import Mesh

ROWS = ((0, 3, 1), (2, 0, 0), (5, 0, 4))  # [sender][receiver]

def exchange(world, number, begin):
    leave, come = ROWS[world.rank], [row[world.rank] for row in ROWS]
    sent = 1000.0 * number + 100 * world.rank + torch.arange(sum(leave)).unsqueeze(1).repeat(1, 3)
    out = torch.full((sum(come), 3), -1.0)
    return out, begin(out, sent, come, leave)

def work(world):
    def of_gloo(out, sent, come, leave):
        return dist.all_to_all_single(out, sent, come, leave, async_op=True)

    def pairwise(out, sent, come, leave):
        return Pairwise(out, sent, come, leave, dist.group.WORLD)

    found = []
    for begin in (of_gloo, pairwise):
        quiet = dist.new_group([0, 1, 2])
        dist.barrier(group=quiet)
        before = kernel_count.received()
        dist.barrier(group=quiet)
        begun = [exchange(world, number, begin) for number in range(4)]
        for number in (2, 0, 3, 1):
            begun[number][1].wait()
        dist.barrier(group=quiet)
        after = kernel_count.received()
        dist.barrier(group=quiet)
        # barriers have connections of their own
        found.append(([out.tolist() for out, _ in begun], sorted(after[ends] - before[ends] for ends in before)))
    return found

print(json.dumps(fork_ranks(work, Mesh(nodes=3, local=1))))
"""


@pytest.mark.slow
def test_messages_bring_what_an_all_to_all_brings_and_count_as_much() -> None:
    words = [sys.executable, "-c", DRIVER]
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for of_gloo, pairwise in json.loads(done.stdout.strip().splitlines()[-1]):
        assert pairwise[0] == of_gloo[0]
        assert -1.0 not in [value for out in pairwise[0] for row in out for value in row]
        if sys.platform == "linux":
            # the largest are those of rows, and an empty message counts like any other
            assert pairwise[1][-2:] == of_gloo[1][-2:]
            assert min(pairwise[1][-2:]) >= 4 * kernel_count.GLOO_BYTES
