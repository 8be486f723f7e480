"""A comparison is read off curves: margins, time to the other's loss, from when on ahead."""

import io
import json
import math
import os
import re
import signal
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from turnout.cli.compare import _variants
from turnout.cli.compare_print import print_setups, rows_of
from turnout.config import dump_toml, from_dict
from turnout.contracts import CapacityPolicy, Loss, RouterConfig
from turnout.data.prepare import Dataset
from turnout.data.sampler import Batch
from turnout.dispatch import AffinityThreshold, Dropless, FixedCapacity, TutelCapacity
from turnout.errors import ConfigError
from turnout.layers.moe import MoEConfig
from turnout.losses import (
    CommunicationBalance,
    DeviceBalance,
    Entropy,
    Importance,
    LoadBalance,
    LoadCV,
    RouterZ,
)
from turnout.models import Decoder, ModelConfig
from turnout.models.size import sizes
from turnout.routers import (
    DeepSeekV3,
    DeviceLimited,
    ExpertChoice,
    Forced,
    GShardTop2,
    Hash,
    Hierarchical,
    LocMoE,
    LocMoEPlus,
    NoisyTopK,
    ReMoE,
    Switch,
    TopK,
    TopP,
)
from turnout.tensors import Assignment
from turnout.train import checkpoint
from turnout.train import compare as comparison
from turnout.train.compare import Curve, check_comparable, compare
from turnout.train.compare_plot import write_comparison
from turnout.train.compared_losses import asked_losses
from turnout.train.later_tokens import sees_later_tokens
from turnout.train.recipe import Recipe
from turnout.train.recipes import load_recipe
from turnout.train.routing_facts import _rows_sent, _told_by_id, routing_facts
from turnout.train.routing_setup import routing_setup
from turnout.train.signals import StopRequest
from turnout.train.variants import with_routers
from turnout.train.verdicts import ahead_from, seconds_to, verdicts


def curve(recipe: str, losses: Sequence[float], seed: int = 0, *, complete: bool = True) -> Curve:
    seconds = tuple(10.0 * (i + 1) for i in range(len(losses)))
    return Curve(
        recipe=recipe,
        seed=seed,
        seconds=seconds,
        tokens=tuple(int(100 * s) for s in seconds),
        val_loss=tuple(losses),
        tokens_per_s=100.0,
        params_total=2,
        params_active=1,
        train_flops_per_token=6,
        complete=complete,
        cpu_share=0.9,
        dropped_share=0.0,
        declined_share=0.0,
        max_violation=0.0,
        router_entropy=0.0,
        routing=None,
        setup=None,
    )


def test_time_to_a_loss_is_interpolated_between_evaluations() -> None:
    falling = curve("a", [5.0, 4.0, 3.0])
    assert seconds_to(falling, 4.5) == pytest.approx(15.0)
    assert seconds_to(falling, 3.0) == pytest.approx(30.0)
    assert seconds_to(falling, 2.0) is None
    assert seconds_to(falling, 6.0) == pytest.approx(10.0)


def test_ahead_for_good_is_where_the_lead_is_kept_to_the_end() -> None:
    dense = curve("dense", [5.0, 4.0, 3.5, 3.2])
    assert ahead_from(curve("moe", [5.5, 3.9, 3.6, 3.0]), dense) == 40.0
    assert ahead_from(curve("moe", [5.5, 3.9, 3.4, 3.0]), dense) == 20.0
    assert ahead_from(curve("moe", [4.0, 3.9, 3.4, 3.3]), dense) is None


def test_a_verdict_takes_the_mean_margin_and_the_worst_seed() -> None:
    curves = [
        curve("moe", [5.0, 3.0], seed=0),
        curve("dense", [5.5, 3.4], seed=0),
        curve("moe", [5.0, 3.1], seed=1),
        curve("dense", [4.9, 3.3], seed=1),
    ]
    (verdict,) = verdicts(curves)
    assert verdict.margin == pytest.approx(0.3)
    assert verdict.margins == pytest.approx((0.4, 0.2))
    assert verdict.time_ratio == pytest.approx((10 + 10 * (5.0 - 3.3) / 1.9) / 20)
    assert verdict.ahead_from_s == 20.0


def test_one_seed_that_never_reaches_the_loss_means_not_reached() -> None:
    curves = [
        curve("moe", [5.0, 3.0], 0),
        curve("dense", [5, 3.4], 0),
        curve("moe", [5, 3.5], 1),
        curve("dense", [5, 3.4], 1),
    ]
    (verdict,) = verdicts(curves)
    assert verdict.time_ratio is None
    assert verdict.ahead_from_s is None


def test_a_seed_cut_short_is_shown_and_not_judged() -> None:
    short = [curve("moe", [5.0, 3.0], complete=False), curve("dense", [5.5, 3.4])]
    assert verdicts(short) == []
    (verdict,) = verdicts([*short, curve("moe", [5.0, 3.0], seed=1), curve("dense", [5.5, 3.1], seed=1)])
    assert verdict.margins == pytest.approx((0.1,))


@pytest.mark.parametrize("setting", ["data.val_fraction=0.1", "loop.eval_tokens=4096", "loop.seq_len=128"])
def test_recipes_on_different_text_are_not_compared(setting: str) -> None:
    with pytest.raises(ConfigError, match="do not use the same data or evaluation text"):
        check_comparable([load_recipe("tiny"), load_recipe("tiny-dense", [setting])])


def test_recipes_of_one_name_are_not_compared() -> None:
    with pytest.raises(ConfigError, match="same name"):
        check_comparable([load_recipe("tiny"), load_recipe("tiny")])


def test_the_twins_compute_the_same() -> None:
    moe, dense = (sizes(load_recipe(name).model, 256) for name in ("tiny", "tiny-dense"))
    assert moe.train_flops_per_token == dense.train_flops_per_token


def test_a_run_that_turns_nan_ends_alone(small_recipe: Recipe, small_dataset: Dataset, tmp_path: Path) -> None:
    sick = replace(small_recipe, name="sick", optimizer=replace(small_recipe.optimizer, lr=1e30))
    said: list[str] = []
    seen: list[int] = []
    with StopRequest() as stop:
        curves = compare(
            [sick, small_recipe],
            small_dataset,
            tmp_path,
            minutes=0.01,
            seeds=[0],
            stop=stop,
            say=said.append,
            on_seed=lambda so_far: seen.append(len(so_far)),
        )
    assert any("sick seed 0 ends here" in line for line in said)
    assert [c.complete for c in curves if c.recipe == small_recipe.name] == [True]
    assert not any(c.complete for c in curves if c.recipe == "sick")
    assert verdicts(curves) == []
    assert seen == [len(curves)]


def test_a_comparison_stopped_in_the_middle_of_a_turn_keeps_whole_turns_and_saves_every_run(
    small_recipe: Recipe, small_dataset: Dataset, tmp_path: Path
) -> None:
    said: list[str] = []

    def stop_after_two(line: str) -> None:
        said.append(line)
        if len(said) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    recipes = [small_recipe, replace(small_recipe, name="other")]
    with StopRequest() as stop:
        curves = compare(recipes, small_dataset, tmp_path, minutes=0.05, seeds=[0, 1], stop=stop, say=stop_after_two)
    assert [len(c.val_loss) for c in curves] == [2, 2]
    assert not any(c.complete for c in curves)
    assert verdicts(curves) == []
    for recipe in recipes:
        assert checkpoint.load(tmp_path / f"{recipe.name}-seed-0").step > 0


