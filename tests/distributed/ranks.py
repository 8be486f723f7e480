"""What each process of a test does: all cases in one spawn, for starting processes costs more than the cases."""

import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _symmetric_memory

from tests.distributed.agreements import agreements
from tests.distributed.cases import (
    LAYOUTS,
    LayerCase,
    TrainCase,
    build,
    by_world,
    config_of,
    crossed_cases,
    cuts_of,
    decoder,
    inputs_of,
    kernel_cases,
    layer_cases,
    optimizer,
    parts,
    passed,
    placement_to,
    texts,
    train_cases,
    worst,
)
from tests.distributed.cases import PROGRAMS as PROGRAM_NAMES
from tests.distributed.crossed import crossed_trainings, few_trainings
from tests.distributed.held import Held
from tests.distributed.reshard import reshard
from tests.distributed.runs import run_part
from turnout import MoE, Strategy
from turnout.comm import ExpertGroup, Groups, Ledger, Watch, World, lines, make_groups
from turnout.comm.kernel_count import Connection, received
from turnout.comm.ledger import Kind, Phase
from turnout.comm.processes import start_ranks
from turnout.contracts import ExpertCall
from turnout.dispatch import Dropless, FixedCapacity, plan_dispatch
from turnout.errors import TransportError
from turnout.models import Decoder
from turnout.parallel import ExpertParallel, Parallel, Shards, apply, check_replicas, reduce_gradients
from turnout.parallel import build as build_in_parts
from turnout.parallel.dense_cuts import DenseCut
from turnout.parallel.fully_sharded import here
from turnout.parallel.moves import move_bytes, moved, placements_of
from turnout.parallel.tuner import Tuner, dictionary_for
from turnout.routers import TopK
from turnout.tensors import MoEStats
from turnout.train.device import autocast_for
from turnout.train.step import train_step
from turnout.tune import Dictionary, Rules

TIMEOUT_S = 120.0
RANDOM_PASSES, MANY_PASSES = 12, 500
STALLED = (0, 2)
TUNED_STEPS = 12
MAX_NORM = 0.5  # small enough that every step is clipped
SYMMETRIC = torch.library.Library("symm_mem", "IMPL")
REFERENCES = {
    "fused_all_gather_matmul": _symmetric_memory._fused_all_gather_matmul_fallback,
    "fused_matmul_reduce_scatter": _symmetric_memory._fused_matmul_reduce_scatter_fallback,
}
Outcome = dict[str, Any]
Job = Callable[[World, Path], None]


def spawn(job: Job, ranks: int, folder: Path) -> None:
    """Run `job` in that many processes, each of which begins with a world of its own."""
    start_ranks(_process, ranks, job, ranks, str(folder))


def _process(rank: int, job: Job, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.pop("WORLD_SIZE", None)
    join(rank, ranks, Path(folder))
    try:
        job(World(rank=rank, size=ranks, local_size=ranks), Path(folder))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def join(rank: int, ranks: int, folder: Path) -> None:
    """A process group over a file."""
    store = f"file://{folder}/store-{ranks}"
    timeout = timedelta(seconds=TIMEOUT_S)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timeout)


def run_cases(world: World, folder: Path) -> None:
    """All layer and training cases, those of most ranks first; each rank writes down what came out."""
    outcomes: Outcome = {}
    cases = by_world([*layer_cases(), *train_cases()])
    for size, mine in cases.items():
        if world.rank >= size:
            break
        if size < world.size:
            dist.destroy_process_group()
            join(world.rank, size, folder)
        run_part(World(rank=world.rank, size=size, local_size=size), folder)
        for case in mine:
            here = World(rank=world.rank, size=size, local_size=case.local)
            run = run_layer if isinstance(case, LayerCase) else run_training
            outcomes[f"{type(case).__name__} {case.name}"] = run(case, here)  # pyright: ignore[reportArgumentType]
        if size == world.size:
            outcomes["random"] = run_random(world, RANDOM_PASSES)
            outcomes["kernel"] = counted_by_kernel(world)
            outcomes["stalls"] = {"said": stalls(world)}
            outcomes["tuned"] = tuned(world)
            outcomes["resharded"] = reshard(world, folder)
            outcomes["disagreement"] = {"said": disagreement(world)}
        _groups.cache_clear()
    if world.rank < 2:
        pair = World(rank=world.rank, size=2, local_size=2)
        outcomes["agreements"] = agreements(pair, folder, lambda layer, case: distributed(layer, case, pair))
        outcomes["alone"] = {"said": left_alone(pair, outcomes, folder)}
    torch.save(outcomes, folder / f"rank-{world.rank}.pt")


