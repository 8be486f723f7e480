"""The sentences of the report: each trouble is named, with its numbers and something to try."""

import math
import re
import tomllib
from dataclasses import replace

import numpy as np
import pytest

from turnout.config import describe
from turnout.observe.advice import Finding, advise
from turnout.observe.routing import Routing, routing_of
from turnout.observe.run_summary import LayerLoad, RunSummary
from turnout.observe.spikes import Spike, SpikeRule, find_spikes, is_spike
from turnout.train.recipe import Recipe


def healthy(**changes: object) -> RunSummary:
    """A run without troubles, with `changes`."""
    summary = RunSummary(
        last_step=1000,
        loss_first=5.0,
        loss_last=2.0,
        evals=((250, 2.6), (500, 2.4), (750, 2.3), (1000, 2.25)),
        layers=tuple(layer(f"blocks.{i}.moe") for i in range(2)),
        window=(901, 1000),
        router_entropy=0.7,
        tokens_per_s_early=1000.0,
        tokens_per_s_late=990.0,
    )
    return replace(summary, **changes)  # pyright: ignore[reportArgumentType]


def layer(name: str = "blocks.0.moe", load: tuple[float, ...] = (1.1, 0.9, 1.2, 0.8), **changes: float) -> LayerLoad:
    return LayerLoad(name=name, load=load, **{"fair_count": 5000.0} | changes)


FIXED = Routing(learns=False, rule="By token id.", settings=(("k", "experts per token"), ("tries", "functions drawn")))
ONE_HOT = (7.6, *[0.4 / 7] * 7)

CASES = {
    "not a number": (
        healthy(nonfinite=(70, 71, 90)),
        ("error", "The loss was not a number at 3 steps", r"First at step 70, last at step 90", "learning rate"),
    ),
    "not a number once": (
        healthy(nonfinite=(70,)),
        ("error", "The loss was not a number at 1 step", r"It was step 70\.", "z-loss"),
    ),
    "not falling": (
        healthy(loss_first=5.0, loss_last=4.98),
        ("warn", "not falling", r"began at 5\.000 and stands at 4\.980 after 1,000 steps", "learning rate 3 times"),
    ),
    "diverging": (
        healthy(loss_first=5.0, loss_last=6.0),
        ("error", "not falling", r"stands at 6\.000", "10 times lower"),
    ),
    "spikes": (
        healthy(spikes=(Spike(step=400, loss=4.0, usual=2.5), Spike(step=600, loss=3.0, usual=2.4))),
        ("warn", "The loss jumped 2 times", r"step 400, went from about 2\.500 to 4\.000", "Clip gradients"),
    ),
    "validation rises": (
        healthy(evals=((250, 2.6), (500, 2.4), (750, 2.5), (1000, 2.7))),
        (
            "warn",
            "validation loss is rising",
            r"Best 2\.400 at step 500, now 2\.700 .*\(13 % higher\)",
            "run of about 500 steps",
        ),
    ),
    "no evaluation": (
        healthy(evals=()),
        ("note", "no evaluation", "memorising", "validation split"),
    ),
    "a dead expert": (
        healthy(layers=(layer("a", (1.1, *[1.0] * 9, 0.0005)), layer("b"))),
        (
            "warn",
            "1 of 15 experts is dead",
            r"Over steps 901 to 1,000 .* a: expert 10\. Their",
            "loss load_balance 3 to 10 times",
        ),
    ),
    "many dead experts": (
        healthy(layers=(layer("a", (2.0, 2.0, 0.0, 0.0)),)),
        ("error", "2 of 4 experts are dead", r"a: experts 2, 3\.", "fewer experts"),
    ),
    "collapse warns": (
        healthy(layers=(layer("a", (3.0, 0.9, 0.05, 0.05)),)),
        ("warn", "Routing has collapsed in 1 layer", r"load of a has \d\d % of .* experts, not 4", "loss load_balance"),
    ),
    "collapse": (
        healthy(layers=(layer("a", ONE_HOT), layer("b", ONE_HOT), layer("c"))),
        ("error", "Routing has collapsed in 2 layers", r"as if it had 1\.\d experts, not 8\. Also b\.", "reaches"),
    ),
    "skew warns": (
        healthy(layers=(layer("a", (4.0, *[4 / 7] * 7)),)),
        ("warn", "One expert carries 4.0 times", r"expert 0 of a\. .* up to 4\.0 times", 'scope = "global"'),
    ),
    "skew": (
        healthy(layers=(layer("a", (*[2 / 7] * 7, 6.0)),)),
        ("error", "One expert carries 6.0 times", "expert 7 of a", "loss load_balance 3 to 10 times"),
    ),
    "drops warn": (
        healthy(layers=(layer("a", dropped_share=0.05), layer("b", dropped_share=0.01))),
        ("warn", "3.0 % of assignments are dropped", r"a drops most, 5\.0 %", "capacity factor"),
    ),
    "drops": (
        healthy(layers=(layer("a", dropped_share=0.3),)),
        ("error", "30 % of assignments are dropped", "a drops most, 30 %", "drops nothing"),
    ),
    "left out by design": (
        healthy(declined_share=0.4, routing=Routing(settings=(("threshold", "share kept"),))),
        ("note", "The router leaves out 40 % of its choices", "by design", "a setting of the router: threshold"),
    ),
    "a dead expert of a fixed router": (
        healthy(layers=(layer("a", (2.0, 2.0, 0.0, 0.0)),), routing=FIXED),
        ("error", "2 of 4 experts are dead", "a: experts 2, 3", "num_experts, or a setting of the router: k (experts"),
    ),
    "drops of a fixed router": (
        healthy(layers=(layer("a", dropped_share=0.3),), routing=FIXED),
        ("error", "30 % of assignments are dropped", "for want of room", "Raise the capacity factor"),
    ),
    "slower": (
        healthy(tokens_per_s_late=500.0),
        ("warn", "slowed down by 50 %", r"From 1,000 to 500 tokens per second", "other work"),
    ),
    "undecided": (
        healthy(router_entropy=0.995),
        (
            "note",
            "hardly chooses",
            r"99\.5 % of the greatest entropy",
            "Lower the coefficient of the loss load_balance",
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_trouble_is_named_with_its_numbers_and_a_way_out(name: str) -> None:
    summary, (severity, title, text, try_) = CASES[name]
    found = [finding for finding in advise(summary) if title in plain(finding.title)]
    assert len(found) == 1, advise(summary)
    assert found[0].severity == severity
    assert re.search(text, plain(found[0].text))
    assert try_ in plain(found[0].try_)


def test_a_router_that_does_not_learn_is_never_told_to() -> None:
    for summary, _ in CASES.values():
        for finding in advise(replace(summary, routing=FIXED, last_step=1000)):
            words = f"{finding.title} {finding.try_}"
            assert not re.search(r"load_balance|router noise|z-loss|hardly chooses|balances by itself", words, re.I), (
                words
            )


BIASED = Routing(
    balance_losses=(), own_balance="bias of the router x 0.001 a step", settings=(("bias_step", "change"),)
)


@pytest.mark.parametrize(
    ("routing", "advised", "never"),
    [
        (Routing(balance_losses=("load_cv",)), "coefficient of the loss load_cv 3 to 10 times", "load_balance"),
        (
            BIASED,
            r"by itself \(bias of the router x 0\.001 a step\): change a setting of it \(bias_step\)",
            "coefficient",
        ),
        (Routing(balance_losses=()), "add the loss load_balance to model.moe.losses", "coefficient"),
    ],
)
def test_advice_on_balance_names_what_balances_this_run(routing: Routing, advised: str, never: str) -> None:
    for name in ("many dead experts", "collapse", "skew", "drops", "undecided"):
        (finding,) = advise(replace(CASES[name][0], routing=routing))[:1]
        assert name == "undecided" or re.search(advised, finding.try_), finding
        assert never not in finding.try_, finding


def test_no_advice_names_what_there_is_not() -> None:
    fields = {doc.path for doc in describe(Recipe)}
    for routing in (Routing(), BIASED, FIXED, Routing(balance_losses=())):
        for summary, _ in CASES.values():
            for finding in advise(replace(summary, routing=routing)):
                words = f"{finding.text} {finding.try_}"
                assert not re.search(r"dropout|nearest to step|layer unchanged|second rank|Resume from", words), words
                assert set(re.findall(r"(?:optimizer|loop)\.\w+", words)) <= fields, words


@pytest.mark.parametrize(
    ("router", "losses", "found"),
    [
        ("name = 'topk'", "", ("", ("load_balance",))),
        (
            "name = 'topk'",
            "losses = [{name = 'importance', coefficient = 0.1}, {name = 'router_z'}]",
            ("", ("importance",)),
        ),
        ("name = 'topk'", "losses = [{name = 'load_balance', coefficient = 0.0}]", ("", ())),
        ("name = 'deepseek_v3', bias_step = 0.01", "losses = []", ("bias of the router x 0.01 a step", ())),
        ("name = 'topk'", "losses = 3", ("", ("load_balance",))),
        ("name = 'topk'", "losses = [{}, 4, {name = 'unheard_of'}, {name = []}]", ("", ())),
    ],
)
def test_what_balances_a_run_is_read_from_its_recipe(
    router: str, losses: str, found: tuple[str, tuple[str, ...]]
) -> None:
    routing = routing_of(tomllib.loads(f"[model.moe]\nrouter = {{{router}}}\n{losses}"))
    assert (routing.own_balance, routing.balance_losses) == found


def test_a_healthy_run_gets_one_good_word_with_its_numbers() -> None:
    (finding,) = advise(healthy())
    assert finding.severity == "good"
    assert "fell from 5.000 to 2.000" in finding.text
    assert "validation loss ends at 2.250" in finding.text
    assert "all 8 experts are in use, the busiest at 1.20 times" in finding.text
    assert re.search(r"load entropy is 9\d\.?\d? % of the greatest possible", plain(finding.text))


def test_a_note_does_not_take_the_good_word_away_but_a_warning_does() -> None:
    assert [f.severity for f in advise(healthy(evals=()))] == ["note", "good"]
    assert "good" not in [f.severity for f in advise(healthy(tokens_per_s_late=1.0))]


def test_the_worst_comes_first() -> None:
    found = advise(healthy(nonfinite=(3,), evals=(), tokens_per_s_late=1.0))
    assert [f.severity for f in found] == ["error", "warn", "note"]


def test_a_run_without_steps_gets_no_advice() -> None:
    assert advise(RunSummary(last_step=0)) == []


def test_thresholds_are_not_crossed_at_their_edge() -> None:
    edge = layer("a", (3.0, *[5 / 7] * 7), dropped_share=0.02)
    assert [f.severity for f in advise(healthy(layers=(edge,)))] == ["good"]


def test_an_empty_expert_is_no_evidence_while_there_are_few_tokens() -> None:
    few = layer("a", (1.4, 1.3, 1.3, 0.0), fair_count=3.0)
    assert few.dead == ()
    assert replace(few, fair_count=300.0).dead == (3,)


def test_dense_models_and_unmeasured_numbers_are_no_trouble() -> None:
    (finding,) = advise(RunSummary(last_step=1000, evals=((1, 2.0),)))
    assert finding == Finding(
        severity="good", title="Nothing looks wrong", text="No loss spikes, and no step without a finite loss."
    )


def test_load_entropy_has_the_effective_number_of_experts() -> None:
    assert layer(load=(2.0, 2.0, 0.0, 0.0)).effective_experts == pytest.approx(2)
    assert layer(load=(1.0,) * 8).effective_experts == pytest.approx(8)
    assert layer(load=(1.0,)).entropy == 1.0


def test_spikes_are_found_once_per_burst_and_noise_is_not_one() -> None:
    rng = np.random.default_rng(0)
    loss = 2 + 3 * np.exp(-np.arange(2000) / 300) + rng.normal(0, 0.05, 2000)
    steps = np.arange(2000) * 10.0
    assert find_spikes(steps.tolist(), loss.tolist()) == ()
    loss[1000:1003] += 2
    loss[50] = math.nan
    (spike,) = find_spikes(steps.tolist(), loss.tolist())
    assert spike.step == 10_000
    assert spike.loss == pytest.approx(4.1, abs=0.3)
    assert find_spikes([], []) == ()


def test_the_report_finds_the_spikes_that_a_training_tells_of() -> None:
    rng = np.random.default_rng(1)
    loss = (3 + rng.normal(0, 0.01, 600)).tolist()
    # too early to tell, one alone, two neighbours, one that is small beside the loss, one too large to square
    for step, value in {20: 9.0, 200: 4.0, 300: 9.0, 301: 9.1, 400: 3.1, 500: 1e200}.items():
        loss[step] = value
    told, history = [], []
    for step, value in enumerate(loss):
        spiked, history = is_spike(SpikeRule(), history, value)
        told += [step] if spiked else []
    assert told == [200, 300, 301, 400, 500]
    assert [spike.step for spike in find_spikes(range(600), loss)] == [200, 300, 400, 500]


def plain(text: str) -> str:
    return text.replace("\N{NO-BREAK SPACE}", " ")
