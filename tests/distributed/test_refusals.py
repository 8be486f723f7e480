"""What cannot be honoured is one clear error, before anything is trained."""

import re
import socket
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from torch import nn

from turnout import MoE, Strategy
from turnout.cli.training import Training
from turnout.comm import World, expert_mesh, join
from turnout.config import from_dict
from turnout.errors import ConfigError, TransportError
from turnout.parallel import apply, check_supported
from turnout.topology import Mesh
from turnout.train.agreement import claim
from turnout.train.recipe import LoopConfig, Recipe, check_ranks
from turnout.train.recipes import load_recipe
from turnout.train.tuned import with_strategy
from turnout.verify import parallel

REFUSED = [
    (Strategy(cp=2), "strategy.cp=2 can be planned (turnout plan) but not trained with in this version; legal: 1"),
    (Strategy(tp=2, etp=2), "strategy.etp=2 with tp=2: slices of an expert would get every token tp times; nearest"),
    (Strategy(tp=2, alltoall="coordinated"), "strategy.alltoall='coordinated' with tp=2 can be planned"),
    (
        Strategy(zero=2),
        "strategy.zero=2 can be planned (turnout plan) but not trained with in this version; legal: 0, 3",
    ),
    (Strategy(zero_size=2), "strategy.zero_size=2 needs strategy.zero=3; nearest legal: 0"),
    (Strategy(zero=3, zero_size=1), "strategy.zero_size=1 with strategy.zero=3 shards nothing; nearest legal: zero=0"),
    (Strategy(overlap=3), "strategy.overlap=3 can be planned (turnout plan) but not trained with in this version"),
    (Strategy(recompute="full"), "strategy.recompute='full' can be planned"),
    (Strategy(dispatch_precision="fp8"), "strategy.dispatch_precision='fp8' can be planned"),
    (Strategy(alltoall="flatt"), "unknown all-to-all program 'flatt'; available: coordinated, flat"),
]