def left_alone(world: World, outcomes: Outcome, folder: Path) -> str:
    """What a rank says whose only peer ends in the middle of a run."""
    case = LayerCase(ranks=2, ep=2, local=2)
    layer = build(case)
    distributed(layer, case, world)
    if world.rank == 1:
        torch.save(outcomes, folder / "rank-1.pt")
        os._exit(0)
    try:
        passed(layer, inputs_of(case, world.rank))
    except TransportError as error:
        return str(error)
    return "nothing"


def run_layer(case: LayerCase, world: World) -> Outcome:
    """One pass of the layer on this rank's tokens."""
    layer = build(case)
    parallel = distributed(layer, case, world)
    out, x_grad = passed(layer, inputs_of(case, world.rank))
    backward = {name: weight.grad is not None for name, weight in layer.named_parameters() if weight.numel()}
    reduce_gradients(layer, parallel)
    name = "the layer"
    return {
        "y": out.y.detach(),
        "x_grad": x_grad,
        "losses": torch.stack([term.value.detach() for term in out.losses]),
        "stats": numbers(out.stats),
        "grads": {own: weight.grad for own, weight in layer.named_parameters()},
        "had_grad": backward,
        **{
            kind: {way: parallel.ledger.sent(name, way, kind) for way in ("forward", "backward")}
            for kind in ("slices", "weights")
        },
        "forward": parallel.ledger.sent(name, "forward"),
        "backward": parallel.ledger.sent(name, "backward"),
        "host_copies": parallel.ledger.host_copies(name),
    }


def run_many(world: World, folder: Path) -> None:
    """So many random passes that only those who ask for them wait."""
    torch.save(run_random(world, MANY_PASSES), folder / f"rank-{world.rank}.pt")


def run_crossed(world: World, folder: Path) -> None:
    """Every layout with every program, number of chunks and packing."""
    found = {}
    for case in crossed_cases():
        found[case.name] = run_layer(case, replace(world, local_size=case.local))
    torch.save(found, folder / f"rank-{world.rank}.pt")


def run_crossed_trainings(world: World, folder: Path) -> None:
    """Steps in which every two values of two settings meet."""
    _run_trainings(crossed_trainings(), world, folder)


def run_few_trainings(world: World, folder: Path) -> None:
    """The first of them."""
    _run_trainings(few_trainings(), world, folder)


def _run_trainings(cases: Iterable[TrainCase], world: World, folder: Path) -> None:
    found = {case.name: run_training(case, replace(world, local_size=case.local)) for case in cases}
    torch.save(found, folder / f"rank-{world.rank}.pt")


def run_random(world: World, steps: int) -> Outcome:
    """Passes with random layouts, programs, chunks and token counts, often zero; returns the worst errors against this
    rank alone."""
    worst_y = worst_grad = 0.0
    for step in range(steps):
        draw = random.Random(step)
        ep, etp, parts = draw.choice(LAYOUTS)
        capacity = draw.choice((Dropless(), FixedCapacity(factor=1.0)))
        case = LayerCase(
            ep=ep,
            etp=etp,
            adaptive_r=parts,
            hidden=8,
            overlap=draw.choice((1, 1, 2, 4, 8)),
            capacity=capacity,
            backend=draw.choice(("loop", "padded_bmm")),
            program=draw.choice(PROGRAM_NAMES),
            local=draw.choice((1, 2, 4) if etp == 1 else (2, 4) if etp == 2 else (4,)),
            tokens=tuple(draw.choice((0, 0, 1, 2, 9)) for _ in range(world.size)),
            num_experts=draw.choice((4, 5, 8)),
            crowded=draw.random() < 0.3,
            router=TopK(k=draw.randint(2, 4), init_std=0.5),
        )
        layer = build(case)
        distributed(layer, case, World(rank=world.rank, size=world.size, local_size=case.local))
        inputs = inputs_of(case, world.rank)
        got, want = passed(layer, inputs), passed(build(case), inputs)
        worst_y = max(worst_y, worst(got[0].y.detach(), want[0].y.detach()))
        worst_grad = max(worst_grad, worst(got[1], want[1]))
    return {"y": worst_y, "x_grad": worst_grad}