def test_a_comparison_stopped_while_it_evaluates_saves_every_run(
    small_recipe: Recipe, small_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(comparison.Trainer, "evaluate_and_record", stopped)
    recipes = [small_recipe, replace(small_recipe, name="other")]
    with StopRequest() as stop:
        compare(recipes, small_dataset, tmp_path, minutes=0.05, seeds=[0], stop=stop, say=print)
    for recipe in recipes:
        assert checkpoint.load(tmp_path / f"{recipe.name}-seed-0").step > 0


@pytest.mark.exhaustive
def test_every_router_trains_the_same_model_for_the_same_steps(
    small_recipe: Recipe, small_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "ROUNDS", 2)
    recipes = [variant.recipe for variant in with_routers(small_recipe, RouterConfig.TABLE.names())]
    with StopRequest() as stop:
        curves = compare(
            recipes, small_dataset, tmp_path, minutes=0, steps=10, seeds=[0], stop=stop, say=lambda line: None
        )
    assert [c.recipe for c in curves] == [f"small-{name}" for name in RouterConfig.TABLE.names()]
    for c in curves:
        assert c.complete
        assert c.tokens[-1] == 10 * 2 * 16
        assert all(math.isfinite(loss) for loss in c.val_loss), c
        assert c.routing is not None
        assert 0 <= c.routing.specialisation <= 1 + 1e-9
        assert c.routing.experts_per_token > 0
    by_name = {c.recipe.removeprefix("small-"): c.routing for c in curves}
    assert by_name["hash"] is not None
    assert by_name["topk"] is not None
    assert by_name["topk"].experts_per_token == 2
    # the id tells both experts, but not which of the two
    assert by_name["hash"].specialisation > by_name["topk"].specialisation


BALANCE = (LoadBalance(),)
OF_THE_PAPER = [
    (TopK(k=2), BALANCE),
    (Switch(), BALANCE),
    (Forced(k=2, skew=1.0), ()),
    (Hash(k=2), ()),
    (DeepSeekV3(k=2), (LoadBalance(coefficient=1e-4, scope="sequence"),)),
    (DeepSeekV3(k=2, bias_step=0), BALANCE),
    (TopP(), (LoadBalance(), Entropy(coefficient=1e-4))),
    (NoisyTopK(k=2), (Importance(coefficient=0.1, of="weights"), LoadCV(coefficient=0.1))),
    (GShardTop2(), (LoadBalance(count="first"),)),
    (DeviceLimited(k=2), (LoadBalance(coefficient=0.003),)),
    (
        DeviceLimited(k=2, groups=2, top_groups=1),
        (
            LoadBalance(coefficient=0.003),
            DeviceBalance(coefficient=0.05, groups=2),
            CommunicationBalance(coefficient=0.02, groups=2, top_groups=1),
        ),
    ),
    (ReMoE(k=2), ()),
    (ExpertChoice(k=2, in_decoder="allow"), ()),
    (LocMoE(), BALANCE),
]


def with_router(recipe: Recipe, router: RouterConfig, losses: tuple[Loss, ...] = ()) -> Recipe:
    assert recipe.model.moe is not None
    return replace(recipe, model=replace(recipe.model, moe=replace(recipe.model.moe, router=router, losses=losses)))


@pytest.mark.parametrize(("router", "losses"), OF_THE_PAPER, ids=repr)
def test_a_router_is_trained_with_the_losses_of_its_paper(
    router: RouterConfig, losses: tuple[Loss, ...], small_recipe: Recipe
) -> None:
    own = with_router(small_recipe, router)
    (variant,) = with_routers(own, [RouterConfig.TABLE.name_of(type(router))])
    assert variant.recipe.model == with_router(own, router, losses).model


def test_losses_that_are_asked_for_go_to_every_router_that_can_have_them(small_recipe: Recipe) -> None:
    asked = (LoadBalance(coefficient=0.5), LoadCV())
    found = {v.recipe.name: v for v in with_routers(small_recipe, ["topk", "noisy_topk", "hash", "quantile"], asked)}
    losses = {name: v.recipe.model.moe.losses for name, v in found.items() if v.recipe.model.moe is not None}
    assert losses["small-noisy_topk"] == asked
    assert losses["small-topk"] == losses["small-quantile"] == asked[:1]
    assert losses["small-hash"] == ()
    assert any("the loss load_cv needs a router with noise" in note for note in found["small-topk"].notes)
    assert sum("would be a constant" in note for note in found["small-hash"].notes) == 2
    assert found["small-noisy_topk"].notes == ()


LOSSES_ASKED: dict[str, tuple[str, list[str], tuple[Loss, ...] | None]] = {
    "nobody": ("smoke", [], None),
    "a router that can have none": ("tiny", [], None),
    "another router": ("smoke", ["model.moe.router={name='top_p'}"], None),
    "the default, by name": ("smoke", ["model.moe.losses=[{name='load_balance'}]"], BALANCE),
    "none, by name": ("tiny", ["model.moe.losses=[]"], ()),
    "a dense recipe": ("tiny-dense", [], None),
}


@pytest.mark.parametrize("case", LOSSES_ASKED)
def test_losses_are_asked_for_by_name(case: str) -> None:
    recipe, overrides, want = LOSSES_ASKED[case]
    assert asked_losses(recipe, overrides) == want


def test_a_recipe_with_losses_of_its_own_asks_for_them(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    own = load_recipe("smoke", ["model.moe.losses=[{name='load_balance', coefficient=0.3}, {name='router_z'}]"])
    path.write_text(dump_toml(own), encoding="utf-8")
    assert asked_losses(str(path)) == (LoadBalance(coefficient=0.3), RouterZ())
    path.write_text(dump_toml(load_recipe("smoke")), encoding="utf-8")
    assert asked_losses(str(path)) is None


@pytest.mark.parametrize(
    ("own", "name", "k", "note"),
    [
        (
            TopK(k=1, renormalize=False),
            "noisy_topk",
            2,
            r"k=2 in place of the recipe's 1 \(router\.k=1 must be at least",
        ),
        (
            TopK(k=1, renormalize=False),
            "deepseek_v3",
            2,
            r"k=2 in place of the recipe's 1 \(router\.k=1 must be at least",
        ),
        (Hash(k=1), "topk", 2, r"k=2 in place of the recipe's 1 \(router\.k=1 with renormalize=true"),
        (Switch(), "expert_choice", 1, ""),
        (GShardTop2(), "topk", 2, ""),
        (TopK(k=3), "sinkhorn", 3, ""),
        (TopK(k=3), "gshard", 2, "no setting k; experts a token by its own settings: 2, in the recipe: 3"),
        (TopK(k=2), "top_p", 2, "no setting k: how many experts a token gets follows from its probabilities"),
        (TopK(k=2), "gshard", 2, ""),
        (NoisyTopK(k=2), "cosine", 2, r"init_std=0\.01 in place of the recipe's 0\.0"),
    ],
)
def test_a_k_that_a_router_may_not_have_becomes_the_nearest_and_is_said(
    own: RouterConfig, name: str, k: int, note: str, small_recipe: Recipe
) -> None:
    (variant,) = with_routers(with_router(small_recipe, own), [name])
    assert variant.recipe.model.moe is not None
    assert variant.recipe.model.moe.router.choices == k
    if note:
        assert any(re.match(note, said) for said in variant.notes), variant.notes
    else:
        assert variant.notes == ()


SEES_LATER = {
    "expert_choice": "training and evaluation",
    **dict.fromkeys(("base", "sinkhorn", "quantile", "locmoe_plus"), "training"),
}


@pytest.mark.parametrize("name", RouterConfig.TABLE.names())
def test_who_sees_later_tokens_is_found_by_trying_and_is_what_a_router_says_of_itself(name: str) -> None:
    row = RouterConfig.TABLE[name]
    router = row(k=2) if "k" in {field.name for field in fields(row)} else row()  # type: ignore[arg-type, call-arg]
    found = sees_later_tokens(16, MoEConfig(num_experts=8, router=router, losses=()))
    assert found == SEES_LATER.get(name, "")
    assert ("evaluation" in found) == (not router.causal)


@pytest.mark.parametrize(
    "router",
    [
        LocMoEPlus(k=2, evaluation="mode"),
        LocMoEPlus(k=2, evaluation="mode", mode="expert_choice"),
        LocMoEPlus(k=2, evaluation="mode", mode="token_choice"),
        LocMoEPlus(k=2, evaluation="mode", mode="token_choice", before_switch="hybrid", switch_step=9),
        LocMoEPlus(k=2, evaluation="mode", mode="hybrid", before_switch="token_choice", switch_step=9),
    ],
    ids=repr,
)
def test_evaluation_by_experts_is_declared_and_refused_in_a_decoder(router: LocMoEPlus) -> None:
    found = sees_later_tokens(16, MoEConfig(num_experts=8, router=router, losses=()))
    # one that is yet to switch looks ahead later
    assert router.causal or router.switch_step or "evaluation" in found
    if router.causal:
        assert "evaluation" not in found
        router.check_decoder()
    else:
        with pytest.raises(ConfigError, match="later tokens"):
            router.check_decoder()
        replace(router, in_decoder="allow").check_decoder()


@pytest.mark.parametrize(
    ("router", "capacity", "want"),
    [
        (Switch(), FixedCapacity(), ""),
        # first choices of later tokens come before second choices of earlier ones
        (TopK(k=2), FixedCapacity(), "training and evaluation"),
        (Switch(), FixedCapacity(priority="score"), "training and evaluation"),
        (Switch(), FixedCapacity(priority="score", eval_factor=8.0), "training"),
        (TopK(k=2), TutelCapacity(factor=0), ""),
        (LocMoEPlus(k=2, evaluation="mode"), Dropless(), "training and evaluation"),
        (NoisyTopK(k=2), Dropless(), ""),
        (Hierarchical(inner=ExpertChoice(k=1)), Dropless(), "training and evaluation"),
    ],
    ids=repr,
)
def test_a_capacity_or_a_mode_that_looks_ahead_is_found(
    router: RouterConfig, capacity: CapacityPolicy, want: str
) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    moe = MoEConfig(num_experts=8, router=router, capacity=capacity, losses=())
    assert sees_later_tokens(16, moe) == want
    assert torch.equal(before, torch.get_rng_state())


BY_SCORE, BY_CHANCE = FixedCapacity(priority="score"), FixedCapacity(priority="random")


@pytest.mark.parametrize(
    "capacity",
    [
        Dropless(),
        FixedCapacity(),
        FixedCapacity(eval_factor=8.0),
        FixedCapacity(group_size=1, priority="score"),
        BY_SCORE,
        BY_CHANCE,
        replace(BY_SCORE, group_size=24, factor=0.5),
        TutelCapacity(),
        TutelCapacity(factor=0, priority="score"),
        TutelCapacity(factor=-1.0, priority="score"),
        TutelCapacity(factor=8.0, priority="random"),
        AffinityThreshold(),
        AffinityThreshold(threshold=1.0, factor=0.5),
    ],
    ids=repr,
)
@pytest.mark.parametrize("router", [Switch(), TopK(k=2), LocMoEPlus(k=1), TopP(expected_choices=1)], ids=repr)
def test_a_decoder_refuses_the_capacities_that_look_ahead_in_evaluation_and_no_others(
    router: RouterConfig, capacity: CapacityPolicy
) -> None:
    moe = MoEConfig(num_experts=8, router=router, capacity=capacity, losses=())
    if "evaluation" not in sees_later_tokens(16, moe):
        ModelConfig(dim=16, moe=moe)
        return
    with pytest.raises(ConfigError, match=r"depend on later tokens in evaluation: .* capacity\.in_decoder='allow'"):
        ModelConfig(dim=16, moe=moe)
    ModelConfig(dim=16, moe=replace(moe, capacity=replace(capacity, in_decoder="allow")))  # type: ignore[call-arg]


@torch.no_grad()
@pytest.mark.parametrize("capacity", [BY_SCORE, TutelCapacity(priority="score"), AffinityThreshold()], ids=repr)
def test_an_allowed_capacity_moves_a_decoders_earlier_outputs_and_dropless_does_not(capacity: CapacityPolicy) -> None:
    earlier, one, other = torch.randint(256, (3, 8, 12))
    for policy, moves in ((replace(capacity, in_decoder="allow"), True), (Dropless(), False)):  # type: ignore[call-arg]
        torch.manual_seed(0)
        moe = MoEConfig(num_experts=4, hidden=8, router=Switch(), capacity=policy)
        model = Decoder(ModelConfig(vocab_size=256, dim=16, num_layers=2, moe=moe)).double().eval()
        first, second = (model(torch.cat([earlier, later], dim=1)).h_BSD[:, :12] for later in (one, other))
        assert torch.allclose(first, second, rtol=0, atol=1e-12) is not moves


def test_a_capacity_is_let_into_the_decoder_with_the_router_that_makes_it_look_ahead(small_recipe: Recipe) -> None:
    assert small_recipe.model.moe is not None
    moe = replace(small_recipe.model.moe, router=Switch(), capacity=FixedCapacity())
    recipe = replace(small_recipe, model=replace(small_recipe.model, moe=moe))
    kept, let_in = (v.recipe.model.moe for v in with_routers(recipe, ["switch", "top_p"]))
    assert kept is not None
    assert let_in is not None
    assert (kept.capacity, let_in.capacity) == (FixedCapacity(), FixedCapacity(in_decoder="allow"))


def test_rows_hold_router_capacity_and_losses_whole(small_recipe: Recipe) -> None:
    (variant,) = with_routers(small_recipe, ["top_p"])
    c = replace(curve("small-top_p", [5.0, 4.0]), setup=routing_setup(variant.recipe))
    told, dense = rows_of([c, curve("dense", [5.0])])
    moe = from_dict(MoEConfig, {name: told[name] for name in ("router", "capacity")} | {"losses": [*told["losses"]]})
    assert variant.recipe.model.moe is not None
    own = variant.recipe.model.moe
    assert (moe.router, moe.capacity, moe.losses) == (own.router, own.capacity, own.losses)
    assert (told["sees_later_tokens"], told["own_balance"]) == ("", "")
    assert dense["router"] is None
    assert json.loads(json.dumps(told))["losses"][1]["name"] == "entropy"


def test_what_is_trained_is_said_before(small_recipe: Recipe) -> None:
    screen = Console(file=io.StringIO(), width=200)
    own = with_router(small_recipe, TopK(k=1, renormalize=False))
    print_setups(screen, with_routers(own, ["base", "noisy_topk", "locmoe", "expert_choice"]))
    said = " ".join(screen.file.getvalue().split())  # pyright: ignore[reportAttributeAccessIssue]
    assert "small-noisy_topk noisy_topk(k=2, init_std=0.02) 0.1 importance(of=weights) + 0.1 load_cv" in said
    assert "small-base base its own: balanced assignment in training" in said
    assert "small-noisy_topk: k=2 in place of the recipe's 1" in said
    assert "small-base sees later tokens in training alone: its training loss is too good" in said
    assert "small-expert_choice sees later tokens in training and evaluation: its validation loss is one" in said
    assert "small-locmoe: without the locality loss of its paper" in said


def test_a_recipe_without_experts_has_no_routers() -> None:
    with pytest.raises(ConfigError, match="tiny-dense has no experts to route to"):
        with_routers(load_recipe("tiny-dense"), ["topk"])


def test_rows_sent_are_counted_once_a_rank() -> None:
    """Four tokens on two ranks, four experts: 0, 1 on rank 0; 2, 3 on rank 1."""
    expert_N = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    assignment = Assignment(
        token_N=torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]),
        expert_N=expert_N,
        weight_N=torch.ones(8),
        choice_N=torch.tensor([0, 1] * 4),
        num_tokens=4,
        num_experts=4,
        top_k=2,
    )
    # tokens 0, 1 are at home on rank 0 and 2, 3 on rank 1: 1 goes across for both of its experts, and so does 2
    assert _rows_sent(assignment, None, 2) == 2
    assert _rows_sent(assignment, expert_N <= 1, 2) == 1


def test_what_capacity_drops_is_not_counted_as_sent() -> None:
    torch.manual_seed(0)
    recipe = load_recipe("smoke", ["model.moe.capacity={name='fixed', factor=0.1, minimum=1, in_decoder='allow'}"])
    ids_BS = torch.randint(256, (2, 32))
    facts = routing_facts(Decoder(recipe.model), [Batch(tokens_BS=ids_BS, targets_BS=ids_BS)])
    whole = routing_facts(Decoder(load_recipe("smoke").model), [Batch(tokens_BS=ids_BS, targets_BS=ids_BS)])
    assert facts is not None
    assert whole is not None
    assert whole.experts_per_token == 2
    # ceil(0.1 * 2 * 64 / 4) = 4 rows an expert at most
    assert facts.experts_per_token <= 4 * 4 / 64
    assert facts.sent_bytes_per_token < 0.3 * whole.sent_bytes_per_token


def test_the_worst_load_is_that_of_all_validation_text_in_evaluation() -> None:
    torch.manual_seed(0)
    model = Decoder(load_recipe("smoke").model)
    batches = [Batch(tokens_BS=ids_BS, targets_BS=ids_BS) for ids_BS in torch.randint(256, (3, 2, 16))]
    facts = routing_facts(model, batches)
    assert facts is not None
    assert model.training
    assert 0 < facts.max_violation <= facts.max_violation_worst
    model.eval()
    loads = [
        sum(stats.assigned_E.double() for stats in layer)
        for layer in zip(*(model(batch.tokens_BS).stats for batch in batches), strict=True)
    ]
    want = [float(load_E.max() / load_E.mean()) - 1 for load_E in loads]
    assert facts.max_violation == pytest.approx(sum(want) / len(want))
    assert facts.max_violation_worst == pytest.approx(max(want))


