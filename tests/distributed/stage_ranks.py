"""What each process does for the tests of pipeline stages: all cases, and a run of the training loop, in one spawn."""

import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.distributed.ranks import MAX_NORM, TIMEOUT_S, join, numbers, summary
from tests.distributed.runs import trained
from tests.distributed.stage_cases import (
    StageCase,
    batches_of,
    by_ranks,
    eight_cases,
    optimizer_of,
    stage_cases,
    staged_decoder,
)
from turnout.comm import Watch, World
from turnout.data.sampler import Batch
from turnout.errors import TurnoutError
from turnout.models import Decoder
from turnout.parallel import MicroBatch, Parallel, apply
from turnout.parallel.fully_sharded import here
from turnout.strategy import Strategy
from turnout.train.device import autocast_for
from turnout.train.step import train_step

RUN = "staged-run"
# ranks -> how the model lies on them, how they save, and the share of the run after which they do, in turn
PARTS: dict[int, list[tuple[Strategy, dict[str, Any], float]]] = {
    4: [
        (Strategy(pp=2), {}, 0.25),
        (Strategy(pp=2, zero=3), {"checkpoint": "sharded"}, 0.375),
        (Strategy(pp=2, ep=2), {"checkpoint": "sharded", "async_save": True, "save_every": 1}, 0.5),
    ],
    2: [(Strategy(pp=2, schedule="zero_bubble"), {}, 0.625), (Strategy(ep=2), {"checkpoint": "sharded"}, 0.75)],
}
ACCUMULATE = 2


def run_stages(world: World, folder: Path) -> None:
    """Each rank writes down what came out."""
    outcomes: dict[str, Any] = {}
    for size, mine in by_ranks(list(stage_cases())).items():
        if world.rank >= size:
            break
        if size < world.size:
            dist.destroy_process_group()
            join(world.rank, size, folder)
        here = World(rank=world.rank, size=size, local_size=size)
        for number, (strategy, saving, until) in enumerate(PARTS[size]):
            begins, more = number == 0 and size == world.size, {"accumulate": ACCUMULATE, **saving}
            trained(folder, strategy, folder / RUN, here, resume=not begins, until=until, **more).close()
        for case in mine:
            outcomes[case.name] = run_case(case, World(rank=world.rank, size=size, local_size=min(case.local, size)))
    if world.rank < 2:
        pair = World(rank=world.rank, size=2, local_size=2)
        outcomes["refused"] = refused(pair)
        outcomes["poisoned"] = poisoned(pair)
        outcomes["stalled"] = stalled(pair)
        outcomes["alone"] = left_alone(pair, outcomes, folder)
    torch.save(outcomes, folder / f"rank-{world.rank}.pt")


def run_eight(world: World, folder: Path) -> None:
    """The cases of eight ranks."""
    torch.save({case.name: run_case(case, world) for case in eight_cases()}, folder / f"rank-{world.rank}.pt")


def run_case(case: StageCase, world: World) -> dict[str, Any]:
    """Some optimizer steps on this rank's micro-batches; weights are written down whole."""
    model, parallel = laid_out(case, world)
    optim, results = optimizer_of(case, model), []
    autocast = autocast_for(torch.device("cpu"), torch.float32)
    at = parallel.text_place[0]
    for step in range(case.steps):
        parallel.ledger.clear()
        mine = batches_of(case, step)[at]
        results.append(
            train_step(model, model.loss, optim, mine, max_norm=MAX_NORM, autocast=autocast, parallel=parallel)
        )
    state = parallel.whole(model.state_dict())
    return {
        "results": [summary(result) for result in results],
        "stats": [[numbers(stats) for stats in result.stats] for result in results],
        "sent": sent_by_stages(parallel),
        "hidden": hidden(case, parallel),
        "state": state if world.is_first else {},
        "kept": {name: here(weight).numel() for name, weight in model.named_parameters()},
    }


