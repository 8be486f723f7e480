"""Other systems as peers of `turnout bench layer`: the same layer, named where it is not, and where it is absent."""

import json
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from turnout.bench import layer, layer_fit, layer_others, layer_peers
from turnout.bench.layer_sorted import Sorted
from turnout.bench.routers import Shape
from turnout.cli import process

SMALL = Shape(tokens=48, dim=16, hidden=8, experts=8, k=2, seq_len=12)
INSTALLED = [name for name in layer_others.OTHERS if name != "tutel"]  # which no test can install
CASES = [("gelu", 2), ("swiglu", 3), ("gelu", 1)]


def built(name: str, shape: Shape, choices_TK: Tensor | None = None) -> nn.Module:
    library = layer_others.OTHERS[name].library
    if library:
        pytest.importorskip(library, reason=f"{library} is not installed: make peers")
    refused = layer_fit.other_refusals(shape, torch.float32, skew=0.0)[name]
    if refused:
        pytest.skip(f"{name}: {refused}")
    forward, _ = layer_peers.forward_of(name, shape, choices_TK, torch.float32)
    assert isinstance(forward, nn.Module)
    return forward


def experts_of(name: str, module: nn.Module) -> list[Callable[[Tensor], Tensor]]:
    if not isinstance(module, Sorted):
        where = {"deepspeed": "layer.experts.deepspeed_experts", "st-moe-pytorch": "layer.experts.experts"}[name]
        return list(module.get_submodule(where).children())

    def network(up_GD: Tensor, down_DF: Tensor) -> Callable[[Tensor], Tensor]:
        def run(x_TD: Tensor) -> Tensor:
            up_TG = x_TD @ up_GD.t()
            if not module.gated:
                return F.gelu(up_TG) @ down_DF.t()
            half = up_TG.shape[1] // 2
            return (F.silu(up_TG[:, :half]) * up_TG[:, half:]) @ down_DF.t()

        return run

    return [network(*weights) for weights in zip(module.up_EGD, module.down_EDF, strict=True)]


def weights_of(shape: Shape, x_TD: Tensor, choices_TK: Tensor | None) -> Tensor:
    """(T, E): k of the softmax, of sum 1 if there are several; or all alike."""
    if choices_TK is not None:
        return torch.zeros(shape.tokens, shape.experts).scatter(1, choices_TK, 1 / shape.k)
    scores_TE = (x_TD @ layer_peers.router_weight(shape).t()).softmax(dim=1)
    weight_TK, index_TK = scores_TE.topk(shape.k, dim=1)
    if shape.k > 1:
        weight_TK = weight_TK / weight_TK.sum(dim=1, keepdim=True)
    return torch.zeros_like(scores_TE).scatter(1, index_TK, weight_TK)


@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")
@pytest.mark.parametrize(("expert", "k"), CASES)
@pytest.mark.parametrize("name", INSTALLED)
def test_a_peer_computes_all_choices_of_every_token_and_drops_none(name: str, expert: str, k: int) -> None:
    shape = replace(SMALL, expert=expert, k=k)
    module = built(name, shape)
    x_TD, y_grad_TD = layer_peers.batch(shape, torch.float32)
    x_TD.requires_grad_()
    y_TD = module(x_TD)
    y_TD.backward(y_grad_TD)
    got = {"y": y_TD.detach(), "x.grad": x_TD.grad}
    x_TD.grad = None
    each_ETD = torch.stack([expert(x_TD) for expert in experts_of(name, module)])
    want_TD = torch.einsum("etd,te->td", each_ETD, weights_of(shape, x_TD, None))
    want_TD.backward(y_grad_TD)
    torch.testing.assert_close(got["y"], want_TD.detach(), rtol=1e-5, atol=1e-6)
    # of st-moe-pytorch's dispatch the router has a gradient too, straight through a step
    if name != "st-moe-pytorch":
        torch.testing.assert_close(got["x.grad"], x_TD.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("expert", ["gelu", "swiglu"])
@pytest.mark.parametrize("name", INSTALLED)
def test_a_peer_has_as_many_parameters_as_ours(name: str, expert: str) -> None:
    shape = replace(SMALL, expert=expert)
    built(name, shape)
    _, theirs = layer_peers.forward_of(name, shape, None, torch.float32)
    _, ours = layer_peers.forward_of("turnout-loop", shape, None, torch.float32)
    assert sum(weight.numel() for weight in theirs) == sum(weight.numel() for weight in ours)


@pytest.mark.parametrize("name", ["sort-grouped_mm", "sort-mm"])
def test_sorting_takes_given_experts_and_trains_all_weights_of_experts(name: str) -> None:
    choices_TK = layer.skewed(SMALL, 3.0)
    module = built(name, SMALL, choices_TK)
    x_TD, y_grad_TD = layer_peers.batch(SMALL, torch.float32)
    y_TD = module(x_TD)
    each_ETD = torch.stack([expert(x_TD) for expert in experts_of(name, module)])
    want_TD = torch.einsum("etd,te->td", each_ETD, weights_of(SMALL, x_TD, choices_TK))
    torch.testing.assert_close(y_TD, want_TD, rtol=1e-5, atol=1e-6)
    y_TD.backward(y_grad_TD)
    trained = {weight_name for weight_name, weight in module.named_parameters() if weight.grad is not None}
    assert trained == {"up_EGD", "down_EDF"}


def test_sorting_leaves_an_expert_without_rows_alone() -> None:
    choices_TK = torch.tensor([[1, 2]]).expand(SMALL.tokens, 2)
    for name in ("sort-grouped_mm", "sort-mm"):
        module = built(name, SMALL, choices_TK)
        x_TD, y_grad_TD = layer_peers.batch(SMALL, torch.float32)
        module(x_TD).backward(y_grad_TD)
        grad_EGD = module.get_parameter("up_EGD").grad
        assert grad_EGD is not None
        assert [bool(grad_GD.any()) for grad_GD in grad_EGD] == [False, True, True] + [False] * 5


def test_room_is_counted_over_the_fullest_sequence() -> None:
    shape = replace(SMALL, tokens=4, seq_len=2, k=1)
    assert layer_others.most_of_a_sequence(shape, torch.tensor([[0], [1], [1], [1]])) == 2
    assert layer_others.most_of_a_sequence(shape, torch.tensor([[0], [1], [1], [0]])) == 1


REFUSALS = {
    "st-moe-pytorch, one choice": ("st-moe-pytorch", {"k": 1}, torch.float32, 0.0, "two choices or more"),
    "st-moe-pytorch, bfloat16": ("st-moe-pytorch", {}, torch.bfloat16, 0.0, "masks are float32"),
    "deepspeed, given experts": ("deepspeed", {}, torch.float32, 3.0, "cannot be given"),
    "tutel, a gate": ("tutel", {}, torch.float32, 0.0, "no gate"),
    "torchtitan": ("torchtitan", {}, torch.float32, 0.0, "bfloat16 whatever the dtype.*sort-grouped_mm"),
    "batched_mm, many": ("transformers-batched_mm", {}, torch.float32, 0.0, "where it is named"),
    "batched_mm, too many": ("transformers-batched_mm", {"tokens": 12 * 10**9}, torch.float32, 0.0, "more than half"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_why_a_peer_does_not_run_is_said(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, changes, dtype, skew, words = REFUSALS[case]
    monkeypatch.setattr(layer_fit, "find_spec", lambda _: object())
    refused = layer_fit.other_refusals(replace(SMALL, **changes), dtype, skew=skew)
    assert re.search(words, refused[name]), refused
    assert not refused["sort-mm"]


def test_batched_mm_runs_for_many_tokens_where_it_is_named_and_fits() -> None:
    refused = layer_fit.other_refusals(SMALL, torch.float32, skew=0.0, asked=("transformers-batched_mm",))
    assert "gathers" not in refused["transformers-batched_mm"]


def test_a_peer_that_is_not_installed_is_named_and_left_out(turnout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(layer.SHAPES, "a", replace(SMALL, expert="gelu", k=1))
    absent = ("deepspeed", "transformers", "tutel")
    monkeypatch.setattr(layer_fit, "find_spec", lambda name: None if name in absent else name)
    args = ("bench", "layer", "--shapes", "a", "--modes", "train", "--rounds", "1", "--warmup", "0")
    result = turnout(*args, "--allocator", "default", "--json")
    assert result.code == 0, result.err
    said = " ".join(result.err.split())
    assert "deepspeed is not measured in a: not installed: pip install 'turnout[bench]'" in said
    assert "transformers-eager is not measured in a: not installed: pip install 'turnout[bench]'" in said
    found = json.loads(result.out.splitlines()[-1], parse_constant=pytest.fail)
    peers = {row["peer"] for row in found["rows"]}
    assert {"sort-grouped_mm", "sort-mm", "dense-ffn"} <= peers
    assert not {"deepspeed", "transformers-eager", "st-moe-pytorch"} & peers
    assert {one["peer"] for one in found["left_out"]} >= {"deepspeed", "st-moe-pytorch", "tutel", "torchtitan"}
    asked = turnout(*args, "--peers", "deepspeed")
    assert asked.code == 2
    assert "'deepspeed': not installed: pip install 'turnout[bench]'" in " ".join(asked.err.split())


@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")
def test_rows_name_what_is_not_alike_and_how_many_times_as_fast_ours_are(
    turnout, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in ("deepspeed", "transformers"):
        pytest.importorskip(library, reason=f"{library} is not installed: make peers")
    monkeypatch.setitem(layer.SHAPES, "c", replace(SMALL, expert="gelu", k=1))
    peers = "turnout-loop,turnout-padded_bmm,deepspeed,transformers-eager,sort-mm,dense-ffn"
    result = turnout(
        "bench", "layer", "--shapes", "c", "--modes", "forward", "--peers", peers, "--rounds", "3", "--json"
    )
    assert result.code == 0, result.err
    assert "not alike: deepspeed pads every expert's rows" in " ".join(result.err.split())
    rows = {row["peer"]: row for row in json.loads(result.out.splitlines()[-1])["rows"]}
    assert rows["sort-mm"]["differences"] == rows["turnout-loop"]["differences"] == []
    assert rows["transformers-eager"]["differences"] == ["weighs a token's one choice by 1, not by its probability"]
    assert set(rows["deepspeed"]["speedup_of"]) == {"turnout-loop", "turnout-padded_bmm"}
    assert rows["turnout-loop"]["speedup_of"]["turnout-loop"] == [1.0, 1.0, 1.0]
    ours, theirs = rows["turnout-loop"], rows["deepspeed"]
    median, low, high = theirs["speedup_of"]["turnout-loop"]
    assert low <= median <= high
    assert theirs["ms_min"] / ours["ms_max"] <= median <= theirs["ms_max"] / ours["ms_min"]


@pytest.mark.parametrize(("allocator", "asked"), [("tuned", 1), ("default", 0)])
def test_the_allocator_is_left_as_it_is_where_that_is_asked_for(
    allocator: str, asked: int, turnout, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(process, "keep_memory", lambda: not calls.append(1))
    monkeypatch.setitem(layer.SHAPES, "a", SMALL)
    args = ("--shapes", "a", "--modes", "forward", "--peers", "sort-mm", "--rounds", "1", "--warmup", "0", "--json")
    result = turnout("bench", "layer", *args, "--allocator", allocator)
    assert result.code == 0, result.err
    assert len(calls) == asked
    words = "keeps freed memory" if asked else "as it is"
    assert words in json.loads(result.out.splitlines()[-1])["process"]


def test_an_unknown_allocator_is_one_clear_error(turnout) -> None:
    result = turnout("bench", "layer", "--shapes", "a", "--allocator", "jemalloc")
    assert result.code == 2
    assert "unknown allocator 'jemalloc'; available: tuned, default" in " ".join(result.err.split())
