"""Any layout equals one process: outputs, gradients, losses, statistics, weights; and moves the bytes it predicts."""

import math
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.distributed.alone import assert_trains_like_one_process
from tests.distributed.cases import (
    DIM,
    LayerCase,
    TrainCase,
    build,
    crossed_cases,
    cuts_of,
    decoder,
    inputs_of,
    kernel_cases,
    layer_cases,
    passed,
    placement_of,
    texts,
    tolerance,
    train_cases,
    worst,
)
from tests.distributed.ranks import MAX_NORM, STALLED, Outcome, numbers, run_crossed, run_many, spawn
from turnout.alltoall import PROGRAMS, RoutedTokens, RowSize, pairs_of, round_trip
from turnout.balance import turns
from turnout.comm import expert_mesh, kernel_count
from turnout.dispatch import plan_dispatch
from turnout.plan.data_volume import reductions
from turnout.plan.expert_volume import expert_tensor_volume, expert_weights_volume
from turnout.plan.shapes import SHAPES
from turnout.plan.step import Step
from turnout.plan.volume import tensor_volume
from turnout.topology import Mesh

ROOM = 2048  # bytes of small tensors: counts, marks, what groups are warmed with
LAYERS, TRAININGS, PLAIN = list(layer_cases()), list(train_cases()), TrainCase()
SHARDED = [case for case in TRAININGS if case.zero]
SENDING = [case for case in LAYERS if case.adaptive_r != 0]
Outcomes = list[dict[str, Outcome]]


@pytest.fixture(scope="session")
def outcomes(four_ranks: Path) -> Outcomes:
    """What each of four ranks wrote down."""
    return _read(four_ranks)


@cache
def _read(folder: Path) -> Outcomes:
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(4)]


def of_ranks(outcomes: Outcomes, case: LayerCase | TrainCase) -> list[Outcome]:
    return [outcomes[rank][f"{type(case).__name__} {case.name}"] for rank in range(case.ranks)]


def test_every_case_has_a_name_of_its_own() -> None:
    for cases in (LAYERS, TRAININGS):
        assert len({case.name for case in cases}) == len(cases)


@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)
def test_a_layer_equals_one_process(case: LayerCase, outcomes: Outcomes) -> None:
    assert_equals_one_process(case, of_ranks(outcomes, case))


@pytest.mark.exhaustive
def test_every_layout_with_every_program_chunks_and_packing_equals_one_process(tmp_path: Path) -> None:
    spawn(run_crossed, 4, tmp_path)
    found = _read(tmp_path)
    for case in crossed_cases():
        assert_equals_one_process(case, [outcome[case.name] for outcome in found])


def assert_equals_one_process(case: LayerCase, found: list[Outcome]) -> None:
    layer = build(case)
    limit = tolerance(case.dtype)
    for rank, got in enumerate(found):
        out, x_grad = passed(layer, inputs_of(case, rank))
        losses = torch.stack([term.value.detach() for term in out.losses])
        for name, want in (
            ("y", out.y.detach()),
            ("x_grad", x_grad),
            ("losses", losses),
            ("stats", numbers(out.stats)),
        ):
            assert worst(got[name], want) <= limit, (rank, name)
        assert all(got["had_grad"].values()), "a weight without tokens has a gradient of zero, not none"
    for name, weight in layer.named_parameters():
        assert weight.grad is not None
        # one divisor for everything: the losses of the ranks are averaged
        want = weight.grad / case.ranks
        for got in gathered(case, name, found):
            assert worst(got, want) <= limit, name


def gathered(case: LayerCase, name: str, found: list[Outcome]) -> list[Tensor]:
    """A gradient as each rank has it, or, where it is cut, as each expert group does."""
    grads = [outcome["grads"][name] for outcome in found]
    own = name.removeprefix("experts.")
    if own == name or case.ep == case.etp == 1:
        return grads
    cut = cuts_of(case, build(case))[own]
    return [cut.joined(grads[start : start + cut.ranks]) for start in range(0, case.ranks, cut.ranks)]