def distributed(layer: MoE, case: LayerCase, world: World) -> Parallel:
    """`apply`, with groups that cases share, and with placements of their own."""
    groups = _groups(case.ep, case.etp, world)
    ledger, cuts = Ledger(), {}
    if groups.experts is not None:
        cuts = cuts_of(case, layer)
        share = ExpertParallel(case.strategy, groups.experts, cuts, ledger=ledger, layer="the layer")
        layer.share_experts(share, cuts, groups.experts.place)
    shards = Shards(
        cuts={f"experts.{own}": cut for own, cut in cuts.items()},
        group=groups.experts,
        has_first=world.rank < case.ep * case.etp,
    )
    return Parallel(strategy=replace(case.strategy, dp=world.size), groups=groups, shards=shards, ledger=ledger)


@cache
def _groups(ep: int, etp: int, world: World) -> Groups:
    # whose bytes the kernel can count, unless a test says otherwise
    share = None if lines.SETTING in os.environ else False
    return make_groups(Strategy(ep=ep, etp=etp, dp=world.size), world, timeout_s=TIMEOUT_S, share_memory=share)


def run_training(case: TrainCase, world: World) -> Outcome:
    """Some optimizer steps on this rank's micro-batches; weights are written down whole."""
    with Held() as held:
        model, parallel = laid_out(case, world)
    optim = optimizer(case, model)
    begins = case.etp > 1 or begins_where_it_says(case, model, parallel)
    results, has_switched, sent = [], False, []
    for step in range(case.steps):
        if any(case.moves[step : step + 1]):
            parallel = move(model, parallel, optim, case.moves[step], sent)
        if case.switches:
            parallel, has_moved = switch(model, parallel, *case.switches[step])
            has_switched = has_switched or has_moved
        mine = texts(case, step)[parallel.text_place[0]]
        autocast = autocast_for(torch.device("cpu"), torch.float32)
        result = train_step(model, model.loss, optim, mine, max_norm=MAX_NORM, autocast=autocast, parallel=parallel)
        results.append(result)
    # copies are alike to the bit, or this says where not
    check_replicas(model, parallel)
    whole = parallel.whole(model.state_dict())
    return {
        "results": [summary(result) for result in results],
        "stats": [[numbers(stats) for stats in result.stats] for result in results],
        "state": whole if world.is_first else {},
        "begins": begins,
        "moved": has_switched,
        "sent": sent,
        "held": held.most_bytes,
        "tensor": tensor_bytes(parallel),
        "shards": shard_bytes(model, parallel),
        "kept": {
            name: (here(weight).numel(), *weight.shape[:1], weight.numel()) for name, weight in model.named_parameters()
        },
    }


def laid_out(case: TrainCase, world: World) -> tuple[Decoder, Parallel]:
    if case.in_parts:
        torch.manual_seed(0)
        # mapped memory of peers would count as tensors of this rank, touched or not
        with patch.dict(os.environ, {lines.SETTING: "0"}):
            return build_in_parts(config_of(case), case.strategy, world=world, timeout_s=TIMEOUT_S, dtype=case.dtype)
    model = decoder(case)
    with operators_on_cpu() if case.symmetric else nullcontext():
        return model, apply(model, case.strategy, world=world, timeout_s=TIMEOUT_S)


@contextmanager
def operators_on_cpu() -> Iterator[None]:
    """torch's own references of its fused operators compute on the CPU from here on; ranks are told they can."""
    for name, reference in REFERENCES.items():
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"symm_mem::{name}", "CPU"):
            SYMMETRIC.impl(name, reference, "CPU")
    with patch("turnout.parallel.tensor_parallel.is_shared", return_value=True):
        yield


