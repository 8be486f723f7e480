"""Benchmarks: fair turns, honest ratios, differences that are named, numbers that are there or null."""

import functools
import json
import math
import operator
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.contracts.cases import takers
from turnout import reference as oracle
from turnout.bench import dispatch, dispatch_ways, generate, generate_peers, layer, layer_peers, routers, train_step
from turnout.bench.gemms import products
from turnout.bench.layer_gate import Gate
from turnout.bench.memory import call_memory, peak_mib
from turnout.bench.mixtral import differences, mixtral, routed_like_mixtral
from turnout.bench.race import Timing, race, ratio
from turnout.bench.routers import Shape
from turnout.contracts import RouterConfig
from turnout.errors import ConfigError, TurnoutError
from turnout.experts import FFNExperts, PaddedBMM
from turnout.experts.fused_int8 import trusted_int8
from turnout.layers import MoE, MoEConfig
from turnout.layers.attention import AttentionConfig
from turnout.losses import LoadBalance
from turnout.models import Decoder, ModelConfig
from turnout.models.presets import PRESETS
from turnout.models.size import matmul_flops_per_token
from turnout.routers import TopK
from turnout.tensors import Padded, Rows
from turnout.train.recipes import load_recipe
from turnout.train.step import StepResult

FUSED = "turnout-fused_cpu"
SMALL = Shape(tokens=48, dim=16, hidden=8, experts=8, k=2, seq_len=12)


def test_a_race_runs_everybody_once_a_round_in_an_order_that_changes_and_can_be_repeated() -> None:
    def orders() -> list[str]:
        order: list[str] = []
        race({name: lambda name=name: order.append(name) for name in "abc"}, rounds=11, warmup=1)
        return ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]

    rounds = orders()
    assert len(rounds) == 12
    assert all(sorted(one) == list("abc") for one in rounds)
    # nobody keeps the same one before it
    assert {both for one in rounds for both in (one[:2], one[1:])} == {"ab", "ba", "ac", "ca", "bc", "cb"}
    assert rounds == orders()


def test_a_race_counts_no_round_of_warming_up() -> None:
    calls = iter([0.05, 0.05, 0.0, 0.0, 0.0])
    timing = race({"cold": lambda: time.sleep(next(calls))}, rounds=3, warmup=2)["cold"]
    assert len(timing.ms) == 3
    # the median: one slow wake-up is nobody's fault
    assert sorted(timing.ms)[1] < 40


def test_a_race_measures_time() -> None:
    timings = race({"short": lambda: time.sleep(0.01), "long": lambda: time.sleep(0.05)}, rounds=3, warmup=0)
    assert min(timings["short"].ms) >= 10
    assert min(timings["long"].ms) >= 50


def test_a_ratio_is_taken_round_by_round_so_that_a_slow_round_is_slow_for_both() -> None:
    ours, theirs = Timing(ms=(10.0, 20.0, 90.0, 11.0)), Timing(ms=(20.0, 40.0, 180.0, 11.0))
    found = ratio(theirs, ours)
    # that of the medians would be 30 / 15.5
    assert (found.low, found.median, found.high) == (1.75, 2.0, 2.0)
    alone = ratio(Timing(ms=(6.0,)), Timing(ms=(4.0,)))
    assert (alone.low, alone.median, alone.high) == (1.5, 1.5, 1.5)


def test_a_case_gives_a_row_a_peer_and_null_for_what_was_not_measured(turnout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_step, "peak_mib", lambda steps: 512.0 if steps() is None else None)
    peers = "turnout,gemm-limit"
    result = turnout(
        "bench", "train-step", "--recipe", "smoke", "--rounds", "1", "--warmup", "0", "--peers", peers, "--json"
    )
    assert result.code == 0, result.err
    rows = {row["peer"]: row for row in json.loads(result.out.splitlines()[-1], parse_constant=pytest.fail)["rows"]}
    ours, limit = rows["turnout"], rows["gemm-limit"]
    assert ours["speedup_of_turnout"] == 1.0
    assert ours["ratio_to_dense"] is None
    assert ours["ratio_to_dense_quartiles"] is None
    assert limit["peak_mib"] is None
    assert ours["peak_mib"] == 512
    assert ours["ratio_to_limit"] == pytest.approx(limit["ms_median"] / ours["ms_median"])
    assert ours["ratio_to_limit_quartiles"] == [ours["ratio_to_limit"]] * 2


def test_what_is_not_alike_is_named_beside_a_row_of_our_model_routed_like_mixtral(turnout) -> None:
    small = ["model.dim=16", "model.num_layers=1", "loop.batch_size=1", "loop.seq_len=16", "loop.accumulate=4"]
    recipe, dense = load_recipe("tiny", small), load_recipe("tiny-dense", small)
    result = train_step.run(recipe, dense, rounds=1, warmup=0, memory=False)
    rows = {row["peer"]: row for row in result["rows"]}
    assert list(rows) == list(train_step.PEERS)
    assert rows["turnout"]["routing"] == "hash(k=1) + no loss"
    assert rows["turnout-mixtral-routing"]["routing"] == "topk(k=2) + load_balance"
    assert rows["transformers-grouped_mm"]["routing"] == "topk(k=2) + load_balance"
    assert rows["dense-twin"]["routing"] is None
    assert [text.partition(":")[0] for text in rows["transformers-eager"]["differences"]] == [
        "router",
        "experts",
        "keys",
        "auxiliary losses",
    ]
    assert rows["turnout"]["differences"] == []
    assert rows["transformers-eager"]["speedup_of_turnout_mixtral_routing"] > 0
    assert result["notes"] == ["loop.accumulate=4: everybody takes one micro-batch a step"]


