"""The conformance suite passes ours, and catches a layer broken on purpose in each of its laws."""

import itertools
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from turnout import presets
from turnout.cli.main import app_of
from turnout.config import dump_toml
from turnout.dispatch import FixedCapacity
from turnout.errors import ConfigError
from turnout.layers import MoE, MoEConfig
from turnout.losses import LoadBalance
from turnout.routers import DeviceLimited, Sinkhorn, TopK
from turnout.train.recipes import load_recipe
from turnout.verify import CHECKS, Result, Sizes, Subject, cases, verify
from turnout.verify.adapters.own import OwnLayer, from_config
from turnout.verify.subject import NotApplicable
from turnout.verify.targets import layer_presets, subject


def healthy(sizes: Sizes) -> OwnLayer:
    return OwnLayer(
        MoE(
            sizes.dim,
            sizes.hidden,
            sizes.num_experts,
            router=TopK(k=sizes.k, renormalize=False),
            losses=(LoadBalance(coefficient=0.1),),
        )
    )


def run(id: str, build: Callable[[Sizes], OwnLayer]) -> Result:
    (result,) = verify(Subject(name="x", build=build), [id])
    return result


class _Broken(OwnLayer):
    """A healthy layer; each subclass breaks one law."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(healthy(sizes).module)


class _Louder(_Broken):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask) * (1 + 3e-5)


class _Rounded(_Broken):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x, mask)
        return y + (y * 3).round() * 0.02 if x.dtype == torch.bfloat16 else y


class _NeedsTokens(_Broken):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if x.shape[1] == 0:
            raise RuntimeError("cannot reshape tensor of 0 elements")
        return super().forward(x, mask)


class _Place(_Broken):
    """The answer depends on the place in the batch."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        place = torch.arange(x.shape[-2]).to(x.dtype).unsqueeze(1)
        return super().forward(x, mask) * (1 + 1e-6 * place)


class _BatchNorm(_Broken):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x, mask)
        return y - 0.01 * y.mean(dim=(0, 1)) if y.numel() else y


class _PerRow(_Broken):
    """Sequences of a batch see each other's number."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask) * (1 + 0.1 * (x.shape[0] - 1))


class _Strides(_Broken):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x.as_strided(x.shape, torch.empty(x.shape).stride()), mask)


class _Writes(_Broken):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x, mask)
        if self.module.training:
            with torch.no_grad():
                x.mul_(1.01)
        return y


class _Single(_Broken):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask) * (2.0 if self.num_experts == 1 else 1.0)


class _Float32(_Broken):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask).float()


class _Overflow(_Broken):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask) + 1e-30 * x.exp() if x.abs().max() > 1e3 else super().forward(x, mask)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, y_grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return y_grad * 1.01


class _Gradient(_Broken):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return _Scaled.apply(super().forward(x, mask))  # pyright: ignore[reportReturnType]


class _DeadRouter(_Broken):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for parameter in self.module.router.parameters():
            parameter.requires_grad_(True)
        gate_TE = self.gates(x.reshape(-1, self.dim)).detach()
        y_TD = sum(gate_TE[:, e : e + 1] * f(x.reshape(-1, self.dim)) for e, f in enumerate(self.experts()))
        return torch.as_tensor(y_TD).view_as(x)


class _OneWeight(_Broken):
    """Weighs its choices by 1, up to the rounding of its gate in float32."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x_TD = x.reshape(-1, self.dim)
        gate_TE = self.gates(x_TD)
        weight_TE = (gate_TE != 0) * (1 + 3e-6 * gate_TE)
        y_TD = sum(weight_TE[:, e : e + 1] * f(x_TD) for e, f in enumerate(self.experts()))
        return torch.as_tensor(y_TD).view_as(x)


class _Stray(_Broken):
    """Unused experts get a little gradient."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        extra = sum(1e-9 * p.sum() for p in self.module.experts.parameters())
        return super().forward(x, mask) + extra


class _NeedsDense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, y_grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not y_grad.is_contiguous():
            raise RuntimeError("grad must be contiguous")
        return y_grad


class _Expanded(_Broken):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return _NeedsDense.apply(super().forward(x, mask))  # pyright: ignore[reportReturnType]


class _Counter(_Broken):
    """What it returns depends on how often it was called."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.module.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self.module.get_buffer("calls").add_(1)
        return super().forward(x, mask) * (1 + 1e-3 * float(self.module.get_buffer("calls")))


class _CountsInTraining(_Counter):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask) if self.module.training else OwnLayer.forward(self, x, mask)


class _Uninitialised(_Broken):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask) + torch.empty(1, dtype=x.dtype).fill_(0) + _never_written(x)


def _never_written(x: Tensor) -> Tensor:
    """NaN where torch fills fresh memory with it; zero elsewhere, so that this test does not depend on chance."""
    fresh = torch.empty(3, dtype=x.dtype)
    return x.new_zeros(()) if not fresh.isnan().any() else fresh.sum()


class _IgnoresMask(_Broken):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        return y - 0.01 * y.mean(dim=(0, 1)) if y.numel() else y

    def counts(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().counts(x)

    def auxiliary_loss(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().auxiliary_loss(x)


class _EmptyMean(_Broken):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x, mask)
        return y if mask is None else y + 0 * x[mask].mean()


class _LowPrecisionRouter(_Broken):
    def gates(self, x_TD: Tensor) -> Tensor:
        if x_TD.dtype != torch.bfloat16:
            return super().gates(x_TD)
        logits_TE = (x_TD @ self.module.router.get_parameter("score.weight_ED").T * 2).round()
        return torch.zeros_like(logits_TE).scatter(1, logits_TE.topk(self.module.config.router.choices, 1).indices, 1.0)


class _Random(_Broken):
    def gates(self, x_TD: Tensor) -> Tensor:
        return super().gates(x_TD + 0.1 * torch.randn_like(x_TD))


class _LastOfTies(_Broken):
    def gates(self, x_TD: Tensor) -> Tensor:
        return super().gates(x_TD).flip(1)


class _NaNWhenSure(_Broken):
    def gates(self, x_TD: Tensor) -> Tensor:
        gate_TE = super().gates(x_TD)
        return gate_TE / (gate_TE < 1 - 1e-6) if gate_TE.numel() else gate_TE


class _NoisyTraining(_Broken):
    def gates(self, x_TD: Tensor) -> Tensor:
        return super().gates(x_TD + 0.5 * torch.randn_like(x_TD)) if self.module.training else super().gates(x_TD)


class _Negative(_Broken):
    def gates(self, x_TD: Tensor) -> Tensor:
        return super().gates(x_TD) * -1


class _Undercounts(_Broken):
    def counts(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().counts(x, mask) // 2


class _SumsLoss(_Broken):
    def auxiliary_loss(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().auxiliary_loss(x, mask) * x.shape[1]


class _LossOnExperts(_Broken):
    def auxiliary_loss(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().auxiliary_loss(x, mask) + 1e-3 * super().forward(x, mask).square().mean()


class _LossOfRounding(_Broken):
    """A loss of scores that sum to 1, up to rounding in float32."""

    def auxiliary_loss(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        loss = super().auxiliary_loss(x, mask)
        return loss.detach() + 1e-7 * loss


class _LossOnTheQuiet(_Broken):
    """Reaches an expert too, ever so little."""

    def auxiliary_loss(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        extra = sum(1e-12 * p.sum() for p in self.module.experts.parameters())
        return super().auxiliary_loss(x, mask) + extra


class _SharedLoss(_Broken):
    """The loss of the last call of anybody, as kept in a class attribute."""

    last: Tensor | None = None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        type(self).last = super().auxiliary_loss(x, mask)
        return super().forward(x, mask)

    def auxiliary_loss(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().auxiliary_loss(x, mask) if type(self).last is None else type(self).last  # type: ignore[return-value]


class _RewardsImbalance(_Broken):
    def auxiliary_loss(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return -super().auxiliary_loss(x, mask)


class _Shared(_Broken):
    """Every layer of the process scales by what the last one saw."""

    scale = 1.0

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        type(self).scale = 1 + 1e-3 * float(x.detach().sum())
        return _Late.apply(super().forward(x, mask), type(self))  # pyright: ignore[reportReturnType]


class _Late(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, y: Tensor, owner: type[_Shared]) -> Tensor:
        ctx.owner = owner  # type: ignore[attr-defined]
        return y.clone()

    @staticmethod
    def backward(ctx: object, y_grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return y_grad * ctx.owner.scale, None  # type: ignore[attr-defined]


class _Hidden(_Broken):
    """A weight no checkpoint holds, another one in each layer."""

    scales = itertools.count(1.0)

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.own_scale = next(self.scales)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask) * self.own_scale


class _Unseeded(_Broken):
    generator = torch.Generator()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        noise = torch.randn(x.shape, generator=type(self).generator, dtype=x.dtype)
        return super().forward(x + 0.01 * noise if self.module.training else x, mask)


class _Detached(_Broken):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask).detach().requires_grad_()


class _Autocast(_Broken):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x, mask)
        return y * 1.5 if torch.is_autocast_enabled("cpu") else y


class _Inference(_Broken):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x, mask)
        return y * 1.5 if torch.is_inference_mode_enabled() else y


class _ShallowCopy(_Broken):
    def __deepcopy__(self, memo: object) -> "_ShallowCopy":
        return self


class _OtherCopy(_Broken):
    def __deepcopy__(self, memo: object) -> "_OtherCopy":
        other = _OtherCopy(Sizes(dim=self.dim, num_experts=self.num_experts, k=1))
        other.module.double()
        return other


BROKEN: dict[str, type[_Broken]] = {
    "O1": _Louder,
    "O2": _Louder,
    "O3": _Rounded,
    "O4": _NeedsTokens,
    "O5": _Place,
    "O6": _Place,
    "O7": _BatchNorm,
    "O8": _PerRow,
    "O9": _Strides,
    "O10": _Writes,
    "O11": _Single,
    "O12": _Louder,
    "O13": _Float32,
    "O14": _Overflow,
    "G1": _Gradient,
    "G2": _Gradient,
    "G3": _DeadRouter,
    "G4": _Stray,
    "G5": _Expanded,
    "G6": _NeedsTokens,
    "G7": _CountsInTraining,
    "G8": _Counter,
    "G9": _BatchNorm,
    "G10": _Uninitialised,
    "P1": _IgnoresMask,
    "P2": _IgnoresMask,
    "P3": _IgnoresMask,
    "P4": _IgnoresMask,
    "P5": _EmptyMean,
    "R1": _LowPrecisionRouter,
    "R2": _Random,
    "R3": _LastOfTies,
    "R4": _NaNWhenSure,
    "R5": _NoisyTraining,
    "R6": _Negative,
    "R7": _Undercounts,
    "R8": _OtherCopy,
    "A1": _SumsLoss,
    "A2": _IgnoresMask,
    "A3": _LossOnExperts,
    "A4": _SharedLoss,
    "A5": _RewardsImbalance,
    "S1": _Counter,
    "S2": _CountsInTraining,
    "S3": _Shared,
    "S4": _Hidden,
    "S5": _Unseeded,
    "S6": _Detached,
    "S7": _Autocast,
    "S8": _Inference,
    "S9": _ShallowCopy,
}


def test_every_check_has_a_broken_layer() -> None:
    assert set(BROKEN) == set(CHECKS.names())


@pytest.mark.parametrize("id", CHECKS.names())
def test_a_healthy_layer_passes(id: str) -> None:
    result = run(id, healthy)
    assert result.outcome == "pass", result


ALSO_BROKEN = (("G3", _OneWeight), ("A3", _LossOfRounding), ("A3", _LossOnTheQuiet))


@pytest.mark.parametrize(("id", "broken"), [*sorted(BROKEN.items()), *ALSO_BROKEN])
def test_a_layer_broken_on_purpose_is_caught(id: str, broken: type[_Broken]) -> None:
    result = run(id, broken)
    assert result.outcome == "fail", result
    assert result.case


def test_a_loss_is_not_asked_to_move_a_router_that_chooses_all() -> None:
    def all_chosen(sizes: Sizes) -> OwnLayer:
        router = TopK(k=sizes.num_experts, renormalize=False)
        return OwnLayer(MoE(sizes.dim, sizes.hidden, sizes.num_experts, router=router, losses=(LoadBalance(),)))

    assert run("A3", all_chosen).outcome == "not applicable"


@pytest.fixture
def fewer_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the four sizes, and three of the five numbers of tokens."""
    monkeypatch.setattr(cases, "SIZES", cases.SIZES[1::2])
    monkeypatch.setattr(cases, "TOKENS", cases.TOKENS[::2])


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", layer_presets())
def test_layers_of_the_papers_pass_what_applies_to_them_in_every_size(name: str) -> None:
    assert_passes(name)


@pytest.mark.usefixtures("fewer_cases")
@pytest.mark.parametrize("name", ["gshard", "tutel", "deepseek_v3", "locmoe_plus"])
def test_layers_of_the_papers_pass_what_applies_to_them(name: str) -> None:
    assert_passes(name)


def assert_passes(name: str) -> None:
    failed = {r.id: r.case for r in verify(subject(name)) if r.outcome == "fail"}
    assert set(failed) == KNOWN_FAILURES.get(name, set()), failed


# laws the papers themselves give up: capacity makes a token's way depend on those before it, chance on the draw,
# expert choice on the whole batch, in training or always; the same in all sizes and in fewer
KNOWN_FAILURES: dict[str, set[str]] = {
    "gshard": {"G9", "O6", "O7", "R5"},
    "switch": {"G9", "O6", "O7"},
    "tutel": {"G9", "O6", "O7"},
    "locmoe": {"G9", "O6", "O7"},
    "locmoe_plus": {"R5"},
    "expert_choice": {"G9", "O7"},
}


@pytest.mark.usefixtures("fewer_cases")
def test_tokens_chosen_at_random_for_a_full_expert_are_the_same_ones_in_every_look_at_the_layer() -> None:
    results = verify(Subject(name="random capacity", build=_random_capacity))
    failed = {r.id: r.case for r in results if r.outcome == "fail"}
    # who is drawn hangs on the whole call; where all scores tie (R3), on chance
    assert set(failed) == {"O6", "O7", "G9", "R3"}, failed


def _random_capacity(sizes: Sizes) -> OwnLayer:
    router, capacity = TopK(k=sizes.k, renormalize=False), FixedCapacity(factor=0.7, priority="random")
    return OwnLayer(MoE(sizes.dim, sizes.hidden, sizes.num_experts, router=router, capacity=capacity))


def test_a_user_s_module_is_seen_from_outside() -> None:
    results = {r.id: r for r in verify(subject("tests.paths.test_verify:plain_network"))}
    assert results["O6"].outcome == results["G2"].outcome == results["S6"].outcome == "pass"
    assert results["P1"].outcome == "not applicable"
    assert results["P1"].case == "its forward takes no mask"
    assert results["O1"].case == "shows no routing weights"


def plain_network(dim: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), nn.Linear(hidden, dim))


@pytest.mark.usefixtures("fewer_cases")
def test_the_verb_prints_the_failures_and_exits_with_1() -> None:
    done = CliRunner().invoke(app_of(), ["verify", "tests.paths.test_verify:forgetful", "--json"])
    assert done.exit_code == 1
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    failed = {check["id"] for check in answer["checks"] if check["outcome"] == "fail"}
    assert "S1" in failed
    assert answer["failed"] == len(failed)
    assert answer["passed"] + answer["failed"] + answer["not_applicable"] == len(CHECKS)


def test_what_is_not_finite_is_null_in_json(turnout) -> None:
    result = turnout("verify", "tests.paths.test_verify:nothing_but_nan", "--only", "O6", "--json")
    assert result.code == 1
    (check,) = json.loads(result.out.strip().splitlines()[-1], parse_constant=pytest.fail)["checks"]
    assert check["error"] is None


class NothingButNaN(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x) * float("nan")


def nothing_but_nan(dim: int, hidden: int) -> nn.Module:
    return NothingButNaN(dim)


def test_groups_that_no_size_of_the_suite_has_are_checked_in_the_recipe_s_own() -> None:
    config = MoEConfig(num_experts=64, hidden=8, router=DeviceLimited(k=6, groups=8, top_groups=3))
    results = verify(from_config("grouped", 16, config), ["O1", "O6"])
    assert [result.outcome for result in results] == ["pass", "pass"]


def test_a_recipe_is_checked_as_set(turnout, tmp_path: Path) -> None:
    checks = ("--only", "O1,R2", "--set", "model.moe.router=sinkhorn")
    result = turnout("verify", "tiny", *checks, "--json")
    assert result.code == 0, result.err
    answer = json.loads(result.out.strip().splitlines()[-1])
    assert (answer["target"], answer["settings"]) == ("tiny", ["model.moe.router=sinkhorn"])
    dump = dump_toml(load_recipe("smoke"))
    (tmp_path / "recipe.toml").write_text(dump, encoding="utf-8")
    for target in (str(tmp_path), str(tmp_path / "recipe.toml")):
        layer = subject(target, ["model.moe.router=sinkhorn"]).layer(Sizes())
        assert isinstance(layer, OwnLayer)
        assert layer.module.config.router == Sinkhorn(k=2)
    assert (tmp_path / "recipe.toml").read_text(encoding="utf-8") == dump


@pytest.mark.parametrize(
    ("target", "setting", "words"),
    [
        ("mixtral", "model.moe.router=base", "--set model.moe.router=base changes a recipe, which 'mixtral' is not"),
        ("transformers:mixtral", "a=1", "which 'transformers:mixtral' is not; recipes: .*tiny"),
        ("tinny", "a=1", "which 'tinny' is not; recipes: .*did you mean 'tiny'"),
        ("tiny", "model.moe.router=sinkhornn", "did you mean 'sinkhorn'"),
        ("tiny", "model.moe.router=expert_choice", "router.in_decoder='allow'"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(turnout, target: str, setting: str, words: str) -> None:
    result = turnout("verify", target, "--set", setting)
    assert result.code == 2, result.out
    assert re.search(words, " ".join(result.err.split()))


def test_a_router_s_own_loss_is_an_auxiliary_loss() -> None:
    (result,) = verify(subject("tiny", ["model.moe.router=remoe"]), ["A1"])
    assert result.outcome == "pass", result


@pytest.mark.usefixtures("fewer_cases")
def test_experts_between_latent_projections_are_seen() -> None:
    results = verify(subject("tiny", ["model.moe.latent_dim=8"]), ["O1", "O12", "G1", "G4"])
    assert [result.outcome for result in results] == ["pass"] * 4, results


def test_a_layer_that_fits_no_size_at_all_is_not_a_success(turnout, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_fits(*args: object, **kwargs: object) -> None:
        raise NotApplicable("no size fits")

    monkeypatch.setattr("turnout.verify.adapters.own._preset", none_fits)
    result = turnout("verify", "mixtral")
    assert result.code == 1
    assert "nothing was checked" in result.out


def test_a_factory_that_gives_no_layer_is_one_clear_error(turnout) -> None:
    result = turnout("verify", "tests.paths.test_verify:nothing")
    assert result.code == 2, result.out
    assert "the factory gave a NoneType; needs an nn.Module" in result.err
    assert "failed" not in result.out


def nothing(dim: int) -> None:
    del dim


def test_a_factory_that_raises_is_one_clear_error(turnout) -> None:
    result = turnout("verify", "tests.paths.test_verify:broken")
    assert result.code == 2, result.out
    assert "gave no layer when asked for Sizes(dim=16, hidden=24, num_experts=6, k=2): ValueError: no" in result.err
    assert "failed" not in result.out


def broken(dim: int) -> nn.Module:
    raise ValueError(f"no layer of {dim}")


def test_ids_of_checks_may_have_spaces_between_them_and_come_twice(turnout) -> None:
    result = turnout("verify", "tests.paths.test_verify:plain_network", "--only", "O6, G2,O6")
    assert result.code == 0, result.err
    assert "2 passed" in result.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--only", ","), "names no check"),
        (("--only", "O1", "--parallel", "2"), "--only names checks of a layer"),
        (("--parallel", "-1"), "Invalid value"),
    ],
)
def test_options_that_ask_for_nothing_are_refused(turnout, arguments: tuple[str, ...], words: str) -> None:
    result = turnout("verify", "tiny", *arguments)
    assert result.code == 2, result.out
    assert words in result.err


def forgetful(dim: int, hidden: int, num_experts: int, k: int) -> _Broken:
    return _Counter(Sizes(dim=dim, hidden=hidden, num_experts=num_experts, k=k))


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("mixtrall", r"unknown target 'mixtrall'; available: .*did you mean 'mixtral'"),
        ("tiny-dense", r"has no Mixture-of-Experts layer"),
        ("no_such_package:f", r"cannot import 'no_such_package'"),
        ("json:no_such_function", r"has no function 'no_such_function'"),
        ("transformers:bert", r"unknown transformers block 'bert'; available: mixtral"),
    ],
)
def test_a_wrong_target_names_what_there_is(target: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        subject(target)


@pytest.mark.parametrize("body", ["1 / 0", "raise SystemExit(3)"])
def test_a_module_that_raises_when_it_is_imported_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    (tmp_path / "broken_layers.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot import 'broken_layers' of 'broken_layers:build': (Zero|SystemExit)"):
        subject("broken_layers:build")


def test_the_verb_finds_a_module_in_the_folder_one_stands_in(
    turnout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # sys.path as the console script has it: without the current folder
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "layers_of_mine.py").write_text(
        "from torch import nn\n\n\ndef build(dim):\n    return nn.Linear(dim, dim)\n"
    )
    result = turnout("verify", "layers_of_mine:build", "--only", "O6")
    assert result.code == 0, result.err
    assert "1 passed" in result.out


def test_an_unknown_check_is_named() -> None:
    with pytest.raises(ConfigError, match="unknown check 'Z9'"):
        verify(subject("mixtral"), ["Z9"])


def test_sizes_a_layer_cannot_take_are_left_out() -> None:
    preset = subject("mixtral")
    result = next(iter(verify(preset, ["O11"])))
    assert (result.outcome, "k=1" in result.case) == ("not applicable", True)
    assert replace(preset, name="y").name == "y"
    assert presets.mixtral(8, 8, 4).config.router.choices == 2
