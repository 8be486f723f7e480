"""What a user types: exit codes, one clear error, JSON last, help that names every field."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.contracts.cases import takers
from turnout.cli import options
from turnout.cli.compare_print import print_comparison
from turnout.comm import shared_memory
from turnout.comm.shared_memory import SharedLine
from turnout.config import describe, dump_toml, from_dict, to_dict
from turnout.data.prepare import Dataset
from turnout.errors import ConfigError
from turnout.kernels import trusted_kernel
from turnout.layers import MoE
from turnout.losses import LoadBalance
from turnout.models import Decoder
from turnout.observe.metrics import read_metrics
from turnout.train import checkpoint, doctor
from turnout.train import compare as comparison
from turnout.train.compare import Curve
from turnout.train.loop import Trainer
from turnout.train.recipe import Recipe
from turnout.train.recipes import load_recipe
from turnout.train.signals import StopRequest


@pytest.fixture
def recipe_file(small_recipe: Recipe, tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(dump_toml(small_recipe), encoding="utf-8")
    return path


@pytest.fixture
def kernel_asked_again() -> Iterator[None]:
    """Whether there is a kernel is remembered: here, and by torch.compile."""
    torch.compiler.reset()
    yield
    trusted_kernel.cache_clear()
    torch.compiler.reset()


@pytest.fixture(scope="module")
def trained_run(small_recipe: Recipe, small_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    trainer = Trainer(small_recipe, small_dataset, run)
    trainer.train(StopRequest())
    trainer.finish()
    return run


def test_train_ends_in_a_run_folder_a_report_and_one_json_object(turnout, recipe_file: Path, tmp_path: Path) -> None:
    result = turnout("train", str(recipe_file), "--out", str(tmp_path / "run"), "--json")
    assert result.code == 0, result.err
    summary = json.loads(result.out.splitlines()[-1])
    promised = {"run", "steps", "seconds", "tokens_per_s", "train_loss", "val_loss", "params_total", "params_active"}
    assert promised | {"dropped_share", "max_violation"} <= summary.keys()
    assert summary["steps"] == 12
    for name in ("recipe.toml", "tokenizer.json", "metrics.jsonl", "report.html", "checkpoints/latest", "summary.json"):
        assert (tmp_path / "run" / name).exists(), name


def test_a_dry_run_says_sizes_balance_and_kernel_and_writes_nothing(turnout, recipe_file: Path, tmp_path: Path) -> None:
    result = turnout("train", str(recipe_file), "--out", str(tmp_path / "run"), "--dry-run", "--json")
    facts = json.loads(result.out.splitlines()[-1])
    assert facts["parameters"]["total"] > facts["parameters"]["active"] > 0
    terms = [{"loss": "load_balance", "coefficient": 0.01}]
    assert facts["balance"] == {"live": True, "terms": terms, "router": ""}
    assert facts["experts"]["backend"] in ("fused_cpu", "threaded_mm")
    assert facts["memory_bytes"] > 0
    assert (facts["data_prepared"], facts["fits"], facts["steps"], facts["tokens"]) == (False, True, 12, 12 * 2 * 16)
    assert facts["minutes"] == pytest.approx(12 * facts["seconds_per_step"] / 60)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_looks_at_the_text_and_at_the_memory(turnout, recipe_file: Path) -> None:
    unknown = turnout("train", str(recipe_file), "--data", "no-such-corpus", "--dry-run")
    assert unknown.code == 2
    assert "no-such-corpus" in unknown.err
    huge_layer = ("--set", "model.moe.hidden=1000000", "--set", "model.moe.num_experts=1000")
    huge = turnout("train", str(recipe_file), *huge_layer, "--dry-run")
    assert huge.code == 0
    assert "does not fit" in huge.out


BIASED = "{name = 'deepseek_v3', k = 2, bias_step = %s}"


@pytest.mark.parametrize(
    ("settings", "balanced"),
    [
        (["model.moe.losses=[]"], False),
        (["model.moe.losses=[{name = 'load_balance', coefficient = 0.0}]"], False),
        (["model.moe.losses=[{name = 'router_z', coefficient = 0.1}]"], False),
        (["model.moe.losses=[]", f"model.moe.router={BIASED % 0.0}"], False),
        (["model.moe.losses=[]", f"model.moe.router={BIASED % 0.001}"], True),
        (["model.moe.losses=[{name = 'load_balance', coefficient = 0.01}]"], True),
    ],
)
def test_the_banner_says_when_balancing_is_off(settings: list[str], balanced: bool, turnout, recipe_file: Path) -> None:
    options = [part for setting in settings for part in ("--set", setting)]
    result = turnout("train", str(recipe_file), *options, "--dry-run", "--json")
    assert result.code == 0, result.err
    assert ("NOT balanced" in result.out + result.err) is not balanced
    assert json.loads(result.out.splitlines()[-1])["balance"]["live"] is balanced


def test_generate_is_deterministic_by_seed(turnout, trained_run: Path) -> None:
    options = ("generate", str(trained_run), "--prompt", "a router", "--max-new-tokens", "12", "--seed", "3", "--json")
    first, second = turnout(*options), turnout(*options)
    assert first.code == 0, first.err
    text = json.loads(first.out.splitlines()[-1])
    assert {"text", "tokens", "seconds", "tokens_per_s"} <= text.keys()
    assert text["text"] == json.loads(second.out.splitlines()[-1])["text"]


def test_a_prompt_that_is_not_utf8_is_named(turnout, trained_run: Path) -> None:
    result = turnout("generate", str(trained_run), "--prompt", "ab\udcff")
    assert (result.code, result.out) == (2, "")
    assert "the prompt is not UTF-8 at character 2" in result.err


def test_report_writes_one_file(turnout, trained_run: Path, tmp_path: Path) -> None:
    result = turnout("report", str(trained_run), "-o", str(tmp_path / "r.html"), "--json")
    assert result.code == 0, result.err
    assert (tmp_path / "r.html").stat().st_size == json.loads(result.out.splitlines()[-1])["bytes"]


def test_compare_gives_rows_verdicts_and_a_plot(
    turnout, recipe_file: Path, small_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "ROUNDS", 3)
    dense = tmp_path / "dense.toml"
    model = replace(small_recipe.model, moe=None, hidden=32)
    dense.write_text(dump_toml(replace(small_recipe, name="small-dense", model=model)), encoding="utf-8")
    out = tmp_path / "compare"
    result = turnout("compare", str(recipe_file), str(dense), "--minutes", "0.005", "--out", str(out), "--json")
    assert result.code == 0, result.err
    answer = json.loads(result.out.splitlines()[-1])
    assert [row["recipe"] for row in answer["rows"]] == ["small", "small-dense"]
    keys = {"recipe", "seed", "minutes", "tokens", "val_loss", "tokens_per_s", "seconds_to_loss_of"}
    assert all(keys <= row.keys() for row in answer["rows"])
    assert answer["verdicts"][0]["baseline"] == "small-dense"
    assert (out / "comparison.json").exists()


@pytest.mark.slow
def test_compared_routers_say_what_each_was_trained_with(
    turnout, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "ROUNDS", 2)
    budget = ("--steps", "10", "--out", str(tmp_path / "c"), "--json")
    result = turnout("compare", str(recipe_file), "--routers", "gshard, top_p,base", *budget)
    assert result.code == 0, result.err
    answer = json.loads(result.out.splitlines()[-1])
    rows = {row["recipe"]: row for row in answer["rows"]}
    assert [loss["name"] for loss in rows["small-top_p"]["losses"]] == ["load_balance", "entropy"]
    assert rows["small-gshard"]["router"]["second_expert"] == "random"
    assert rows["small-base"]["sees_later_tokens"] == "training"
    assert list(answer["notes"]) == ["small-top_p", "small-base"]
    said = " ".join(result.err.split())
    assert "small-base sees later tokens in training alone" in said
    assert "small-base: no setting k; experts a token by its own settings: 1, in the recipe: 2" in said
    saved = json.loads((tmp_path / "c" / "comparison.json").read_text(encoding="utf-8"))
    assert saved["curves"][1]["setup"]["losses"] == rows["small-top_p"]["losses"]


@pytest.mark.parametrize(("margin", "words"), [(0.19, "0.1900 nats better"), (-0.19, "0.1900 nats worse")])
def test_a_comparison_says_better_or_worse_on_which_budget_and_from_when(margin: float, words: str) -> None:
    def curve(name: str, loss: float) -> Curve:
        return Curve(
            recipe=name,
            seed=0,
            seconds=(60.0, 120.0),
            tokens=(1, 2),
            val_loss=(5.0, loss),
            tokens_per_s=1.0,
            params_total=1,
            params_active=1,
            train_flops_per_token=1,
            complete=True,
            cpu_share=None,
            dropped_share=0.0,
            declined_share=0.0,
            max_violation=0.0,
            router_entropy=0.0,
            routing=None,
            setup=None,
        )

    screen = Console(file=io.StringIO(), width=300)
    print_comparison(
        screen, [curve("moe", 3.0 - margin), curve("dense", 3.0)], Path("plot"), "dense", "number of steps"
    )
    said = screen.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert f"moe against dense: {words}" in said
    assert ("ahead for good from minute 2.0 of this run" in said) is (margin > 0)
    assert "same number of steps" in said
    assert "wall clock" not in said


BAD_USES: dict[str, tuple[list[str], int, str]] = {
    "a name no folder has": (
        ["train", "smoke", "--set", 'name="a/b"'],
        2,
        r"name='a/b' must be good as the name of a folder",
    ),
    "nothing to explain": (["tune", "--explain", "absent.json"], 2, r"absent.json: no such file; .*tune RECIPE"),
    "a home nobody has": (["train", "smoke", "--data", "~no-such-user/x"], 2, r"knows no home folder '~no-such-user'"),
    "unknown recipe": (["train", "tinny"], 2, r"unknown recipe 'tinny'; built in: .*did you mean 'tiny'"),
    "no recipe": (["train"], 2, r"give a recipe"),
    "missing recipe file": (["train", "nowhere.toml"], 2, r"cannot read nowhere\.toml"),
    "unknown field": (
        ["train", "tiny", "--set", "model.dimm=3"],
        2,
        r"unknown field 'model\.dimm'.*did you mean 'dim'",
    ),
    "layers without end": (
        ["train", "tiny", "--set", "model.num_layers=10000000", "--dry-run"],
        2,
        r"model\.num_layers=10000000 must be from 1 to 1000",
    ),
    "sizes past 64 bits": (
        ["train", "tiny", "--set", "model.moe.hidden=1000000000000", "--dry-run"],
        2,
        r"moe\.hidden=1000000000000 must be from 1 to 1048576",
    ),
    "negative size": (["train", "tiny", "--set", "model.dim=-3"], 2, r"model\.dim=-3 must be from 1 to"),
    "wrong type": (["train", "tiny", "--set", "model.dim=wide"], 2, r"model\.dim='wide' must be an integer"),
    "heads do not divide": (
        ["train", "tiny", "--set", "model.attention.num_kv_heads=3"],
        2,
        r"num_kv_heads=3 must divide num_heads=\d+; legal: \[",
    ),
    "k above experts": (["train", "tiny", "--set", "model.moe.router.k=99"], 2, r"99 experts a token; num_experts="),
    "unknown router": (["train", "tiny", "--set", "model.moe.router.name=topq"], 2, r"unknown router 'topq'.*topk"),
    "unknown backend": (
        ["train", "tiny", "--set", "model.moe.backend=cuda"],
        2,
        r"unknown moe\.backend 'cuda'; available",
    ),
    "unknown corpus": (["train", "smoke", "--data", "shakespear"], 2, r"unknown corpus 'shakespear'.*available"),
    "missing path": (["train", "smoke", "--data", "no/such/folder"], 2, r"no/such/folder"),
    "override without =": (["train", "tiny", "--set", "model.dim"], 2, r"must look like a\.b=value"),
    "resume with a recipe": (["train", "tiny", "--resume", "x"], 2, r"goes on with the run's own recipe"),
    "resume of nothing": (["train", "--resume", "no-run"], 2, r"no-run is not a run folder"),
    "report on nothing": (["report", "no-run"], 2, r"no-run"),
    "generate from nothing": (["generate", "no-run"], 2, r"no-run is not a run folder"),
    "zero minutes": (["compare", "tiny", "--minutes", "0"], 2, r"--minutes 0\.0 must be above 0"),
    "endless comparison": (["compare", "tiny", "--minutes", "inf"], 2, r"--minutes inf must be above 0 and at most"),
    "endless run": (["train", "tiny", "--minutes", "inf"], 2, r"loop\.minutes=inf must be a finite number"),
    "minutes that are no number": (["train", "tiny", "--minutes", "nan"], 2, r"loop\.minutes=nan must be a finite"),
    "minutes past counting": (
        ["train", "tiny", "--minutes", "1e308"],
        2,
        r"minutes=1e\+308 must be above 0 and at most",
    ),
    "more than memory": (
        ["train", "tiny", "--set", "model.moe.hidden=1000000"],
        2,
        r"tiny does not fit: it needs about [\d,]+ MiB and \w+ has [\d,]+",
    ),
    "two lengths": (["train", "tiny", "--minutes", "1", "--steps", "3"], 2, r"--steps 3 and --minutes 1\.0 are two"),
    "too many threads": (
        ["train", "tiny", "--dry-run", "--threads", "1000000"],
        2,
        r"--threads 1000000 must be 1 to \d",
    ),
    "seed past 64 bits": (["generate", "no-run", "--seed", str(2**64)], 2, r"seed=\d+ must be at least -2\*\*63 and"),
    "planner in json": (["plan", "--json"], 2, r"No such option: --json"),
    "unknown bench": (["bench", "speed"], 2, r"No such command 'speed'"),
    "unknown verb": (["trian"], 2, r"No such command 'trian'"),
    "unknown option": (["train", "tiny", "--fast"], 2, r"No such option: --fast"),
    "planner": (["plan", "time", "tiny", "--nodes", "1", "--layout", "tp=3"], 2, r"tp=3 .* must divide world=8"),
    "compare other data": (["compare", "tiny", "smoke"], 2, r"do not use the same data or evaluation"),
}


@pytest.mark.parametrize("case", BAD_USES)
def test_bad_use_is_one_clear_error(case: str, turnout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args, code, pattern = BAD_USES[case]
    monkeypatch.chdir(tmp_path)
    result = turnout(*args)
    assert result.code == code, result
    assert "Traceback" not in result.err
    words = " ".join(result.err.split())
    assert __import__("re").search(pattern, words), words
    assert not (tmp_path / "runs").exists(), "a refused command leaves nothing behind"


def test_invalid_utf8_names_the_file_and_the_byte(turnout, recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"good text " * 50 + b"\xff\xfe")
    result = turnout("train", str(recipe_file), "--data", str(tmp_path / "bad.txt"), "--out", str(tmp_path / "run"))
    assert result.code == 1
    assert "bad.txt" in result.err
    assert "500" in result.err
    assert "Traceback" not in result.err


def test_an_empty_corpus_is_refused(turnout, recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    result = turnout("train", str(recipe_file), "--data", str(tmp_path / "empty.txt"), "--out", str(tmp_path / "run"))
    assert result.code == 1
    assert "empty" in result.err
    assert not (tmp_path / "run").exists()


def test_an_existing_run_is_never_overwritten(turnout, recipe_file: Path, trained_run: Path) -> None:
    before = (trained_run / "metrics.jsonl").read_bytes()
    result = turnout("train", str(recipe_file), "--out", str(trained_run))
    assert result.code == 2
    assert "already holds a run" in result.err
    assert (trained_run / "metrics.jsonl").read_bytes() == before


def test_a_damaged_checkpoint_is_refused_before_use(turnout, trained_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "damaged"
    shutil.copytree(trained_run, run)
    for path in run.glob("checkpoints/step-*/model.safetensors"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    result = turnout("generate", str(run), "--prompt", "a")
    assert result.code == 1
    assert "model.safetensors" in result.err
    assert "Traceback" not in result.err


def test_train_help_documents_every_field_of_a_recipe(turnout) -> None:
    result = turnout("train", "--help")
    assert result.code == 0
    # what a recipe on disk may hold: read from a whole one, not from what help is made of
    written = from_dict(Recipe, {"model": {"moe": {"capacity": {"name": "fixed", "in_decoder": "allow"}}}})
    paths = {re.sub(r"\.\d+", "[]", path) for path in _leaves(to_dict(written)) if not path.endswith(".name")}
    assert {"model.moe.router.k", "model.moe.losses[].coefficient", "model.moe.capacity.factor"} <= paths
    assert [path for path in sorted(paths) if path not in result.out] == []
    # what --set cannot reach stands apart, with the way to set it
    fields, items = result.out.split("Items of a list, set with the whole of it: ")
    assert "[]" not in fields.partition("Fields of a recipe")[2]
    example = items.partition('--set "')[2].partition('"')[0]
    moe = load_recipe("smoke", [example]).model.moe
    assert moe is not None
    assert moe.losses == (LoadBalance(coefficient=0.02),)
    assert [doc.path for doc in describe(Recipe) if not doc.text.strip(": ")] == []


def _leaves(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path


@pytest.mark.parametrize("verb", ["train", "chat", "generate", "report", "compare", "bench", "doctor", "plan"])
def test_every_verb_has_help(verb: str, turnout) -> None:
    result = turnout(verb, "--help")
    assert result.code == 0
    assert "Usage" in result.out


def test_doctor_proves_the_backends(turnout) -> None:
    result = turnout("doctor", "--json")
    assert result.code == 0
    rows = {row["name"]: row for row in json.loads(result.out.splitlines()[-1])["backends"]}
    assert all(rows[name]["proven"] for name in ("loop", "padded_bmm", "grouped_mm"))


def test_doctor_tries_the_memory_that_ranks_of_a_host_share(turnout, monkeypatch: pytest.MonkeyPatch) -> None:
    def row() -> dict[str, Any]:
        found = json.loads(turnout("doctor", "--json").out.splitlines()[-1])["transports"]
        return next(each for each in found if each["name"] == "shared memory")

    assert row()["proven"] == (not shared_memory.why_not())
    right = SharedLine.all_reduce
    monkeypatch.setattr(SharedLine, "all_reduce", lambda self, flat, **how: right(self, flat, **how) + 1)
    wrong = row()
    assert not wrong["proven"]
    assert not wrong["available"] or "a sum is not that of what ranks have" in wrong["reason"]


def test_doctor_and_bench_refuse_a_backend_whose_last_gradient_is_nan(turnout, monkeypatch: pytest.MonkeyPatch) -> None:
    original = doctor._run_layer

    def poisoned(layer: MoE, x_TD: torch.Tensor) -> list[torch.Tensor]:
        tensors = original(layer, x_TD)
        return [*tensors[:-1], tensors[-1] * torch.nan] if layer.config.backend == "padded_bmm" else tensors

    monkeypatch.setattr(doctor, "_run_layer", poisoned)
    result = turnout("doctor", "--json")
    rows = {row["name"]: row for row in json.loads(result.out.splitlines()[-1])["backends"]}
    assert (result.code, rows["padded_bmm"]["proven"], rows["loop"]["proven"]) == (1, False, True)
    refused = turnout("bench", "train-step", "--rounds", "1")
    assert refused.code == 1
    assert "no number is printed on a red gate: padded_bmm" in " ".join(refused.err.split())


def test_sigterm_ends_the_command_with_143_and_it_resumes(
    turnout, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = Decoder.loss, iter(range(100))

    def told_to_end_in_the_third_step(self: Decoder, *args: Any, **settings: Any) -> Any:
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **settings)

    monkeypatch.setattr(Decoder, "loss", told_to_end_in_the_third_step)
    run = tmp_path / "run"
    options = ("--threads", "1", "--set", "loop.eval_every=0", "--out", str(run))
    stopped = turnout("train", str(recipe_file), *options)
    assert stopped.code == 143, stopped.err
    assert "stopped and saved" in stopped.out
    assert checkpoint.load(run).step == 3
    again = turnout("train", "--threads", "1", "--resume", str(run), "--json")
    assert again.code == 0, again.err
    assert again.last["steps"] == 12 == checkpoint.load(run).step
    assert [line["step"] for line in read_metrics(run).steps] == list(range(1, 13))


@pytest.mark.exhaustive
def test_a_run_goes_on_when_its_reader_is_gone(recipe_file: Path, tmp_path: Path) -> None:
    environment = os.environ | {"TURNOUT_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "turnout", "train", str(recipe_file), "--out", str(tmp_path / "run")]
    child = subprocess.Popen(
        [*command, "--threads", "1"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.close()
    assert child.stderr is not None
    assert (child.stderr.read(), child.wait(timeout=120)) == (b"", 0)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 12


def test_a_resumed_run_takes_the_settings_that_may_change(turnout, trained_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    resume = ("train", "--resume", str(run))
    result = turnout(*resume, "--set", "optimizer.lr=1e-5", "--steps", "14", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out.splitlines()[-1])["steps"] == 14
    assert "resumed with optimizer.lr=1e-05 (before: 0.002)" in result.err
    assert read_metrics(run).steps[-1]["lr"] < 1e-5
    refused = turnout(*resume, "--set", "seed=3")
    assert refused.code == 2
    assert "seed=3 cannot take the place of 0, with which the run began" in " ".join(refused.err.split())
    elsewhere = turnout(*resume, "--out", str(tmp_path / "b"))
    assert elsewhere.code == 2
    assert "goes on in that folder; leave out --out" in " ".join(elsewhere.err.split())


@pytest.mark.parametrize(
    ("kernel", "compiled", "backend"),
    [
        ("1", "false", "fused_cpu"),
        ("1", "true", "fused_cpu"),
        ("0", "false", "threaded_mm"),
        ("0", "true", "padded_bmm"),
    ],
)
@pytest.mark.usefixtures("kernel_asked_again")
def test_the_banner_names_the_backend_that_will_run(
    kernel: str, compiled: str, backend: str, turnout, recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel == "1" and "fused_cpu" not in takers(torch.float32):
        pytest.skip("no C++ compiler here")
    monkeypatch.setenv("TURNOUT_COMPILE", kernel)
    trusted_kernel.cache_clear()
    dry = ("--dry-run", "--json", "--set", "loop.precision=float32", "--set", "loop.device=cpu")
    result = turnout("train", str(recipe_file), *dry, "--set", f"loop.compile={compiled}")
    assert result.code == 0, result.err
    assert json.loads(result.out.splitlines()[-1])["experts"]["backend"] == backend


def test_a_step_that_is_left_out_is_told_at_once(
    turnout, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = Decoder.loss, iter(range(100))

    def sick_in_the_third_step(self: Decoder, *args: Any, **settings: Any) -> Any:
        result = original(self, *args, **settings)
        return replace(result, main=result.main * torch.nan) if next(calls) == 2 else result

    monkeypatch.setattr(Decoder, "loss", sick_in_the_third_step)
    skip = ("--set", "loop.nonfinite=skip", "--set", "loop.eval_every=0")
    result = turnout("train", str(recipe_file), *skip, "--out", str(tmp_path / "run"))
    assert result.code == 0, result.err
    assert "step 3: not finite, update left out: main loss is nan" in result.out


def test_a_tokenizer_that_does_not_fit_is_refused_before_a_run_is_made(
    turnout, recipe_file: Path, trained_run: Path, tmp_path: Path
) -> None:
    tokenizer = f"data.tokenizer='{trained_run / 'tokenizer.json'}'"
    small = ("--set", tokenizer, "--set", "model.vocab_size=290", "--set", "data.vocab_size=290")
    result = turnout("train", str(recipe_file), *small, "--out", str(tmp_path / "run"))
    assert result.code == 1
    assert "the tokenizer has 300 tokens, model.vocab_size=290" in result.err
    assert not (tmp_path / "run").exists()


def test_chat_answers_each_line_and_ends_with_the_input(
    turnout, trained_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a router\nthe experts\n"))
    result = turnout("chat", str(trained_run), "--max-new-tokens", "5", "--seed", "1", "--json")
    assert result.code == 0, result.err
    turns = json.loads(result.out.splitlines()[-1])["turns"]
    assert [turn["prompt"] for turn in turns] == ["a router", "the experts"]
    assert all(0 < turn["tokens"] <= 5 for turn in turns)
    assert turns[0]["text"] in result.err


def test_a_path_with_brackets_is_shown_as_it_is(turnout, recipe_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "[bold]run[/]:smile:"
    result = turnout("train", str(recipe_file), "--out", str(run))
    assert result.code == 0, result.err
    assert str(run) in result.out


@pytest.mark.parametrize("text", ["", ",", "1,two", "0,1", "-1", "1.5", "²"])
def test_a_list_of_whole_numbers_is_that_or_refused(text: str) -> None:
    assert options.whole_numbers("--bytes", " 16, 4096,", example="1,2") == (16, 4096)
    with pytest.raises(ConfigError, match=r"--bytes .* must be whole numbers with commas between them, such as 1,2"):
        options.whole_numbers("--bytes", text, example="1,2")