def test_specialisation_is_one_where_the_id_decides_and_zero_where_it_tells_nothing() -> None:
    assert _told_by_id(torch.eye(4)) == pytest.approx(1.0)
    assert _told_by_id(torch.ones(4, 3)) == pytest.approx(0.0, abs=1e-6)
    assert _told_by_id(torch.ones(4, 1)) == 0.0
    assert 0 < _told_by_id(torch.tensor([[3.0, 1.0], [1.0, 3.0]])) < 1


@pytest.mark.parametrize("losses", [[5.0], [float("nan")], [5.0, float("nan"), 4.0, 3.0, 2.0, 1.0]])
def test_a_comparison_cut_short_still_has_its_picture(losses: list[float], tmp_path: Path) -> None:
    curves = [curve("moe", losses, complete=False), curve("dense", losses[:1], complete=False)]
    assert write_comparison(curves, tmp_path).is_file()
    assert write_comparison(curves[:1], tmp_path).is_file()


def test_rows_of_a_seed_that_only_one_recipe_began() -> None:
    curves = [curve("moe", [5.0, 4.0]), curve("dense", [5.0, 4.5]), curve("moe", [5.0], seed=1, complete=False)]
    rows = rows_of(curves)
    assert rows[0]["seconds_to_loss_of"]["dense"] == pytest.approx(15.0)
    assert rows[2]["seconds_to_loss_of"] == {}


def test_a_baseline_without_a_curve_is_not_replaced_by_another_recipe() -> None:
    curves = [curve("moe", [5.0, 3.0]), curve("other", [5.0, 3.5])]
    assert verdicts(curves, "dense") == []
    assert [v.recipe for v in verdicts(curves, "moe")] == ["other"]


def test_all_routers_are_those_that_fit_the_sizes() -> None:
    with io.StringIO() as out:
        found = _variants("smoke", ["model.moe.num_experts=9"], "all", Console(file=out, width=200))
        said = out.getvalue()
    names = {variant.recipe.name.removeprefix("smoke-") for variant in found}
    assert {"topk", "hash", "base"} <= names
    assert "hierarchical" not in names
    assert re.search(r"left out: smoke-hierarchical: .*groups=2 must divide num_experts=9", said), said