@pytest.mark.parametrize(("strategy", "text"), REFUSED)
def test_a_strategy_this_version_does_not_train_with_is_refused(strategy: Strategy, text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        check_supported(strategy)
    with pytest.raises(ConfigError, match=re.escape(text)):
        Recipe(strategy=strategy)


SEQUENCES = "model.moe.losses=[{name = 'load_balance', scope = 'sequence'}]"


def tensor(*settings: str) -> Recipe:
    """A recipe whose heads two ranks can share."""
    own = [setting if "." in setting.partition("=")[0] else f"strategy.{setting}" for setting in settings]
    return load_recipe("smoke", ["model.attention.num_kv_heads=2", *own])


def layer(**settings: object) -> MoE:
    return MoE(4, 4, 4, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cause", "text"),
    [
        (lambda: Recipe(strategy=Strategy(micro_batch=2)), r"strategy\.micro_batch=2: a recipe says that by loop"),
        (
            lambda: Recipe(strategy=Strategy(precision="fp32")),
            r"strategy\.precision='fp32': a recipe says that by loop",
        ),
        (
            lambda: Recipe(strategy=Strategy(ep=2), loop=LoopConfig(compile=True)),
            r"loop\.compile=true with strategy\.ep=2.*nearest legal: loop\.compile=false",
        ),
        (
            lambda: Recipe(strategy=Strategy(tp=2), loop=LoopConfig(compile=True)),
            r"loop\.compile=true with strategy\.tp=2.*nearest legal: loop\.compile=false",
        ),
        (
            lambda: Recipe(strategy=Strategy(tp=2), loop=LoopConfig(tune="auto")),
            r"loop\.tune='auto' with strategy\.tp=2.*nearest legal: loop\.tune=\"\"",
        ),
        (
            lambda: check_ranks(load_recipe("smoke", ["strategy.tp=2"]), 2),
            r"strategy\.tp=2 must divide attention\.num_kv_heads=1 of blocks\.0\.attention; nearest legal: 1",
        ),
        (lambda: check_ranks(tensor("tp=2", 'model.attention.qk_norm="full"'), 2), r"qk_norm='full' of blocks\.0\.att"),
        (lambda: check_ranks(tensor("tp=2", "ep=2"), 2), r"strategy\.ep=2 must divide dp \* cp=1; nearest legal: 1"),
        (lambda: check_ranks(tensor("tp=2", "ep=2"), 1), r"tp=2 \* ep=2 needs at least 4 processes"),
        (lambda: check_ranks(tensor("tp=2", "ep=2", "folded=true"), 1), r"tp=2 \* ep=2 needs at least 2 processes"),
        (lambda: check_ranks(tensor("tp=2"), 6), r"batch_size=4 is that of all 3 groups of tp=2 ranks.*legal: 3"),
        (
            lambda: check_ranks(tensor("tp=2", "sequence_parallel=true", SEQUENCES), 8),
            r"LoadBalance counts over scope=",
        ),
        (
            lambda: apply(layer(), Strategy(tp=2, sequence_parallel=True), world=World(size=2, local_size=2)),
            r"strategy\.sequence_parallel=True cuts the tokens of a Decoder; MoE is none; nearest legal: False",
        ),
        (lambda: LoopConfig(timeout_s=0.0), r"loop\.timeout_s=0\.0 must be from 1 to 86400"),
        (lambda: check_ranks(load_recipe("smoke", ["strategy.ep=2"]), 1), r"ep=2 needs at least 2 processes: torchrun"),
        (lambda: check_ranks(load_recipe("smoke"), 3), r"loop\.batch_size=4 is that of all 3 ranks.*nearest legal: 3"),
        (
            lambda: check_ranks(load_recipe("smoke", ["strategy.ep=3", "loop.batch_size=6", "loop.tune=auto"]), 6),
            r"strategy\.ep=3 must divide num_experts=",
        ),
        (
            lambda: check_ranks(load_recipe("smoke", ["strategy.ep=16"]), 16),
            r"strategy\.ep=16 must not exceed num_experts=\d+: each rank holds at least one; .*share an expert by etp",
        ),
        (lambda: check_ranks(load_recipe("tiny-dense", ["strategy.ep=2"]), 2), r"strategy\.ep=2 needs experts"),
        (lambda: expert_mesh(2, 3), r"strategy\.ep=2 would cut through nodes of 3 ranks; nearest legal: 1"),
        (lambda: expert_mesh(4, 3), r"strategy\.ep=4 would cut through nodes of 3 ranks; nearest legal: 3"),
        (lambda: expert_mesh(3, 4, "etp"), r"strategy\.etp=3 would cut through nodes of 4 ranks; nearest legal: 2"),
        (
            lambda: check_ranks(load_recipe("smoke", ["strategy.ep=2", "strategy.etp=2"]), 1),
            r"strategy\.ep=2 \* etp=2 needs at least 4 processes",
        ),
        (lambda: check_ranks(load_recipe("smoke", ["strategy.etp=3"]), 3), r"strategy\.etp=3 must divide moe\.hidden="),
        (lambda: check_ranks(load_recipe("smoke", ["strategy.etp=4"]), 2), r"strategy\.ep \* etp=4 must divide world"),
        (
            lambda: Recipe(strategy=Strategy(zero=3), loop=LoopConfig(compile=True)),
            r"loop\.compile=true with strategy\.zero=3.*nearest legal: loop\.compile=false",
        ),
        (
            lambda: apply(layer(), Strategy(ep=2, zero=3, zero_size=2), world=World(size=4, local_size=4)),
            r"strategy\.zero_size=2 with copies of shared experts \(ep=2, etp=1 on dp=4 ranks\).*nearest legal: 0",
        ),
        (
            lambda: Strategy(tp=2, tp_overlap=2),
            r"strategy\.tp_overlap=2 cuts .* sequence_parallel, which is off; nearest",
        ),
        (
            lambda: Strategy(zero_sum="step"),
            r"strategy\.zero_sum='step' says how often zero=3 sums .* and zero=0; nearest",
        ),
        (lambda: Strategy(etp=4, adaptive_r=3), r"strategy\.adaptive_r=3 must be 0 or divide etp=4 .*nearest legal: 2"),
        (
            lambda: apply(layer(), Strategy(ep=2, zero=3, adaptive_r=0), world=World(size=4, local_size=4)),
            r"strategy\.adaptive_r=0 with zero=3 would gather slices of shards \(ep=2, etp=1.*nearest legal: -1",
        ),
        (
            lambda: apply(layer(), Strategy(ep=2, zero=3, overlap=2), world=World(size=4, local_size=4)),
            r"strategy\.overlap=2 with zero=3 would gather shards of shared experts \(ep=2, etp=1.*nearest legal: over",
        ),
        (
            lambda: check_ranks(load_recipe("smoke", ["strategy.zero=3", "strategy.zero_size=3"]), 4),
            r"strategy\.zero_size=3 must divide dp \* cp=4; nearest legal: 2",
        ),
        (
            lambda: Recipe(strategy=Strategy(etp=2), loop=LoopConfig(compile=True)),
            r"loop\.compile=true with strategy\.etp=2",
        ),
        (
            lambda: apply(layer(), Strategy(etp=3), world=World(size=3, local_size=3)),
            r"strategy\.etp=3 must divide moe\.hidden=4; nearest legal: 2",
        ),
        (
            lambda: apply(layer(expert=lambda: nn.Linear(4, 4)), Strategy(etp=2), world=World(size=2, local_size=2)),
            r"strategy\.etp=2: the experts of the layer are modules of your own",
        ),
        (lambda: apply(layer(), Strategy(ep=2)), r"strategy\.ep=2 must divide dp \* cp=1; nearest legal: 1"),
        (
            lambda: apply(layer(expert=lambda: nn.Linear(4, 4)), Strategy(ep=2), world=World(size=2, local_size=2)),
            r"strategy\.ep=2: the experts of the layer are modules of your own",
        ),
    ],
)
def test_what_does_not_fit_is_named(cause: Callable[[], object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        cause()


@pytest.mark.parametrize(
    ("ep", "local", "mesh"),
    [(1, 4, (1, 1)), (2, 4, (1, 2)), (4, 4, (1, 4)), (8, 4, (2, 4)), (4, 1, (4, 1)), (3, 3, (1, 3))],
)
def test_expert_groups_lie_on_nodes(ep: int, local: int, mesh: tuple[int, int]) -> None:
    assert expert_mesh(ep, local) == Mesh(nodes=mesh[0], local=mesh[1])


def test_a_process_alone_applies_a_strategy_and_sends_nothing() -> None:
    model = layer()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    parallel = apply(model, Strategy())
    assert parallel.strategy == replace(Strategy(), dp=1)
    assert parallel.groups.experts is None
    assert not parallel.copies(model)
    assert all(bool((weight == before[name]).all()) for name, weight in model.named_parameters())


def test_torchrun_without_its_variables_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with (
        pytest.raises(ConfigError, match=r"WORLD_SIZE=2 .*RANK is not set; start it with torchrun"),
        join(cuda=False, timeout_s=1.0),
    ):
        pass


TWO = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}


def joined_with(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    """Come in and go, as one process of several that are started by hand."""
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for name, value in ({"MASTER_PORT": str(port)} | TWO | variables).items():
        monkeypatch.setenv(name, value)
    with join(cuda=False, timeout_s=1.0):
        pass


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("WORLD_SIZE", "two", "WORLD_SIZE='two' in the environment must be a whole number; start this with torchrun"),
        ("RANK", "-1", "RANK='-1' in the environment must be a whole number"),
        ("MASTER_PORT", "", "MASTER_PORT='' in the environment must be a whole number"),
        ("RANK", "2", "RANK=2 of WORLD_SIZE=2 with LOCAL_WORLD_SIZE=2: ranks are numbered from 0 to 1"),
        ("LOCAL_WORLD_SIZE", "0", "LOCAL_WORLD_SIZE=0: ranks are numbered from 0 to 1, at least 1 on a node"),
    ],
)
def test_variables_that_no_launcher_sets_are_refused(
    name: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=words):
        joined_with(monkeypatch, **{name: value})


def test_a_rank_alone_says_where_it_waited_for_whom(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TransportError, match=r"rank 1 did not find rank 0 at MASTER_ADDR=127.0.0.1, MASTER_PORT=\d+ "):
        joined_with(monkeypatch, RANK="1", LOCAL_RANK="1")
    with pytest.raises(TransportError, match=r"did not find rank 0 at MASTER_ADDR=nowhere\.invalid"):
        joined_with(monkeypatch, RANK="1", LOCAL_RANK="1", MASTER_ADDR="nowhere.invalid")
    with pytest.raises(TransportError, match=r"rank 0 of 2 did not meet the others at MASTER_ADDR=127\.0\.0\.1"):
        joined_with(monkeypatch)


def test_a_strategy_that_is_auto_means_none_and_a_tuner(tmp_path: Path) -> None:
    plain = load_recipe("smoke")
    auto = replace(plain, loop=replace(plain.loop, tune="auto"))
    assert load_recipe("smoke", ["strategy.ep=4", "strategy=auto"]) == auto
    file = tmp_path / "mine.toml"
    file.write_text('strategy = "auto"\n[loop]\ntune = "known.json"', encoding="utf-8")
    mine = load_recipe(str(file))
    assert (mine.strategy, mine.loop.tune) == (Strategy(), "known.json")
    assert with_strategy(auto, World(size=2, local_size=2)).strategy == Strategy(ep=2)
    assert with_strategy(auto, World()).strategy == Strategy()
    with pytest.raises(ConfigError, match="strategy='any' must be a table, or \"auto\""):
        load_recipe("smoke", ["strategy=any"])


def test_a_folder_that_cannot_be_written_is_named_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"the run's folder .*file/run cannot be written \(.+\); choose another"):
        claim(tmp_path / "file" / "run", World(), resume=False)


