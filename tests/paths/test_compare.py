"""A comparison is read off curves: margins, time to the other's loss, from when on ahead."""

import math
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from turnout.cli.compare_print import rows_of
from turnout.contracts import Loss, RouterConfig
from turnout.data.prepare import Dataset
from turnout.data.sampler import Batch
from turnout.errors import ConfigError
from turnout.losses import LoadBalance
from turnout.models import Decoder
from turnout.models.size import sizes
from turnout.routers import DeepSeekV3, Forced, Hash, TopK
from turnout.tensors import Assignment
from turnout.train import checkpoint
from turnout.train import compare as comparison
from turnout.train.compare import Curve, ahead_from, check_comparable, compare, seconds_to, verdicts
from turnout.train.compare_plot import write_comparison
from turnout.train.recipe import Recipe
from turnout.train.recipes import load_recipe
from turnout.train.routing_facts import _rows_sent, _told_by_id, routing_facts
from turnout.train.signals import StopRequest
from turnout.train.variants import with_routers


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
    recipes = with_routers(small_recipe, RouterConfig.TABLE.names())
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


@pytest.mark.parametrize(
    ("router", "losses"),
    [(TopK(k=2), (LoadBalance(),)), (Forced(k=2, skew=1.0), ()), (Hash(k=2), ()), (DeepSeekV3(k=2), ())],
)
def test_only_a_router_that_a_loss_can_move_and_must_gets_one(
    router: RouterConfig, losses: tuple[Loss, ...], small_recipe: Recipe
) -> None:
    assert small_recipe.model.moe is not None
    moe = replace(small_recipe.model.moe, router=router, losses=())
    own = replace(small_recipe, model=replace(small_recipe.model, moe=moe))
    (recipe,) = with_routers(own, [RouterConfig.TABLE.name_of(type(router))])
    assert recipe.model.moe == replace(moe, losses=losses)


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
    recipe = load_recipe("smoke", ["model.moe.capacity={name='fixed', factor=0.1, minimum=1}"])
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