def test_a_person_is_told_what_is_not_alike(turnout) -> None:
    peers = "turnout,turnout-mixtral-routing,transformers-grouped_mm"
    result = turnout("bench", "train-step", "--rounds", "1", "--warmup", "0", "--peers", peers, "--no-memory")
    assert result.code == 0, result.err
    words = " ".join(result.out.split())
    assert "turnout routes by hash(k=1) + no loss" in words
    assert "not alike: router: hash(k=1) in the recipe, a learned softmax top-2" in words
    assert "not alike: auxiliary losses: none in the recipe, load_balance in Mixtral" in words


DIFFERENCES = {
    "as Mixtral": ([], []),
    "values alone": (["model.moe.router.scale=2.0", "model.moe.router.init_std=0.1"], []),
    "full softmax": (["model.moe.router.renormalize=false"], ["router: topk(k=2, renormalize=False) in the recipe"]),
    "another router": (["model.moe.router.name=sinkhorn"], ["router: sinkhorn(k=1) in the recipe"]),
    "no loss": (["model.moe.losses=[]"], ["auxiliary losses: none in the recipe, load_balance in Mixtral"]),
    "a shared expert as wide as two": (
        ["model.moe.shared_hidden=128"],
        [
            "router: topk(k=2) in the recipe, a learned softmax top-4",
            "experts: a shared one as wide as 2 in the recipe",
        ],
    ),
    "smeared keys": (["model.attention.smear_keys=true"], ["keys: smeared in the recipe, plain in Mixtral"]),
    "another loss": (
        ['model.moe.losses=[{name="load_balance", scope="sequence"}, {name="router_z"}]'],
        ["auxiliary losses: load_balance(scope=sequence), router_z in the recipe"],
    ),
}


@pytest.mark.parametrize("case", DIFFERENCES)
def test_differences_in_routing_are_named(case: str) -> None:
    changes, starts = DIFFERENCES[case]
    found = differences(load_recipe("smoke", changes))
    assert [text.startswith(start) for text, start in zip(found, starts, strict=True)] == [True] * len(starts)


REFUSED = {
    "gelu experts": (["model.moe.expert=gelu"], "model.moe.expert is gelu, Mixtral's swiglu"),
    "biases": (["model.moe.bias=true"], "model.moe.bias is True, Mixtral's False"),
    "shared expert": (["model.moe.shared_hidden=16"], "model.moe.shared_hidden is 16, Mixtral's 0"),
    "latent": (["model.moe.latent_dim=16"], "model.moe.latent_dim is 16"),
    "capacity": (
        ["model.moe.capacity={name='fixed', in_decoder='allow'}"],
        r"model.moe.capacity is FixedCapacity\(.*Mixtral's Dropless",
    ),
    "a dense block": (["model.dense_first=1"], "the number of blocks with experts is 1, Mixtral's 2"),
    "query norm": (["model.attention.qk_norm=head"], "model.attention.qk_norm is head, Mixtral's none"),
    "attention biases": (["model.attention.bias=true"], "model.attention.bias is True"),
    "sinks": (["model.attention.sinks=true"], "model.attention.sinks is True"),
    "window": (["model.attention.window=16"], "model.attention.window is 16, Mixtral's 0"),
    "latent attention": (["model.attention.name=mla"], "model.attention is mla, Mixtral's gqa"),
    "positions": (["model.positions=learned"], "model.positions is learned, Mixtral's rope"),
    "norm": (["model.norm=layer"], "model.norm is layer, Mixtral's rms"),
    "experts by chance": (["model.moe.router.name=gshard"], "experts of a token is left to the router gshard"),
    "several at once": (["model.moe.bias=true", "model.norm=layer"], "model.norm is layer.*; model.moe.bias is True"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_recipe_that_mixtral_cannot_be_is_refused(case: str) -> None:
    changes, text = REFUSED[case]
    recipe = load_recipe("smoke", changes)
    with pytest.raises(ConfigError, match=text):
        train_step.check_peers(recipe, recipe, ("turnout", "transformers-eager"))
    train_step.check_peers(recipe, recipe, ("turnout", "turnout-mixtral-routing", "gemm-limit"))


def test_a_window_as_long_as_the_sequence_is_none() -> None:
    recipe = load_recipe("smoke", ["model.attention.window=64"])
    train_step.check_peers(recipe, recipe, ("transformers-eager",))


TWINS = {
    "experts": ("smoke", [], r"--dense 'smoke' has experts; the twin of 'tiny' must have none"),
    "vocabulary": (
        "tiny-dense",
        ["model.vocab_size=300", "data.vocab_size=300"],
        r"--dense 'tiny-dense' has model.vocab_size=300; the batch of 'tiny' needs at least 4096",
    ),
    "length": (
        "tiny-dense",
        ["model.max_seq_len=64", "loop.seq_len=64"],
        r"model.max_seq_len=64; the batch of 'tiny' needs at least 256",
    ),
}


@pytest.mark.parametrize("case", TWINS)
def test_a_twin_that_cannot_take_the_batch_is_refused(case: str) -> None:
    name, changes, text = TWINS[case]
    with pytest.raises(ConfigError, match=text):
        train_step.check_peers(load_recipe("tiny"), load_recipe(name, changes), ("dense-twin",))


def test_a_recipe_without_experts_and_an_unknown_peer_are_refused() -> None:
    dense = load_recipe("tiny-dense")
    with pytest.raises(ConfigError, match=r"the recipe 'tiny-dense' has no experts"):
        train_step.check_peers(dense, dense, ("turnout",))
    with pytest.raises(ConfigError, match=r"unknown peer 'tutel'; available: turnout, turnout-mixtral-routing, "):
        train_step.check_peers(load_recipe("tiny"), dense, ("tutel",))


NOTES = {
    "nothing": ([], ""),
    "accumulation": (["loop.accumulate=2"], "loop.accumulate=2: everybody takes one micro-batch a step"),
    "precision": (
        ["loop.precision=bfloat16"],
        "loop.precision='bfloat16', here bfloat16: everybody computes in float32",
    ),
    "compiled": (["loop.compile=true"], "loop.compile=true: nobody is compiled"),
    "device": (["loop.device=cuda"], "loop.device='cuda': everybody computes on the CPU"),
    "unequal twin": (["model.num_layers=8"], "dense-twin: a token of 'tiny-dense' takes 0."),
}


@pytest.mark.parametrize("case", NOTES)
def test_what_is_not_measured_as_the_recipe_has_it_is_noted(case: str) -> None:
    changes, start = NOTES[case]
    recipe = load_recipe("tiny", ["loop.precision=float32", *changes])
    found = train_step.notes(recipe, load_recipe("tiny-dense"), train_step.PEERS)
    assert len(found) == bool(start)
    assert "".join(found).startswith(start)
    assert not any("dense-twin" in text for text in train_step.notes(recipe, load_recipe("tiny-dense"), ("turnout",)))


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("peer", ["turnout", "turnout-mixtral-routing"])
def test_our_contestants_take_the_training_loops_own_step(
    peer: str, clip: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    smoke = load_recipe("smoke", [f"optimizer.clip={clip}", "model.moe.router.name=hash", "model.moe.losses=[]"])
    built: list[Decoder] = []
    monkeypatch.setattr(train_step, "Decoder", lambda config: built.append(Decoder(config)) or built[-1])
    step = train_step.contestant(peer, smoke, smoke)
    (model,) = built
    before = model.embedding_VD.detach().clone()
    result = step()
    assert isinstance(result, StepResult)
    assert math.isfinite(result.loss)
    assert result.grad_norm > 0
    assert not torch.equal(model.embedding_VD, before)
    assert set(result.aux) == ({"load_balance"} if peer == "turnout-mixtral-routing" else set())


def test_ours_and_transformers_mixtral_route_alike() -> None:
    pytest.importorskip("transformers")
    model = routed_like_mixtral(load_recipe("tiny").model)
    assert model.moe is not None
    theirs = mixtral(model, "grouped_mm").config
    assert model.moe.router == TopK(k=theirs.num_experts_per_tok)
    assert model.moe.losses == (LoadBalance(coefficient=theirs.router_aux_loss_coef),)
    assert theirs.output_router_logits
    assert sum(p.numel() for p in mixtral(model, "eager").parameters()) == sum(
        p.numel() for p in Decoder(model).parameters()
    )


@pytest.mark.parametrize(("name", "calls"), [("transformers-grouped_mm", 2), ("transformers-eager", 0)])
def test_transformers_runs_the_experts_the_row_names(name: str, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    moe = pytest.importorskip("transformers.integrations.moe")
    original, seen = moe.grouped_mm_experts_forward, []

    def counted(*args, **kwargs):
        seen.append(1)
        return original(*args, **kwargs)

    monkeypatch.setitem(moe.ALL_EXPERTS_FUNCTIONS._global_mapping, "grouped_mm", counted)
    smoke = load_recipe("smoke")
    train_step.contestant(name, smoke, smoke)()
    assert len(seen) == calls


@pytest.mark.parametrize("preset", PRESETS.names())
def test_the_limit_has_every_product_with_a_weight_and_no_other(preset: str) -> None:
    config = PRESETS[preset]()
    with torch.device("meta"):
        flops = matmul_flops_per_token(Decoder(config))
    assert sum(2 * inner * outer for inner, outer in products(config)) == flops


def test_the_limit_of_a_router_without_weights_has_no_product_for_it() -> None:
    tiny = load_recipe("tiny").model
    assert (tiny.dim, 32) not in products(tiny)
    assert products(routed_like_mixtral(tiny)).count((tiny.dim, 32)) == tiny.num_layers


def test_every_router_of_the_table_and_soft_moe_has_a_row(turnout) -> None:
    sizes = ["--tokens", "48", "--dim", "16", "--hidden", "8", "--experts", "8", "--k", "2", "--seq-len", "12"]
    result = turnout("bench", "routers", "--shapes", "b", *sizes, "--rounds", "2", "--warmup", "0", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out.splitlines()[-1], parse_constant=pytest.fail)
    rows = {row["peer"]: row for row in found["rows"]}
    assert list(rows) == [*RouterConfig.TABLE.names(), "soft_moe"]
    assert found["not_built"] == []
    assert {name for name, row in rows.items() if not row["causal"]} == {"expert_choice", "soft_moe"}
    assert rows["switch"]["compared_with"] == "softmax top-1"
    assert rows["sinkhorn"]["compared_with"] == "softmax top-2"
    assert rows["deepseek_v3"]["routing"] == "deepseek_v3(k=2, groups=4, top_groups=2, scale=1.0) + no loss"
    for row in rows.values():
        low, high = row["time_over_topk_quartiles"]
        assert 0 < low <= row["time_over_topk"] <= high
    assert "not for decoders, since they see later tokens: expert_choice, soft_moe" in " ".join(result.err.split())


def test_tokens_have_as_many_experts_as_in_softmax_topk_but_where_a_router_decides() -> None:
    torch.manual_seed(0)
    experts = FFNExperts(SMALL.dim, SMALL.hidden, SMALL.experts)
    found, _ = routers.contestants(SMALL, experts)
    sent = {name: one.step() for name, one in found.items()}
    decided_by = {"gshard", "locmoe_plus"}
    assert {n: sent[n] for n in found.keys() - decided_by} == {n: found[n].choices for n in found.keys() - decided_by}
    assert all(0 < sent[name] <= found[name].choices for name in decided_by)


def test_a_shape_that_a_router_cannot_have_is_said_and_the_others_are_measured() -> None:
    shape = Shape(tokens=24, dim=6, hidden=4, experts=7, k=1, seq_len=12)
    found = routers.run([shape], rounds=1, warmup=0)
    refused = {one["peer"]: one["reason"] for one in found["not_built"]}
    assert set(refused) == {"hierarchical", "locmoe", "locmoe_plus"}
    assert "num_experts=7" in refused["hierarchical"]
    compared = {row["peer"]: row["compared_with"] for row in found["rows"]}
    assert set(compared) == {*RouterConfig.TABLE.names(), "soft_moe"} - set(refused)
    assert (compared["topk"], compared["gshard"]) == ("softmax top-1", "softmax top-2")
    # one choice alone has no gradient there: the nearest number that has
    assert compared["deepseek_v3"] == compared["noisy_topk"] == "softmax top-2"
    with pytest.raises(ConfigError, match="num_experts=7"):
        routers.run([shape], names=["hierarchical"], rounds=1, warmup=0)


def test_a_step_trains_the_router_and_the_shared_experts_and_leaves_no_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built: list[MoE] = []
    original = MoE.from_config
    monkeypatch.setattr(MoE, "from_config", lambda dim, config: built.append(original(dim, config)) or built[-1])
    experts = FFNExperts(SMALL.dim, SMALL.hidden, SMALL.experts)
    found, _ = routers.contestants(SMALL, experts, ["topk", "sinkhorn"])
    reached: list[str] = []
    for moe in built:
        assert moe.training
        assert moe.experts is experts
        moe.router.get_parameter("score.weight_ED").register_post_accumulate_grad_hook(
            lambda weight: reached.append("router") if weight.grad.abs().sum() > 0 else None
        )
    experts.up_EDG.register_post_accumulate_grad_hook(lambda _: reached.append("experts"))
    for one in found.values():
        one.step()
    assert sorted(reached) == ["experts", "experts", "router", "router"]
    assert all(parameter.grad is None for moe in built for parameter in moe.parameters())


BAD_USES = {
    "unknown router": (["--routers", "topq"], r"unknown router 'topq'; available: base, .*, topk, soft_moe"),
    "unknown shape": (["--shapes", "a,z"], r"unknown shape 'z'; available: a, b, c"),
    "no shape": (["--shapes", ","], r"unknown shape ''; available: a, b, c"),
    "sequences": (["--shapes", "a", "--seq-len", "100"], r"--seq-len 100 must divide --tokens 4096"),
    "choices": (["--shapes", "a", "--k", "9"], r"--k 9 must be at most --experts 8"),
}


@pytest.mark.parametrize("case", BAD_USES)
def test_bad_use_of_the_router_case_is_one_clear_error(case: str, turnout) -> None:
    args, pattern = BAD_USES[case]
    result = turnout("bench", "routers", *args)
    assert result.code == 2, result
    assert re.search(pattern, " ".join(result.err.split())), result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("verb", [(), ("bench",), ("data",), ("plan",)])
def test_the_help_of_what_only_holds_verbs_has_an_example_that_can_be_typed(verb: tuple[str, ...], turnout) -> None:
    shown = turnout(*verb, "--help")
    assert shown.code == 0
    found = re.search(r"Example: turnout ([a-z -]+\b)", shown.out)
    assert found, shown.out
    words = found.group(1).split()
    assert tuple(words[: len(verb)]) == verb
    # the command it names is there
    command = [*words[: len(verb)], words[len(verb)]]
    assert turnout(*command, "--help").code == 0


def test_no_result_names_a_folder_of_the_machine_it_was_measured_on() -> None:
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    texts = {
        path.name: path.read_text(encoding="utf-8") for path in results.rglob("*") if path.suffix in (".json", ".md")
    }
    assert texts
    assert [name for name, text in texts.items() if re.search(r"[\"\s](/tmp|/home|/work|/root)/", text)] == []


def test_a_child_that_fails_says_why() -> None:
    with pytest.raises(TurnoutError, match="exit code 1: ZeroDivisionError"):
        peak_mib(functools.partial(operator.truediv, 1, 0))


def test_the_peak_is_that_of_a_process_of_its_own() -> None:
    here = np.ones(1 << 26)
    less, more = (peak_mib(functools.partial(operator.mul, b"x", mib << 20)) for mib in (50, 250))
    assert 50 < less < more < here.nbytes / 2**20
    assert more - less == pytest.approx(200, abs=20)


def filled(mib: int) -> None:
    np.ones(mib << 17)


def to_fill() -> Callable[[], object]:
    """Holds 100 MiB, takes 60 for a while in each call, and keeps 30 from the first one on."""
    held, kept = np.ones(100 << 17), []

    def call() -> None:
        kept[:] = kept or [np.ones(30 << 17)]
        filled(60)
        assert held[0] == 1

    return call


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_memory_of_calls_leaves_out_what_was_there_before_them() -> None:
    found = call_memory(to_fill)
    assert found.extra == pytest.approx(90, abs=5)
    assert found.extra_again == pytest.approx(60, abs=5)
    assert found.peak > 190


def test_the_time_of_a_step_is_split_into_shares() -> None:
    recipe, dense = load_recipe("smoke"), load_recipe("tiny-dense")
    result = train_step.run(
        recipe, dense, peers=("turnout", "gemm-limit"), rounds=1, warmup=0, memory=False, split=True
    )
    ours, limit = (row["split"] for row in result["rows"])
    assert limit is None
    assert sum(ours.values()) == pytest.approx(1)
    assert all(ours[part] > 0 for part in ("experts", "attention", "products", "loss", "optimizer"))


def test_one_layer_against_its_peers(turnout, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    for name, expert in (("a", "gelu"), ("b", "swiglu"), ("d1", "swiglu")):
        tokens = 1 if name == "d1" else 48
        monkeypatch.setitem(layer.SHAPES, name, replace(SMALL, tokens=tokens, seq_len=1, expert=expert))
    result = turnout("bench", "layer", "--shapes", "a,b,d1", "--rounds", "2", "--warmup", "0", "--json")
    assert result.code == 0, result.err
    rows = json.loads(result.out.splitlines()[-1], parse_constant=pytest.fail)["rows"]
    found = {(row["shape"]["name"], row["mode"]): set() for row in rows}
    for row in rows:
        found[row["shape"]["name"], row["mode"]].add(row["peer"])
        assert row["ratio_to_limit"] > 0
        assert row["ratio_to_dense"] == 1.0 if row["peer"] == "dense-ffn" else row["ratio_to_dense"] > 0
    ours = {f"turnout-{name}" for name in takers(torch.float32)}
    everybody = ours | {"transformers-grouped_mm", "transformers-eager", "sort-grouped_mm", "sort-mm"}
    libraries = {"deepspeed": "deepspeed", "st-moe-pytorch": "st_moe_pytorch"}
    everybody |= {"dense-ffn", "gemm-limit"} | {peer for peer, library in libraries.items() if find_spec(library)}
    inferring = everybody | (set() if isinstance(trusted_int8(), str) else {"turnout-int8", "turnout-int8-a8"})
    assert found == {
        ("a", "forward"): inferring,
        ("a", "train"): everybody,
        ("b", "forward"): inferring,
        ("b", "train"): everybody,
        ("d1", "forward"): inferring | {"transformers-batched_mm", "read-limit"},
    }


def test_a_layer_of_few_tokens_can_be_asked_for_beside_training_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, tokens in (("a", 48), ("d1", 1)):
        monkeypatch.setitem(layer.SHAPES, name, replace(SMALL, tokens=tokens, seq_len=1))
    rows = layer.run(["a", "d1"], peers=["turnout-loop"], rounds=1, warmup=0)["rows"]
    assert [(row["shape"]["name"], row["mode"]) for row in rows] == [
        ("a", "forward"),
        ("a", "train"),
        ("d1", "forward"),
    ]


def test_times_over_fused_cpu_are_those_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(layer.SHAPES, "a", SMALL)
    if FUSED not in {f"turnout-{name}" for name in takers(torch.float32)}:
        pytest.skip("no C++ compiler here")
    ms = {FUSED: (10.0, 20.0, 90.0), "dense-ffn": (20.0, 60.0, 90.0)}
    monkeypatch.setattr(layer, "race", lambda calls, **_: {name: Timing(ms=ms[name]) for name in calls})
    rows = {row["peer"]: row for row in layer.run(["a"], modes=["forward"], peers=[*ms], rounds=3, warmup=0)["rows"]}
    assert rows["dense-ffn"]["speedup_of"] == {FUSED: (2.0, 1.5, 2.5)}
    assert rows[FUSED]["speedup_of"] == {FUSED: (1.0, 1.0, 1.0)}
    (alone,) = layer.run(["a"], modes=["forward"], peers=["dense-ffn"], rounds=3, warmup=0)["rows"]
    assert alone["speedup_of"] == {}


@pytest.mark.parametrize("shape", ["a", "d1"])
def test_on_a_narrow_screen_rows_keep_their_names_and_their_quartiles(
    shape: str, turnout, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setitem(layer.SHAPES, shape, replace(SMALL, tokens=48 if shape == "a" else 1, seq_len=1))
    result = turnout("bench", "layer", "--shapes", shape, "--modes", "forward", "--rounds", "2", "--json")
    assert result.code == 0, result.err
    lines = result.err.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in result.err
    for row in result.last["rows"]:
        of_it = [line for line in lines if line.split()[:1] == [row["peer"]]]
        assert len(of_it) == 2, row["peer"]
        low, high = row["ratio_to_dense_quartiles"]
        assert f"({low:.2f}-{high:.2f})" in result.err


def _wrong_at(dim: int, change: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """What padded_bmm makes of rows of that width is changed."""
    right = PaddedBMM.run

    def run(self: PaddedBMM, experts: nn.Module, rows: Rows) -> Rows:
        found = right(self, experts, rows)
        assert isinstance(found, Padded)
        return replace(found, x_LCD=change(found.x_LCD)) if found.x_LCD.shape[-1] == dim else found

    monkeypatch.setattr(PaddedBMM, "run", run)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("skew", ["0", "3"])
def test_a_backend_that_is_wrong_at_the_shape_alone_is_not_timed(
    skew: str, dtype: str, turnout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(layer.SHAPES, "a", SMALL)
    use = ["--shapes", "a", "--modes", "forward", "--skew", skew, "--dtype", dtype, "--rounds", "1", "--warmup", "0"]
    _wrong_at(SMALL.dim, torch.zeros_like, monkeypatch)
    result = turnout("bench", "layer", *use, "--peers", "turnout-padded_bmm,turnout-loop")
    assert result.code == 1
    where = rf"T=48 d=16 f=8 E=8 k=2 swiglu, forward, torch\.{dtype}, \d+ threads"
    assert re.search(rf"red gate: turnout-padded_bmm at {where}: the output is off loop's by 1\.0e\+00", result.message)
    assert "median ms" not in result.out
    # the same of another shape, and the others of this one
    assert turnout("bench", "layer", *use, "--peers", "turnout-grouped_mm,turnout-loop").code == 0
    monkeypatch.setitem(layer.SHAPES, "a", replace(SMALL, dim=24))
    assert turnout("bench", "layer", *use, "--peers", "turnout-padded_bmm").code == 0


def test_a_backend_whose_gradients_alone_are_wrong_at_the_shape_is_not_timed(
    turnout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(layer.SHAPES, "a", SMALL)
    use = ["--shapes", "a", "--peers", "turnout-padded_bmm", "--rounds", "1", "--warmup", "0"]
    # 2y - y, through which half of the gradient does not come back
    _wrong_at(SMALL.dim, lambda y: 2 * y - y.detach(), monkeypatch)
    assert turnout("bench", "layer", *use, "--modes", "forward").code == 0
    result = turnout("bench", "layer", *use, "--modes", "train")
    assert result.code == 1
    assert re.search(r"red gate: turnout-padded_bmm at .*: the gradient of .* is off loop's", result.message)


@pytest.mark.parametrize("mode", ["forward", "train"])
def test_answers_that_are_nan_or_slightly_off_are_wrong(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(layer.SHAPES, "a", SMALL)
    settings = {"shape": "a", "mode": mode, "dtype": "float32", "skew": 0.0}
    for change in (lambda y: y * math.nan, lambda y: y * (1 + 3e-5)):
        with monkeypatch.context() as patch:
            _wrong_at(SMALL.dim, change, patch)
            gate = Gate(SMALL, torch.float32, train=mode == "train")
            with pytest.raises(TurnoutError, match="red gate: turnout-padded_bmm"):
                layer.contestant("turnout-padded_bmm", **settings, gate=gate)


@pytest.mark.parametrize("expert", ["gelu", "swiglu"])
@pytest.mark.parametrize("mode", ["forward", "train"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_block_is_judged_by_our_loop_on_its_weights(
    dtype: str, mode: str, expert: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    moe = pytest.importorskip("transformers.integrations.moe")
    monkeypatch.setitem(layer.SHAPES, "a", replace(SMALL, expert=expert))
    original = moe.ALL_EXPERTS_FUNCTIONS._global_mapping["grouped_mm"]
    name, settings = "transformers-grouped_mm", {"shape": "a", "mode": mode, "dtype": dtype}

    def gate() -> Gate:
        return Gate(layer.SHAPES["a"], layer.DTYPES[dtype], train=mode == "train")

    for skew in (0.0, 3.0):
        layer.contestant(name, **settings, skew=skew, gate=gate())
    wrong = {"grouped_mm": lambda *args, **kwargs: 1.05 * original(*args, **kwargs)}
    monkeypatch.setitem(moe.ALL_EXPERTS_FUNCTIONS._global_mapping, *wrong.popitem())
    with pytest.raises(TurnoutError, match=f"red gate: {name} at .*, {mode}, "):
        layer.contestant(name, **settings, skew=0.0, gate=gate())


@pytest.mark.parametrize("tokens", [1, 4, 16])
def test_all_layers_meet_the_experts_whose_weights_are_read(tokens: int) -> None:
    shape = Shape(tokens=tokens, dim=64, hidden=32, experts=32, k=4, seq_len=1)
    x_TD, _ = layer_peers.batch(shape, torch.float32)
    met: list[list[int]] = []

    def remember(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        met.append(args[1].unique().tolist())

    ours, _ = layer_peers.forward_of("turnout-loop", shape, None, torch.float32)
    met.append(ours.layer(x_TD).assignment.expert_N.unique().tolist())
    theirs, _ = layer_peers.forward_of("transformers-eager", shape, None, torch.float32)
    theirs.block.experts.register_forward_pre_hook(remember)
    theirs(x_TD)
    assert met[0] == met[1]
    assert len(met[0]) == layer_peers.experts_met(shape, None)


def test_experts_of_8_bits_are_refused_where_there_is_a_backward_pass(turnout) -> None:
    result = turnout("bench", "layer", "--shapes", "a", "--modes", "train", "--peers", "turnout-int8")
    assert result.code == 2
    assert "unknown peer 'turnout-int8': it has no backward pass; available: turnout-" in result.err


@pytest.mark.parametrize("mode", ["forward", "train"])
@pytest.mark.parametrize("skew", [0.0, 3.0])
def test_a_step_of_a_layer_leaves_no_gradient_and_trains_all_that_has_one(
    mode: str, skew: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(layer.SHAPES, "b", SMALL)
    built: list[list[torch.Tensor]] = []
    original = layer.forward_of

    def remembering(*args):
        forward, parameters = original(*args)
        built.append(parameters)
        return forward, parameters

    monkeypatch.setattr(layer, "forward_of", remembering)
    for name in ("turnout-loop", "dense-ffn", "transformers-grouped_mm"):
        call = layer.contestant(name, shape="b", mode=mode, dtype="float32", skew=skew)
        reached: list[torch.Tensor] = []
        for parameter in built[-1]:
            parameter.register_post_accumulate_grad_hook(reached.append)
        call()
        has_router = not skew or name == "dense-ffn"
        trained = len(built[-1]) if has_router or name == "turnout-loop" else len(built[-1]) - 1
        assert len(reached) == (trained if mode == "train" else 0), name
        assert all(parameter.grad is None for parameter in built[-1])


def test_a_skew_gives_one_expert_its_share_and_every_token_different_experts() -> None:
    shape = replace(SMALL, tokens=480, seq_len=1)
    choices_TK = layer.skewed(shape, 3.0)
    counts_E = torch.bincount(choices_TK.flatten(), minlength=shape.experts)
    assert counts_E[0] == 3 * 480 * shape.k / shape.experts
    assert counts_E.sum() == 480 * shape.k
    assert all(len(set(row)) == shape.k for row in choices_TK.tolist())


LAYER_BAD_USES = {
    "shape": (["--shapes", "z"], r"unknown shape 'z'; available: a, b, c, d1"),
    "mode": (["--shapes", "a", "--modes", "sideways"], r"unknown mode 'sideways'; available: forward, train"),
    "dtype": (["--shapes", "a", "--dtype", "float8"], r"unknown dtype 'float8'; available: float32, bfloat16"),
    "peer": (["--shapes", "a", "--peers", "megablocks"], r"unknown peer 'megablocks'; available: turnout-"),
    "refusing peer": (
        ["--shapes", "a", "--peers", "turnout-grouped", "--dtype", "bfloat16"],
        r"unknown peer 'turnout-grouped'; available: turnout-",
    ),
    "few tokens": (
        ["--shapes", "a,d1,d16", "--modes", "train"],
        r"few tokens have no backward pass here: --modes train leaves nothing of d1, d16; add forward",
    ),
    "skew": (["--shapes", "a", "--skew", "9"], r"--skew 9.0 must be above 0 and at most experts / k = 4"),
}


@pytest.mark.parametrize("case", LAYER_BAD_USES)
def test_bad_use_of_the_layer_case_is_one_clear_error(case: str, turnout) -> None:
    args, pattern = LAYER_BAD_USES[case]
    result = turnout("bench", "layer", *args)
    assert result.code == 2, result
    assert re.search(pattern, " ".join(result.err.split())), result.err
    assert "Traceback" not in result.err


DISPATCH = ["--dim", "16", "--hidden", "8", "--experts", "4", "--rounds", "2", "--warmup", "0"]


@pytest.fixture
def few_slots() -> dispatch_ways.Routed:
    """Choices of which a third finds no slot."""
    case = dispatch.DispatchCase(tokens=(96,), dim=16, hidden=8, experts=4, factor=0.7)
    routed, _ = dispatch._batch(case, 96)
    return routed


@pytest.mark.parametrize("way", [*dispatch_ways.WAYS, "whole layer"])
def test_every_way_sends_the_same_tokens_to_the_same_experts(way: str, few_slots: dispatch_ways.Routed) -> None:
    routed, experts = few_slots, FFNExperts(16, 8, 4, kind="gelu")
    taken, gate_TE = [0] * 4, torch.zeros(96, 4)
    for choice in range(2):
        for token in range(96):
            expert = int(routed.choice_TK[token, choice])
            if taken[expert] < routed.capacity:
                gate_TE[token, expert] = routed.weight_TK[token, choice]
                taken[expert] += 1
    assert 0 < sum(taken) < 2 * 96
    each = [lambda x, e=e: oracle.ffn(x, experts.up_EDG[e], experts.down_EFD[e], kind="gelu") for e in range(4)]
    want = oracle.moe(routed.x_TD, gate_TE, each)
    if way == "whole layer":
        got = dispatch_ways.layer_of_ours(routed, experts)
    else:
        got = dispatch_ways.WAYS[way](routed, dispatch_ways.batched(experts))
    torch.testing.assert_close(got, want)


def test_dense_masks_beyond_the_bound_are_not_made_but_counted(turnout, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setitem(
        dispatch_ways.WAYS,
        "gshard-einsum",
        lambda routed, experts: made.append(len(routed.x_TD)) or dispatch_ways.by_masks(routed, experts),
    )
    bound = str(64 * 64 * 2 * 13 / 2**30)
    result = turnout("bench", "dispatch", "--tokens", "64,65", "--bound-gib", bound, "--no-memory", "--json", *DISPATCH)
    assert result.code == 0, result.err
    rows = json.loads(result.out.splitlines()[-1], parse_constant=pytest.fail)["rows"]
    found = {(row["mode"], row["tokens"], row["peer"]): row for row in rows}
    assert len(found) == len(rows) == 3 * 2 * 3
    # without a backward pass there is one mask less
    assert [key[:2] for key, row in found.items() if row["outcome"] != "measured"] == [("train", 65), ("layer", 65)]
    refused, measured = found["train", 65, "gshard-einsum"], found["train", 64, "gshard-einsum"]
    assert refused["ms_median"] is refused["speedup_of_turnout"] is None
    # two choices, 33 slots of each of 4 experts: three masks of numbers and one of truth values
    assert refused["masks_mib"] * 2**20 == 65 * 4 * 33 * 13
    assert measured["ms_median"] > 0
    assert measured["speedup_of_turnout"] > 0
    assert found["train", 65, "turnout"]["speedup_of_turnout"] == 1.0
    assert set(made) == {64, 65}
    assert "out of bound" in result.err


def test_no_way_is_timed_that_computes_something_else(turnout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        dispatch_ways.WAYS, "argsort", lambda routed, experts: 1.001 * dispatch_ways.by_argsort(routed, experts)
    )
    result = turnout("bench", "dispatch", "--tokens", "64", "--no-memory", *DISPATCH)
    assert result.code == 1
    assert "64 tokens, forward: argsort and turnout are" in " ".join(result.err.split())


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_dense_masks_take_at_least_the_memory_that_is_computed_for_them() -> None:
    case = dispatch.DispatchCase(tokens=(2048,), dim=16, hidden=8, experts=4)
    needed = case.needed_bytes("gshard-einsum", 2048, "forward")
    assert needed == 2048 * 2 * 2048 * 9
    found = call_memory(functools.partial(dispatch.made_alone, "gshard-einsum", case, "forward", 2048))
    assert found.extra is not None
    assert needed / 2**20 < found.extra < 2.5 * needed / 2**20


DISPATCH_BAD_USES = {
    "mode": (["--modes", "sideways"], r"unknown mode 'sideways'; available: forward, train, layer"),
    "tokens": (["--tokens", "many"], r"--tokens 'many' must be whole numbers"),
    "k": (["--k", "17"], r"--k 17 must be at most --experts 16"),
    "width": (["--dim", "0"], r"--dim 0 must be at least 1"),
    "factor": (["--factor", "0"], r"capacity.factor=0.0 must be a number above 0"),
    "bound": (["--bound-gib", "0"], r"--bound-gib 0.0 must be above 0"),
}


@pytest.mark.parametrize("case", DISPATCH_BAD_USES)
def test_bad_use_of_the_dispatch_case_is_one_clear_error(case: str, turnout) -> None:
    args, pattern = DISPATCH_BAD_USES[case]
    result = turnout("bench", "dispatch", *args)
    assert result.code == 2, result
    assert re.search(pattern, " ".join(result.err.split())), result.err


@pytest.fixture
def small_generation(monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    pytest.importorskip("transformers")
    model = ModelConfig(
        dim=16,
        num_layers=2,
        max_seq_len=256,
        attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8),
        moe=MoEConfig(num_experts=4, hidden=16, router=TopK(k=2)),
    )
    monkeypatch.setitem(generate.MODELS, "tiny", lambda: model)
    return model


def test_ours_and_transformers_generate_the_same_from_the_same_weights(small_generation: ModelConfig) -> None:
    shape = generate.shape_of("tiny")
    ours, _, theirs = generate_peers.built(shape)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    ways = (generate_peers.generating(ours), generate_peers.by_loop(theirs), generate_peers.by_generate(theirs))
    for batch in (1, 3):
        prompt_BS = torch.randint(64, (batch, 9))
        found = [way(prompt_BS, 7) for way in ways]
        assert [len(tokens) for tokens, _ in found] == [7] * 3
        assert found[0][0] == found[1][0] == found[2][0]
        assert all(len(at_s) == 7 and sorted(at_s) == at_s and at_s[0] > 0 for _, at_s in found)


def test_generation_against_its_peers(turnout, small_generation: ModelConfig) -> None:
    args = ["--models", "tiny", "--batches", "1,2", "--prompt", "8", "--new", "4", "--rounds", "2", "--warmup", "1"]
    result = turnout("bench", "generate", *args, "--json")
    assert result.code == 0, result.err
    rows = json.loads(result.out.splitlines()[-1], parse_constant=pytest.fail)["rows"]
    assert [(row["batch"], row["peer"]) for row in rows] == [(b, p) for b in (1, 2) for p in generate_peers.PEERS]
    for row in rows:
        assert row["ms_median"] == pytest.approx(row["first_ms_median"] + 3 * row["token_ms_median"], rel=0.5)
        assert row["tokens_per_s"] == pytest.approx(1e3 * row["batch"] / row["token_ms_median"])
        assert row["logits_apart"] < (generate.ROUNDED if row["peer"] == "turnout-int8" else generate.SAME)
    for batch in (1, 2):
        (peer,) = [row for row in rows if row["batch"] == batch and row["is_peer"]]
        assert peer["peer"].startswith("transformers-")
        assert peer["speedup_over_peer"] == peer["speedup_over_peer_token"] == 1.0
    assert "* the peer" in result.err


def test_generation_without_a_peer_has_no_ratios(small_generation: ModelConfig) -> None:
    settings = {"batches": (1,), "prompt": 4, "new": 2, "rounds": 1, "warmup": 0}
    (row,) = generate.run(["tiny"], peers=["turnout-int8"], **settings)["rows"]
    assert row["speedup_over_peer"] is row["speedup_over_peer_token_quartiles"] is None
    assert row["tokens_per_s"] > 0
    assert not row["is_peer"]


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("turnout", math.nan, "turnout has logits that are not finite"),
        ("transformers-loop", 1.001, r"logits of transformers-loop are 0.001 of their norm away"),
        ("turnout-int8", 1.02, r"logits of turnout-int8 are 0.02 of their norm away"),
    ],
)
def test_nothing_is_timed_that_computes_other_logits(name: str, value: float, text: str) -> None:
    own = torch.randn(2, 3, 8)
    logits = dict.fromkeys(("turnout", "turnout-int8", "transformers-loop"), own)
    assert generate.check_logits(logits) == dict.fromkeys(logits, 0.0)
    with pytest.raises(TurnoutError, match=text):
        generate.check_logits(logits | {name: own * value})


GENERATE_BAD_USES = {
    "model": (["--models", "huge"], r"unknown model 'huge'; available: tiny, wide"),
    "peer": (["--peers", "tutel"], r"unknown peer 'tutel'; available: turnout, turnout-int8, transformers-loop"),
    "batches": (["--batches", "0"], r"--batches '0' must be whole numbers with commas"),
    "length": (["--models", "tiny", "--prompt", "1000", "--new", "64"], r"are more than max_seq_len=1024"),
    "new": (["--models", "tiny", "--new", "1"], r"--new 1 at least 2"),
}


@pytest.mark.parametrize("case", GENERATE_BAD_USES)
def test_bad_use_of_the_generate_case_is_one_clear_error(case: str, turnout) -> None:
    args, pattern = GENERATE_BAD_USES[case]
    result = turnout("bench", "generate", *args)
    assert result.code == 2, result
    assert re.search(pattern, " ".join(result.err.split())), result.err