def test_a_layout_left_open_is_checked_as_it_will_be(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Recipe] = []

    def start(_: object, __: int, text: str, *___: object) -> None:
        asked.append(from_dict(Recipe, tomllib.loads(text)))
        raise KeyboardInterrupt

    monkeypatch.setattr(parallel, "start_ranks", start)
    with pytest.raises(KeyboardInterrupt):
        parallel.verify_parallel(load_recipe("smoke", ["strategy=auto"]), 2)
    assert asked[0].strategy == Strategy(ep=2)


def test_ranks_that_a_strategy_does_not_fit_are_shown_the_way_out(tmp_path: Path) -> None:
    recipe = load_recipe("smoke", ["strategy.ep=4", "loop.batch_size=12"])
    words = r"strategy\.ep=4 must divide dp \* cp=3; nearest legal: 1; or --set strategy=auto, a layout for the 3 ranks"
    for world, want in (
        (World(size=3, local_size=3), words),
        (World(), r"strategy=auto, a layout for this one process"),
    ):
        with pytest.raises(ConfigError, match=want):
            Training(recipe=recipe, run=tmp_path, screen=Console(), process="", world=world).check()
    with pytest.raises(ConfigError, match=r"loop\.batch_size=4 .* nearest legal: 3$"):
        Training(
            recipe=load_recipe("smoke"), run=tmp_path, screen=Console(), process="", world=World(size=3, local_size=3)
        ).check()


def test_hosts_of_uneven_size_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"RANK": 0, "WORLD_SIZE": 6, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 4, "MASTER_ADDR": "it", "MASTER_PORT": 1}
    for name, value in sizes.items():
        monkeypatch.setenv(name, str(value))
    with (
        pytest.raises(ConfigError, match="WORLD_SIZE=6: ranks must be numbered node by node, equally many on each"),
        join(cuda=False, timeout_s=1.0),
    ):
        pass