def hidden(case: StageCase, parallel: Parallel) -> list[torch.Tensor]:
    """What the last stage gives of the first step's micro-batches, with the weights that were trained."""
    assert parallel.stages is not None
    mine = batches_of(case, 0)[parallel.text_place[0]]
    found = parallel.stages.forward(mine, autocast_for(torch.device("cpu"), torch.float32))
    return [each.h_BSD for each in found if each.h_BSD is not None]


def sent_by_stages(parallel: Parallel) -> tuple[int, int]:
    """Bytes and messages of the last step."""
    assert parallel.stages is not None
    sent = [
        entry
        for stage in range(len(parallel.stages.cut.layers))
        for entry in (
            *parallel.ledger.sent(f"stage {stage}", "forward", "stages").values(),
            *parallel.ledger.sent(f"stage {stage}", "backward", "stages").values(),
        )
    ]
    return sum(size for size, _ in sent), sum(messages for _, messages in sent)


def refused(world: World) -> dict[str, str]:
    """What is said to one who takes a stage for a model, or gives micro-batches of two shapes."""
    case = StageCase()
    model, parallel = laid_out(case, world)
    stages = parallel.stages
    assert stages is not None
    first, second = batches_of(case, 0)[0]
    short = Batch(tokens_BS=second.tokens_BS[:, 1:], targets_BS=second.targets_BS[:, 1:])
    autocast = autocast_for(torch.device("cpu"), torch.float32)
    causes = {
        "a pass": lambda: model(first.tokens_BS),
        "two shapes": lambda: stages.forward([first, short], autocast),
        "too few": lambda: stages.train([MicroBatch(batch=first)], autocast),
        "twice": lambda: apply(model, case.strategy, world=world, timeout_s=TIMEOUT_S),
    }
    said = {}
    for name, cause in causes.items():
        try:
            cause()
        except TurnoutError as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


def poisoned(world: World) -> str | None:
    """What every rank says of a step in which a weight of the last stage is not a number."""
    case = StageCase()
    model, parallel = laid_out(case, world)
    if world.rank == 1:
        with torch.no_grad():
            model.blocks[case.layers - 1].get_parameter("ffn_norm.weight_D")[3] = torch.nan
    autocast, optim = autocast_for(torch.device("cpu"), torch.float32), optimizer_of(case, model)
    mine = batches_of(case, 0)[0]
    return train_step(model, model.loss, optim, mine, max_norm=MAX_NORM, autocast=autocast, parallel=parallel).problem


def stalled(world: World) -> list[str]:
    """What this rank says while the other one's stage sleeps over a micro-batch."""
    case, said = StageCase(), list[str]()
    model, parallel = laid_out(case, world)
    if world.rank == 1:
        model.blocks[case.layers - 1].register_forward_pre_hook(lambda *_: time.sleep(1.2))
    with Watch(world, parallel.ledger, said.append, patience_s=0.8, every_s=0.2):
        pass_once(case, parallel)
    return said


def left_alone(world: World, outcomes: dict[str, Any], folder: Path) -> str:
    """What a rank says whose only peer ends in the middle of a run."""
    case = StageCase()
    _, parallel = laid_out(case, world)
    if world.rank == 1:
        torch.save(outcomes, folder / "rank-1.pt")
        os._exit(0)
    try:
        pass_once(case, parallel)
    except TurnoutError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def laid_out(case: StageCase, world: World) -> tuple[Decoder, Parallel]:
    model = staged_decoder(case)
    return model, apply(model, case.strategy, world=world, timeout_s=TIMEOUT_S)


def pass_once(case: StageCase, parallel: Parallel) -> None:
    """Forward and backward over the first step's micro-batches."""
    assert parallel.stages is not None
    parts = [MicroBatch(batch=batch, main=1.0, aux=1.0) for batch in batches_of(case, 0)[0]]
    parallel.stages.train(parts, autocast_for(torch.device("cpu"), torch.float32))