def tensor_bytes(parallel: Parallel) -> list[int]:
    """Bytes and messages that the layers which tensor-parallel ranks share have sent, the model's ends left out."""
    layers = {name.rpartition(".")[0] for name, cut in parallel.shards.cuts.items() if isinstance(cut, DenseCut)}
    ways: tuple[Phase, ...] = ("forward", "backward")
    sent = [each for layer in layers for way in ways for each in parallel.ledger.sent(layer, way, "tensor").values()]
    return [sum(column) for column in zip(*sent, strict=True)] if sent else [0, 0]


def shard_bytes(model: Decoder, parallel: Parallel) -> dict[str, tuple[int, ...]]:
    """Bytes of weights gathered, of gradients summed and of those summed over copies, by the module FSDP wrapped."""
    kinds: tuple[tuple[Phase, Kind], ...] = (("forward", "shards"), ("backward", "shards"), ("backward", "copies"))
    names = ["the model", *(name for name, _ in model.named_modules() if name)]
    found = {name: [parallel.ledger.sent(name, *kind).values() for kind in kinds] for name in names}
    return {name: tuple(sum(size for size, _ in sent) for sent in each) for name, each in found.items() if each[0]}


def move(
    model: Decoder, parallel: Parallel, optim: torch.optim.Optimizer, where: tuple[Any, ...], sent: list[Any]
) -> Parallel:
    """Experts to other ranks; adds the bytes and messages to each rank, as they were shown and as they were counted."""
    to = dict.fromkeys(placements_of(model, parallel), placement_to(where, parallel.strategy.ep))
    shown = move_bytes(model, parallel, optim, to)
    parallel.ledger.clear()
    parallel = moved(model, parallel, optim, to)
    group = parallel.groups.experts
    assert group is not None
    for layer, pairs in shown.items():
        counted = parallel.ledger.sent(layer, "forward", "moves")
        others = [place for place in range(group.size) if place != group.place]
        sent.append(({place: [pairs.get((group.place, place), 0), 1] for place in others}, counted))
    return parallel


def switch(model: Decoder, parallel: Parallel, program: str, overlap: int, parts: int) -> tuple[Parallel, bool]:
    """Another program, number of chunks and r; and whether a tensor moved, changed, or another one took its place."""
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    owners = {name: id(weight) for name, weight in model.named_parameters()}
    parallel = parallel.switched(model, alltoall=program, overlap=overlap, adaptive_r=parts)
    after = model.state_dict()
    alike = before.keys() == after.keys() and all(
        after[name].data_ptr() == place and torch.equal(after[name], value) for name, (place, value) in before.items()
    )
    return parallel, not alike or owners != {name: id(weight) for name, weight in model.named_parameters()}


def tuned(world: World) -> Outcome:
    """Steps under a tuner: what was taken in each, and what the ranks then know."""
    case = TrainCase(ep=2, etp=2)
    model = decoder(case)
    parallel = apply(model, "auto", world=world, timeout_s=TIMEOUT_S)
    rules = Rules(prune=50.0, trials=1, most=4, patience=99)
    tuner = Tuner(model, parallel, dictionary_for(parallel, torch.device("cpu"), "", "", rules), element_bytes=8)
    # nothing is learned, so that every step is like the first
    optim, autocast = torch.optim.SGD(model.parameters(), lr=0.0), autocast_for(torch.device("cpu"), torch.float32)
    taken = []
    for _ in range(TUNED_STEPS):
        parallel = tuner.before_step(model, parallel)
        strategy = parallel.strategy
        taken.append((strategy.adaptive_r, strategy.overlap, strategy.alltoall))
        mine = parts(case, 0)[world.rank : world.rank + 1]
        result = train_step(model, model.loss, optim, mine, max_norm=MAX_NORM, autocast=autocast, parallel=parallel)
        tuner.after_step(0.1 + 0.01 * random.random(), result.stats, 1)
    known = Dictionary.from_json(tuner.dictionary.to_json(), "it")
    again = dictionary_for(parallel, torch.device("cpu"), known.to_json() if world.is_first else "", "it")
    ep, etp = parallel.strategy.ep, parallel.strategy.etp
    text = tuner.dictionary.to_json()
    return {"taken": taken, "layout": (ep, etp), "text": text, "read_again": again == known, "warm": tuner.is_warm}


def begins_where_it_says(case: TrainCase, model: Decoder, parallel: Parallel) -> bool:
    """Whether this rank's experts of a fresh model are those that an error would name."""
    fresh = decoder(case)
    for name, weight in model.named_parameters():
        if name.endswith("experts.up_EDG"):
            own_EDG = here(weight)
            experts = [parallel.shards.expert_at(name, row) for row in range(len(own_EDG))]
            if not torch.equal(own_EDG, fresh.get_parameter(name)[experts]):
                return False
    return True


def counted_by_kernel(world: World) -> dict[str, Outcome]:
    """What the kernel received for one forward and backward pass of each program, beside what the ledger noted."""
    before_quiet = set(received())
    # a group of its own for the barriers, whose connections are not counted
    quiet = dist.new_group(list(range(world.size)))
    dist.barrier(group=quiet)
    ignored = set(received()) - before_quiet
    found = {}
    for case in kernel_cases():
        groups, ledger = _groups(case.ep, case.etp, replace(world, local_size=case.local)), Ledger()
        assert groups.experts is not None
        pass_rows = rows_on_their_way(case, world, groups.experts, ledger)
        before = _quietly(quiet)
        pass_rows()
        after = _quietly(quiet)
        delta = {ends: after[ends] - before.get(ends, 0) for ends in after if ends not in ignored}
        found[case.name] = {"received": delta, **{way: ledger.sent("wire", way) for way in ("forward", "backward")}}
    return found


def _quietly(quiet: dist.ProcessGroup) -> dict[Connection, int]:
    dist.barrier(group=quiet)
    now = received()
    dist.barrier(group=quiet)
    return now


def rows_on_their_way(case: LayerCase, world: World, group: ExpertGroup, ledger: Ledger) -> Callable[[], None]:
    """Counts are exchanged at once; what is returned moves the rows there and back, and their gradients."""
    layer, inputs = build(case), inputs_of(case, world.rank)
    x_TD = inputs.x_TD.clone().requires_grad_()
    assignment = layer.router(x_TD).assignment
    plan = plan_dispatch(assignment, case.capacity.admit(assignment))
    share = ExpertParallel(case.strategy, group, cuts_of(case, layer), ledger=ledger, layer="wire")
    same = ExpertCall(layout="ragged", capacity=None, weights={}, compute=lambda rows, _: rows)
    move = share.after_counts(x_TD, assignment, plan, same)

    def there_and_back() -> None:
        move().sum().backward()

    return there_and_back


def stalls(world: World) -> list[str]:
    """What this rank says while one of the others sleeps before a layer, in steps 7 and 9."""
    said: list[str] = []
    case = LayerCase()
    layer = build(case)
    parallel = distributed(layer, case, world)
    for culprit in STALLED:
        with Watch(world, parallel.ledger, said.append, patience_s=0.8, every_s=0.2):
            with parallel.ledger.inside("agreement", step=7 + culprit):
                world.barrier()
            if world.rank == culprit:
                time.sleep(2.0)
            passed(layer, inputs_of(case, world.rank))
    return said


def disagreement(world: World) -> str:
    """What is said where one replica of an expert, or one dense weight, is not what the others have."""
    case, said = LayerCase(ep=2, local=4), []
    for name in ("experts.up_EDG", "router.score.weight_ED"):
        layer = build(case)
        parallel = distributed(layer, case, world)
        check_replicas(layer, parallel)
        with torch.no_grad():
            layer.get_parameter(name).add_(float(world.rank == 3))
        try:
            check_replicas(layer, parallel)
            said.append("nothing")
        except TransportError as error:
            said.append(str(error))
    return "; ".join(said)


def summary(result: Any) -> Tensor:
    """Losses and gradient norm of a step."""
    return torch.tensor([result.loss, result.total_loss, result.grad_norm, *result.aux.values()], dtype=torch.float64)


def numbers(stats: MoEStats) -> Tensor:
    """All statistics of a layer, one after another."""
    return torch.cat([value.detach().double().reshape(-1) for value in vars(stats).values()])