@pytest.mark.parametrize("case", [case for case in LAYERS if case.etp > 1], ids=lambda case: case.name)
def test_the_parts_of_a_weight_are_as_large_as_they_say_and_make_the_whole(case: LayerCase) -> None:
    layer = build(case)
    for name, cut in cuts_of(case, layer).items():
        whole = layer.experts.get_parameter(name)
        parts = [cut.part(whole, rank) for rank in range(cut.ranks)]
        assert [tuple(part.shape) for part in parts] == [cut.part_shape(rank) for rank in range(cut.ranks)]
        # copies lie there as often as there are of them
        assert sum(part.numel() for part in parts) == whole.numel() // case.num_experts * cut.placement.num_slots
        assert torch.equal(cut.joined(parts), whole)


@pytest.mark.parametrize("case", [case for case in SENDING if case.ep > 1], ids=lambda case: case.name)
def test_bytes_and_messages_of_every_pair_are_the_predicted_ones(case: LayerCase, outcomes: Outcomes) -> None:
    found = of_ranks(outcomes, case)
    mesh, width = expert_mesh(case.ep, max(1, case.local // case.etp)), case.latent_dim or DIM
    moves, size = round_trip(PROGRAMS[case.program], mesh), case.dtype.itemsize
    row, label = size * width, max(size, 4)
    there = RowSize(row_bytes=row, back_bytes=row, label_bytes=4 + label)
    home = RowSize(row_bytes=row, back_bytes=row, label_back_bytes=label)
    for column in columns(case):
        routing = RoutedTokens(mesh, [destinations(case, rank) for rank in column])
        for phase, sizes in (("forward", there), ("backward", home)):
            got = {(at, to): sent for at, rank in enumerate(column) for to, sent in found[rank][phase].items()}
            want = pairs_of(moves, routing, sizes)
            # the bytes of one exchange, in as many messages as there are chunks
            assert got == {pair: [size, case.overlap * messages] for pair, (size, messages) in want.items()}, phase


def columns(case: LayerCase) -> list[list[int]]:
    """The ranks that rows travel between: of the same slice, and other experts."""
    block = case.ep * case.etp
    firsts = [start + at for start in range(0, case.ranks, block) for at in range(case.etp)]
    return [list(range(first, first + block, case.etp)) for first in firsts]


# copies, which the planner's bytes do not know, are gathered as well
GATHERING = [case for case in LAYERS if case.adaptive_r >= 0 and not placement_of(case).has_copies]


@pytest.mark.parametrize("case", GATHERING, ids=lambda case: case.name)
def test_gathered_weights_are_as_many_as_the_planner_says(case: LayerCase, outcomes: Outcomes) -> None:
    """Biases, of which the planner knows nothing, are one number for each of the columns of a matrix."""
    found = of_ranks(outcomes, case)
    step = step_of(case, tokens=1.0)
    (want,) = expert_weights_volume(step, case.num_experts)
    kept = sum(weight.numel() for weight in build(case).experts.parameters() if weight.ndim == 3)
    widening = case.dtype.itemsize / 4 * sum(each.numel() for each in build(case).experts.parameters()) / kept
    sent = [each for outcome in found for way in outcome["weights"].values() for each in way.values()]
    assert sum(payload for payload, _ in sent) == pytest.approx(want.total_bytes * case.ranks * widening, rel=1e-12)
    assert sum(messages for _, messages in sent) == want.messages * case.ranks
    if case.adaptive_r == 0:
        assert not any(outcome[way] for outcome in found for way in ("forward", "backward")), "tokens stay"


@pytest.mark.parametrize(
    "case", [case for case in SENDING if case.strategy.expert_parts > 1], ids=lambda case: case.name
)
def test_slices_send_what_the_planner_says(case: LayerCase, outcomes: Outcomes) -> None:
    """On average over ranks: the planner knows no routing, but it does know how many rows there are in all."""
    found = of_ranks(outcomes, case)
    sent = [each for outcome in found for way in outcome["slices"].values() for each in way.values()]
    rows = sum(rows_sent(case, rank) for rank in range(case.ranks))
    step = step_of(case, tokens=rows / case.ranks)
    (want,) = expert_tensor_volume(step, case.ep)
    widening = case.dtype.itemsize / 4
    assert sum(payload for payload, _ in sent) == pytest.approx(want.total_bytes * case.ranks * widening, rel=1e-12)
    assert sum(messages for _, messages in sent) == want.messages * case.ranks * case.overlap


def step_of(case: LayerCase, tokens: float) -> Step:
    """The planner's question about a layer: experts are those of one rank to it, and a token has one choice."""
    strategy = replace(case.strategy, precision="fp32").check(case.ranks, num_experts=case.ep)
    sizes = {"dim": case.latent_dim or DIM, "expert_hidden": case.hidden, "gated": case.expert == "swiglu"}
    shape = replace(SHAPES["mixtral-8x7b"], num_experts=case.ep, top_k=1, **sizes)
    return Step(shape=shape, strategy=strategy, devices_per_node=case.local, tokens=tokens, micro_batches=1)


def rows_sent(case: LayerCase, rank: int) -> int:
    """Assignments that a rank sends to the experts, or places of its blocks."""
    return sum(len(to) for to in destinations(case, rank))


@pytest.mark.skipif(not kernel_count.is_available(), reason="TCP_INFO is Linux's")
@pytest.mark.parametrize("case", list(kernel_cases()), ids=lambda case: case.name)
def test_the_kernel_counts_the_same_bytes(case: LayerCase, outcomes: Outcomes) -> None:
    """Every rank's sockets, rank by rank, less what gloo adds to a message."""
    found = [outcome["kernel"][case.name] for outcome in outcomes]
    got = kernel_count.matrix([outcome["received"] for outcome in found])
    for sender, outcome in enumerate(found):
        for receiver in set(range(case.ranks)) - {sender}:
            sent = [outcome[way].get(receiver, [0, 0]) for way in ("forward", "backward")]
            payload, messages = (sum(column) for column in zip(*sent, strict=True))
            assert got.get((sender, receiver), 0) == payload + kernel_count.GLOO_BYTES * messages, (sender, receiver)


def destinations(case: LayerCase, rank: int) -> list[list[int]]:
    """The ranks where each token's experts are; blocks of one size are rows that all exist."""
    at = placement_of(case)
    layer, inputs = build(case), inputs_of(case, rank)
    routing = layer.router(inputs.x_TD, None, inputs.mask_T)
    admission = case.capacity.admit(routing.assignment)
    if case.is_padded:
        return [[to] for to in at.rank_of] * widest(case, rank)
    plan = plan_dispatch(routing.assignment, admission)
    tokens: list[list[int]] = [[] for _ in range(case.tokens[rank])]
    mesh = expert_mesh(case.ep, max(1, case.local // case.etp))
    place, met = rank % (case.ep * case.etp) // case.etp, Counter[int]()
    for token, chosen in zip(
        plan.token_M.tolist(), routing.assignment.expert_N[plan.assignment_M].tolist(), strict=True
    ):
        turn = turns(at.ranks_of[chosen], case.ep, mesh.local)[place]
        tokens[token].append(turn[met[chosen] % len(turn)])
        met[chosen] += 1
    return tokens


def widest(case: LayerCase, rank: int) -> int:
    """The capacity that the ranks of a group agree on."""
    block = case.ep * case.etp
    layer, first = build(case), rank // block * block
    inputs = [inputs_of(case, other) for other in range(first, first + block)]
    routings = [layer.router(each.x_TD, None, each.mask_T) for each in inputs]
    assignments = [routing.assignment for routing in routings]
    # a rank asks for no more rows than it has assignments
    asked = [min(case.capacity.admit(each).capacity or 0, len(each.token_N)) for each in assignments]
    return max(asked)


@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)
def test_the_host_waits_once_for_a_ragged_layer_and_never_for_a_padded_one(case: LayerCase, outcomes: Outcomes) -> None:
    copies = {outcome["host_copies"] for outcome in of_ranks(outcomes, case)}
    stays = case.ep == case.etp == 1 or case.adaptive_r == 0
    assert copies == {0 if case.is_padded or stays else 1}


def test_without_expert_parallelism_a_layer_sends_nothing(outcomes: Outcomes) -> None:
    alone = [outcome for case in LAYERS if case.ep == case.etp == 1 for outcome in of_ranks(outcomes, case)]
    assert alone
    assert all(not outcome["forward"] and not outcome["backward"] for outcome in alone)


@pytest.mark.parametrize("case", TRAININGS, ids=lambda case: case.name)
def test_training_steps_equal_one_process(case: TrainCase, outcomes: Outcomes) -> None:
    assert_trains_like_one_process(case, of_ranks(outcomes, case))


@pytest.mark.parametrize("case", [case for case in TRAININGS if case.moves], ids=lambda case: case.name)
def test_a_move_sends_the_bytes_that_were_shown_before(case: TrainCase, outcomes: Outcomes) -> None:
    found = of_ranks(outcomes, case)
    moves = [step for step in case.moves if step]
    for outcome in found:
        assert len(outcome["sent"]) == len(moves) * len(decoder(case).moe_blocks())
        for shown, counted in outcome["sent"]:
            assert shown == counted
    assert all(sum(size for size, _ in outcome["sent"][0][1].values()) for outcome in found)


@pytest.mark.parametrize("case", SHARDED, ids=lambda case: case.name)
def test_ranks_keep_no_more_than_their_shards(case: TrainCase, outcomes: Outcomes) -> None:
    """Dense weights over the data axis or `zero_size` of it; of experts what their copies have between them."""
    for outcome in of_ranks(outcomes, case):
        for name, (kept, rows, part) in outcome["kept"].items():
            # of a slice without values there are no rows
            assert kept <= math.ceil(rows / shards_of(case, name)) * (part // max(1, rows)), name


def shards_of(case: TrainCase, name: str) -> int:
    """Ranks that have a parameter between them."""
    block, dense = case.ep * case.etp, case.zero_size or case.ranks // case.tp
    return case.ranks // block if ".experts." in name and block * case.tp > 1 else dense


# pieces of unequal length travel in blocks of one size, and losses of a whole step send its tokens ahead once more
SHARING = [case for case in TRAININGS if case.sequence_parallel and not case.pieces and case.losses == PLAIN.losses]


@pytest.mark.parametrize("case", SHARING, ids=lambda case: case.name)
def test_shared_layers_send_what_the_planner_says(case: TrainCase, outcomes: Outcomes) -> None:
    found = of_ranks(outcomes, case)
    tokens = sum(batch.tokens_BS.numel() for step in range(case.steps) for batch in texts(case, step)[0])
    # each rank has the network beside experts whole, and an expert's slices are no dense layer's
    shape = replace(SHAPES["mixtral-8x7b"], num_layers=3, dim=16, num_experts=8, dense_first=1, shared_hidden=0)
    strategy = replace(case.strategy, precision="fp32", ep=1, etp=1, adaptive_r=-1)
    step = Step(
        shape=shape,
        strategy=strategy.check(case.ranks, num_experts=8),
        devices_per_node=case.local,
        tokens=float(tokens),
        micro_batches=case.steps * case.accumulate,
    )
    # without products that hide it nothing is regathered: what was gathered is kept
    parts = [part for part in tensor_volume(step) if case.tp_overlap > 1 or part.name != "sp regather"]
    want = case.ranks * sum(part.total_bytes for part in parts) * case.dtype.itemsize / 4
    size, messages = (sum(column) for column in zip(*(outcome["tensor"] for outcome in found), strict=True))
    assert size == pytest.approx(want, rel=1e-12)
    # torch's operators take each rank's rows for one chunk
    chunks = case.tp_overlap if case.symmetric else 1
    assert messages * chunks == pytest.approx(case.ranks * sum(part.messages for part in parts), rel=1e-12)


@pytest.mark.parametrize("case", [case for case in TRAININGS if case.in_parts], ids=lambda case: case.name)
def test_a_model_made_in_parts_is_whole_nowhere(case: TrainCase, outcomes: Outcomes) -> None:
    """A rank holds its own parts and beside them one module whole, in float32 as it is drawn; or before, one block."""
    model = decoder(case)
    bytes_of = {name: 4 * sum(each.numel() for each in module.parameters()) for name, module in model.named_modules()}
    one = max(4 * sum(each.numel() for each in module.parameters(recurse=False)) for module in model.modules())
    block = max(size for name, size in bytes_of.items() if name.startswith("blocks.") and name.count(".") == 1)
    for outcome in of_ranks(outcomes, case):
        own = case.dtype.itemsize * sum(kept for kept, *_ in outcome["kept"].values())
        # what is added to draw and to cut are numbers, not tensors of weights
        assert own < outcome["held"] <= max(own + one, block) + ROOM, (own, one, block)


SUMMING = [case for case in SHARDED if not case.moves and case.losses == PLAIN.losses]


@pytest.mark.parametrize("case", SUMMING, ids=lambda case: case.name)
def test_shards_send_what_the_planner_says(case: TrainCase, outcomes: Outcomes) -> None:
    """Rows are padded to a multiple of ranks; the root, which is kept from forward to backward, is gathered once."""
    passes = case.steps * case.accumulate
    sums = case.steps if case.zero_sum == "step" else passes
    strategy = replace(case.strategy, precision="fp32")
    for outcome in of_ranks(outcomes, case):
        want: dict[str, list[float]] = {}
        for name, (_, rows, part) in outcome["kept"].items():
            shards, module = shards_of(case, name), wrapped(case, name)
            if shards == 1:
                continue
            padded = math.ceil(rows / shards) * shards * (part // max(1, rows)) * case.dtype.itemsize / 4
            alike = shards if module.endswith("experts") else case.ranks // case.tp
            size = 0 if module.endswith("experts") else case.zero_size
            found = {each.name: each for each in reductions(replace(strategy, zero_size=size), line(alike), padded)}
            gathered, summed = found["parameter all-gather"], found["gradient reduce-scatter"]
            sent = want.setdefault(module, [0.0, 0.0, 0.0])
            sent[0] += passes * (1 if module == "the model" else gathered.calls) * gathered.traffic.intra_bytes
            sent[1] += sums * summed.traffic.intra_bytes
            sent[2] += case.steps * found["shard all-reduce"].traffic.intra_bytes
        assert outcome["shards"] == {module: tuple(sent) for module, sent in want.items()}


def line(ranks: int) -> Mesh:
    return Mesh(nodes=1, local=ranks)


def wrapped(case: TrainCase, name: str) -> str:
    """The module that gathers a parameter."""
    block = case.ep * case.etp
    if ".ffn.experts." in name and block * case.tp > 1:
        return name.rpartition(".")[0]
    return ".".join(name.split(".")[:2]) if name.startswith("blocks.") else "the model"


def test_a_tuner_decides_alike_on_all_ranks_and_keeps_what_it_learned(outcomes: Outcomes) -> None:
    found = [outcome["tuned"] for outcome in outcomes]
    # 8 experts on 4 ranks: whole ones, two on each
    assert {each["layout"] for each in found} == {(4, 1)}
    assert all(each["taken"] == found[0]["taken"] for each in found)
    assert len(set(found[0]["taken"])) > 2, "nothing else was tried"
    assert {each["text"] for each in found} == {found[0]["text"]}, "the slowest rank decides for all"
    assert all(each["read_again"] and each["warm"] for each in found)


def test_random_passes_with_idle_ranks_never_hang_and_equal_one_process(outcomes: Outcomes) -> None:
    for outcome in outcomes:
        assert max(outcome["random"].values()) <= tolerance(torch.float64)


@pytest.mark.exhaustive
def test_five_hundred_random_passes_never_hang_and_equal_one_process(tmp_path: Path) -> None:
    spawn(run_many, 4, tmp_path)
    for rank in range(4):
        assert max(torch.load(tmp_path / f"rank-{rank}.pt").values()) <= tolerance(torch.float64)


def test_a_weight_that_is_not_the_same_everywhere_is_named(outcomes: Outcomes) -> None:
    said = [outcome["disagreement"]["said"].split("; ") for outcome in outcomes]
    # ranks 1 and 3 hold the same experts
    assert [text[0].startswith("nothing") for text in said] == [True, False, True, False]
    assert "rank 1: experts.up_EDG is not the same on all ranks" in said[1][0]
    assert all(f"rank {rank}: router.score.weight_ED is not the same" in text[1] for rank, text in enumerate(said))


def test_a_rank_whose_peer_is_gone_says_which_layer_waited_for_whom(outcomes: Outcomes) -> None:
    said = outcomes[0]["alone"]["said"]
    assert "rank 0: the all-gather of counts of the layer with ranks [0, 1] failed" in said, said


@pytest.mark.parametrize("culprit", STALLED)
def test_a_rank_that_waits_says_for_whom_where_and_in_which_step(culprit: int, outcomes: Outcomes) -> None:
    for rank, outcome in enumerate(outcomes):
        mine = [text for text in outcome["stalls"]["said"] if f"in step {7 + culprit}, in the" in text]
        if rank == culprit:
            assert not mine, mine
            continue
        assert len(mine) == 1, outcome["stalls"]
        assert "in the all-gather of counts of the layer: " in mine[0]
        assert f"rank {culprit} is not there yet: it is in step {7 + culprit}, after the agreement" in mine[0]


def test_the_steps_are_clipped(outcomes: Outcomes) -> None:
    norms = [float(outcome["results"][0][2]) for case in TRAININGS for outcome in of_ranks(outcomes, case)]
    assert min(norms) > MAX_NORM
