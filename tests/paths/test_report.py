"""The report: one file that shows a run, however long, torn or empty it is."""

import base64
import hashlib
import json
import math
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from turnout.errors import ConfigError
from turnout.observe.metrics import encode
from turnout.observe.report import embed, page_data, write_report
from turnout.observe.run_folder import read_run
from turnout.observe.token_view import TokenView, write_token_view
from turnout.observe.trace import TraceHeader, TraceWriter

TEXT = """def read_lines(path):
    \"\"\"Every line of a file, without its line break.\"\"\"
    with open(path, encoding="utf-8") as file:
        return [line.rstrip("\\n") for line in file]

A railway switch sends each wagon down its own track; here, each token is sent to its experts."""


def synthetic_run(
    run: Path,
    *,
    steps: int = 1500,
    experts: tuple[int, ...] = (8, 8, 8, 8),
    sick: bool = False,
    seed: int = 0,
) -> Path:
    """A run folder as a training leaves it: plausible curves, and troubles of every kind when `sick`."""
    rng = np.random.default_rng(seed)
    run.mkdir(parents=True, exist_ok=True)
    (run / "recipe.toml").write_text('name = "tiny"\n\n[train]\nsteps = 1500\nlr = 3e-3\n')
    (run / "summary.json").write_text('{"params_total": 3240000, "params_active": 1130000}')
    header = TraceHeader(layers=tuple(f"blocks.{i}.moe" for i in range(len(experts))), num_experts=experts)
    trace = TraceWriter(run, header) if experts else None
    taste = [rng.normal(0, 0.5, e) for e in experts]
    with (run / "metrics.jsonl").open("wb") as lines:
        for step in range(1, steps + 1):
            part = step / steps
            loads = [_shares(t, part, sick, index) for index, t in enumerate(taste)]
            counts = [np.round(rng.multinomial(4096, share) * 2) for share in loads]
            if trace:
                flat = np.concatenate(counts).astype(np.int64)
                trace.append(step, flat, np.maximum(flat - 1800, 0) if sick else flat * 0)
            lines.write(encode(_step_line(rng, step, part, sick, counts)))
            if step % max(1, steps // 15) == 0:
                worse = 0.9 * max(0.0, part - 0.6) if sick else 0.0
                val = 2.1 + 2.2 * math.exp(-5 * part) + worse + rng.normal(0, 0.01)
                lines.write(encode(_place("eval", step) | {"val_loss": val}))
            if step % max(1, steps // 5) == 0:
                lines.write(encode({"kind": "event", "step": step, "text": f"saved checkpoints/step-{step}"}))
    if trace:
        trace.file.close()
        for at in (max(1, steps // 10), steps):
            write_token_view(run, _view(rng, at, header))
    return run


def _shares(taste: np.ndarray, part: float, sick: bool, layer: int) -> np.ndarray:
    logits = taste * (2.5 * math.exp(-6 * part) + 0.35)
    if sick and layer == 1:
        logits = logits + 3.0 * part * (np.arange(len(taste)) == 3)
        logits[-2:] -= 14 * part
    share = np.exp(logits - logits.max())
    return share / share.sum()


def _place(kind: str, step: int) -> dict[str, object]:
    return {"kind": kind, "step": step, "seconds": 0.29 * step, "tokens": 4096 * step}


def _step_line(rng, step: int, part: float, sick: bool, counts: list[np.ndarray]) -> dict[str, object]:
    loss = 2.0 + 2.3 * math.exp(-6 * part) + 6 * math.exp(-step / 12) + rng.normal(0, 0.06)
    if sick and step % 400 < 3 and step > 100:
        loss += 2.2
    line = _place("step", step) | {
        "loss": math.nan if sick and step == 700 else loss,
        "aux": {"load_balance": 1 + 0.4 * math.exp(-5 * part) + rng.normal(0, 0.01), "router_z": 3 + 2 * part},
        "total_loss": loss + 0.02,
        "lr": 3e-3 * min(1, step / 100) * (1 - 0.9 * part),
        "grad_norm": 0.8 + 3 * math.exp(-8 * part) + abs(rng.normal(0, 0.15)),
        "tokens_per_s": 14000 + rng.normal(0, 350) - (6000 if sick and part > 0.7 else 0),
    }
    loads = [c * len(c) / c.sum() for c in counts]
    if not loads:
        return line
    peak = [u.max() - 1 for u in loads]
    spread = [u.std() for u in loads]
    entropy = [-(u / len(u) * np.log(np.maximum(u, 1e-9) / len(u))).sum() / math.log(len(u)) for u in loads]
    drops = [float(np.maximum(c - 1800, 0).sum() / c.sum()) if sick else 0.0 for c in counts]
    return line | {
        "max_violation": float(np.mean(peak)),
        "max_violation_worst": float(max(peak)),
        "cv": float(np.mean(spread)),
        "cv_worst": float(max(spread)),
        "entropy": float(np.mean(entropy)),
        "entropy_worst": float(min(entropy)),
        "router_entropy": 0.97 - 0.4 * part,
        "dead_experts": int(sum((u < 0.001).sum() for u in loads)),
        "dead_experts_worst": int(max((u < 0.001).sum() for u in loads)),
        "dropped_share": float(np.mean(drops)),
        "dropped_share_worst": max(drops),
        "margin": 0.05 + 0.3 * part + rng.normal(0, 0.01),
        "margin_worst": 0.03 + 0.2 * part + rng.normal(0, 0.01),
    }


def _view(rng, step: int, header: TraceHeader) -> TokenView:
    pieces = re.findall(r"\s*\w+|\s*[^\w\s]+|\s+", TEXT)
    kind = [0 if p.strip().isalpha() else 1 if p.strip() else 2 for p in pieces]
    experts, weights = [], []
    for num in header.num_experts:
        home = rng.permutation(num)
        firsts = [int(home[(k * 3 + rng.integers(0, 2 + k)) % num]) for k in kind]
        experts.append([[first, (first + 1 + int(rng.integers(0, num - 1))) % num] for first in firsts])
        weights.append([[w, 1 - w] for w in rng.uniform(0.5, 0.95, len(pieces)).tolist()])
    return TokenView(step=step, tokens=pieces, layers=header.layers, experts=experts, weights=weights)


def test_a_report_is_one_file_without_network(tmp_path: Path) -> None:
    out = write_report(synthetic_run(tmp_path / "run", steps=60), tmp_path / "deep" / "report.html")
    page = out.read_text()
    addresses = set(re.findall(r"(?:https?:)?//[\w.]+", _Page.of(page).script.replace("// ", "")))
    assert addresses <= {"http://www.w3.org"}  # a namespace, never fetched
    assert not re.search(r"<(?:link|img|iframe)|<script[^>]*\ssrc|@import|url\((?!#)", page)
    assert "default-src 'none'" in page
    assert not list(out.parent.glob("*.part"))


def test_the_policy_of_the_page_names_its_own_script(tmp_path: Path) -> None:
    page = _Page.of(write_report(synthetic_run(tmp_path / "run", steps=30), tmp_path / "r.html").read_text())
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    assert f"'sha256-{digest}'" in page.policy


def test_hostile_text_of_the_run_never_becomes_markup(tmp_path: Path) -> None:
    evil = "</script><script>document.title='taken'</script><!--<script>{{script}}&\u2028\ud800"
    run = synthetic_run(tmp_path / "run", steps=30)
    (run / "recipe.toml").write_text(f"name = {json.dumps(evil[:40])}\n# {evil[:-1]}\n")
    with (run / "metrics.jsonl").open("ab") as lines:
        lines.write(encode({"kind": "event", "step": 30, "text": evil}))
        lines.write(encode(_place("step", 31) | {"loss": 2.0, "aux": {evil: 1.0}}))
    view = TokenView(step=31, tokens=[evil], layers=[evil], experts=[[[0]]], weights=[[[1.0]]])
    write_token_view(run, view)
    page = _Page.of(write_report(run, tmp_path / "r.html").read_text())
    assert page.count("script") == 2
    assert page.count("title") == 1
    data = json.loads(page.data)
    assert data["tokens"][-1]["tokens"] == [evil]
    assert data["events"][-1][1] == evil
    assert evil in data["aux"]
    assert data["name"] == evil[:40]
    assert "taken" not in page.script


@pytest.mark.parametrize("num_steps", [20_000, pytest.param(100_000, marks=pytest.mark.exhaustive)])
def test_a_run_of_very_many_steps_gives_a_page_under_two_megabytes(num_steps: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    experts = (16, 16)
    line = _step_line(np.random.default_rng(0), 1, 0.5, False, [np.full(16, 10)] * 2)
    rest = encode({name: value for name, value in line.items() if name not in _place("step", 1)})[1:]
    with (run / "metrics.jsonl").open("wb") as lines:
        for step in range(1, num_steps + 1):
            lines.write(b'{"kind":"step","step":%d,"seconds":%d,"tokens":%d,' % (step, step, 4096 * step) + rest)
            if step % (num_steps // 2000) == 0:
                lines.write(encode(_place("eval", step) | {"val_loss": 3.0}))
                lines.write(encode({"kind": "event", "step": step, "text": "x" * 100}))
    header = TraceHeader(layers=("a", "b"), num_experts=experts)
    writer = TraceWriter(run, header)
    records = np.zeros(num_steps, header.record)
    records["step"] = np.arange(1, num_steps + 1)
    records["assigned"] = np.random.default_rng(0).integers(1, 99, (num_steps, 32))
    writer.file.append(records.tobytes())
    writer.file.close()
    start = time.perf_counter()
    out = write_report(run, tmp_path / "r.html")
    print(f"{num_steps:,} steps: {out.stat().st_size / 1e6:.2f} MB in {time.perf_counter() - start:.1f} s")
    assert out.stat().st_size < 2e6


def test_large_token_views_are_cut_and_say_so(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path / "run", steps=30)
    size = 2_500
    for step in range(1, 7):
        rows = [[[1, 2]] * size] * 4
        write_token_view(
            run,
            TokenView(
                step=step, tokens=["word "] * size, layers=list("abcd"), experts=rows, weights=[[[0.5, 0.5]] * size] * 4
            ),
        )
    out = write_report(run, tmp_path / "r.html")
    views = page_data(read_run(run))["tokens"]
    assert out.stat().st_size < 2e6
    assert len(views) <= 4
    assert any(view["total"] == size and len(view["tokens"]) < size for view in views)


def test_a_folder_that_is_no_run_is_refused_with_what_a_run_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a run.*turnout train RECIPE --out RUN"):
        write_report(tmp_path, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_torn_broken_and_missing_parts_are_left_out_and_named(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path / "run", steps=40)
    with (run / "metrics.jsonl").open("ab") as lines:
        lines.write(b'not json\n[1]\n{"kind":"step"}\n{"kind":"step","step":41,"loss":NaN}\n{"kind":"step","st')
    (run / "recipe.toml").write_text("name = = 1")
    (run / "summary.json").write_text("{")
    (run / "trace" / "counts.bin").write_bytes(b"garbage that is long enough")
    (run / "trace" / "tokens-step-9.json").write_text('{"step": 9, "tokens": 3}')
    record = read_run(run)
    data = page_data(record)
    assert record.metrics.steps[-1]["step"] == 41
    assert data["load"] is None
    assert data["name"] == "run"
    assert [view["step"] for view in data["tokens"]] == [4, 40]
    parts = ("metrics.jsonl", "recipe.toml", "summary.json", "counts.bin", "tokens-step-9.json")
    assert [sum(part in note for note in data["notes"]) for part in parts] == [1] * 5
    write_report(run, tmp_path / "r.html")


def _step(text: str) -> bytes:
    return b'{"kind":"step","step":41,' + text.encode() + b"}\n"


HUGE, DEEP = "1" + "0" * 400, "[" * 100_000
VIEW = '{"step":9,"tokens":["a"],"layers":["x"],"experts":[[[0]]],"weights":%s}'
DAMAGES = {
    "metrics.jsonl: huge loss": ("metrics.jsonl", _step(f'"loss":{HUGE},"aux":{{"z":{HUGE}}}'), ""),
    "metrics.jsonl: huge step": ("metrics.jsonl", f'{{"kind":"step","step":{HUGE}}}\n'.encode(), "metrics.jsonl"),
    "metrics.jsonl: largest floats": ("metrics.jsonl", _step('"loss":1.7976931348623157e308,"lr":1.79769313e308'), ""),
    "metrics.jsonl: deep": ("metrics.jsonl", DEEP.encode() + b"\n", "metrics.jsonl"),
    "metrics.jsonl: lists": ("metrics.jsonl", _step('"loss":[1],"seconds":{},"aux":[2]'), ""),
    "summary: deep": ("summary.json", DEEP.encode(), "summary.json"),
    "summary: huge": ("summary.json", f'{{"params_total":{HUGE}}}'.encode(), ""),
    "recipe: deep": ("recipe.toml", f"name = {DEEP}".encode(), "recipe.toml"),
    "recipe: long number": ("recipe.toml", f"name = {'9' * 6000}".encode(), "recipe.toml"),
    "recipe: no such router": ("recipe.toml", b'[model.moe.router]\nname = "nope"', "unknown router 'nope'"),
    "view: no lists": ("trace/tokens-step-9.json", (VIEW % "[[3]]").encode(), "tokens-step-9.json"),
    "view: texts": ("trace/tokens-step-9.json", (VIEW % '[[["b"]]]').encode(), "tokens-step-9.json"),
    "view: too few": ("trace/tokens-step-9.json", (VIEW % "[[[]]]").encode(), "tokens-step-9.json"),
    "view: huge": ("trace/tokens-step-9.json", (VIEW % f"[[[{HUGE}]]]").encode(), ""),
    "view: deep": ("trace/tokens-step-9.json", DEEP.encode(), "tokens-step-9.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_is_left_out_of_the_page_and_named(tmp_path: Path, damage: str) -> None:
    name, content, note = DAMAGES[damage]
    run = synthetic_run(tmp_path / "run", steps=40)
    with (run / name).open("ab" if name == "metrics.jsonl" else "wb") as file:
        file.write(content)
    notes = json.loads(_Page.of(write_report(run, tmp_path / "r.html").read_text()).data)["notes"]
    assert len(notes) == bool(note)
    assert not note or note in notes[0]


@pytest.mark.parametrize(
    ("out", "text"),
    [("folder", "is a folder; name the HTML file"), ("run/metrics.jsonl", "is a file of the run; name an HTML file")],
)
def test_a_page_never_takes_the_place_of_something_else(tmp_path: Path, out: str, text: str) -> None:
    run = synthetic_run(tmp_path / "run", steps=5)
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=text):
        write_report(run, tmp_path / out)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_page_knows_from_the_recipe_whether_the_router_learns(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path / "run", steps=5)
    (run / "recipe.toml").write_text('[model.moe.router]\nname = "topk"\nk = 1\n')
    assert page_data(read_run(run))["routing"]["learns"]
    (run / "recipe.toml").write_text('[model.moe.router]\nname = "hash"\nk = 2\n')
    record = read_run(run)
    assert not page_data(record)["routing"]["learns"]
    assert "every token of one id takes the same k experts" in record.routing.rule
    assert {"k", "tries", "vocab_size"} <= dict(record.routing.settings).keys()


@pytest.mark.parametrize("content", [b"", b'{"kind":"event","step":0,"text":"begun"}\n', b'{"kind":"step","step":1}\n'])
def test_a_run_that_has_barely_begun_has_a_page(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(content)
    assert "Turnout" in write_report(tmp_path, tmp_path / "r.html").read_text()


def test_the_frames_of_the_film_cover_every_step_once(tmp_path: Path) -> None:
    film = page_data(read_run(synthetic_run(tmp_path, steps=500, experts=(4, 6))))["load"]
    assert film["from"][0] == 1
    assert film["to"][-1] == 500
    assert [a + 1 for a in film["to"][:-1]] == film["from"][1:]
    assert len(base64.b64decode(film["codes"])) == 2 * 10 * len(film["to"])


def test_embedded_data_reads_back_as_it_was() -> None:
    data = {"a": "</script><!--&\u2028", "b": [1, None, "\U0001f682"]}
    assert json.loads(embed(data)) == data
    assert not set("<>&") & set(embed(data))


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("kind", ["sick", "fixed", "dense", "empty"])
def test_the_page_draws_itself_in_a_browser(tmp_path: Path, kind: str) -> None:
    run = tmp_path / "run"
    if kind == "empty":
        run.mkdir()
        (run / "metrics.jsonl").touch()
    else:
        synthetic_run(run, steps=120, sick=kind == "sick", experts=(8, 4) if kind in ("sick", "fixed") else ())
    if kind == "fixed":
        (run / "recipe.toml").write_text('[model.moe.router]\nname = "hash"\nk = 2\n')
    dom, log = _browse(write_report(run, tmp_path / "r.html"), tmp_path / "profile")
    dom = re.sub(r"<script.*?</script>", "", dom, flags=re.DOTALL)
    assert "CONSOLE" not in log, log
    assert "Written by Turnout" in dom
    assert ("No steps recorded yet" in dom) == (kind == "empty")
    assert ("No MoE layers were recorded" in dom) == (kind in ("dense", "empty"))
    assert ("This router does not learn" in dom) == (kind == "fixed")
    assert ("Router margin" in dom) == (kind == "sick")
    assert "NaN" not in dom


class _Page(HTMLParser):
    """The elements of a page, as a browser would split them."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.scripts: list[str] = []
        self.policy = ""

    @classmethod
    def of(cls, text: str) -> "_Page":
        page = cls()
        page.feed(text)
        return page

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "script":
            self.scripts.append("")
        if dict(attrs).get("http-equiv") == "Content-Security-Policy":
            self.policy = dict(attrs)["content"] or ""

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and self.scripts:
            self.scripts[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.lasttag = ""

    def count(self, tag: str) -> int:
        return self.tags.count(tag)

    @property
    def data(self) -> str:
        return self.scripts[0]

    @property
    def script(self) -> str:
        return self.scripts[1]


def _browse(page: Path, profile: Path) -> tuple[str, str]:
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=2000"
    command = ["chromium", *flags.split(), f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr
