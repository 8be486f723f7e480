"""`turnout bench CASE --base REV`: both revisions' own code, in turns, compared turn by turn."""

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from turnout.bench import base
from turnout.errors import ConfigError, TurnoutError

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="no git here")
# of a package that only says what it was asked and takes longer from turn to turn
STAND_IN = """
import json, os, sys

MS = 30.0
OPTIONS = ("--shapes", "--modes", "--peers", "--rounds", "--no-memory", "--json")


def main():
    with open(os.environ["SEEN"], "a", encoding="utf-8") as file:
        file.write(json.dumps([MS, __file__, sys.argv[1:]]) + chr(10))
    for word in sys.argv[3:]:
        if word.partition("=")[0] not in OPTIONS:
            print(f"error: No such option: {word}", file=sys.stderr)
            sys.exit(2)
    with open(os.environ["SEEN"], encoding="utf-8") as file:
        turn = (len(file.readlines()) + 1) // 2
    print("a table")
    own = {"case": "layer", "mode": "forward", "dtype": "float32", "threads": 1, "skew": None}
    peers = {"turnout-loop": MS * turn, "turnout-none": None, "dense-ffn": 5.0, NEW: 7.0}
    print(json.dumps({"rows": [own | {"peer": peer, "ms_median": ms} for peer, ms in peers.items()]}))
"""


def _git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    return subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True, text=True).stdout


def _committed(folder: Path) -> str:
    _git(folder, "init", "--quiet")
    _git(folder, "add", ".")
    _git(folder, "commit", "--quiet", "--message", "before")
    return _git(folder, "rev-parse", "HEAD").strip()


def _stand_in(folder: Path, change: Callable[[str], str] = str) -> None:
    (folder / "turnout" / "cli").mkdir(parents=True, exist_ok=True)
    for name in ("turnout", "turnout/cli"):
        (folder / name / "__init__.py").touch()
    main = change(STAND_IN.replace("NEW", "'turnout-old'"))
    (folder / "turnout" / "cli" / "main.py").write_text(main, encoding="utf-8")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository whose working tree is three times as fast as its one commit; `commit` is tagged `before`."""
    source = tmp_path / "checkout" / "src"
    _stand_in(source)
    _committed(source.parent)
    _git(source, "tag", "before")
    _stand_in(source, lambda text: text.replace("30.0", "10.0").replace("turnout-old", "turnout-new"))
    monkeypatch.setattr(base, "PACKAGE", source / "turnout")
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return source


def _seen(checkout: Path) -> list[tuple[float, str, list[str]]]:
    return [json.loads(line) for line in (checkout.parents[1] / "seen").read_text(encoding="utf-8").splitlines()]


def test_both_run_their_own_code_in_turns_and_rows_are_ratios_turn_by_turn(checkout: Path, turnout) -> None:
    use = ["--shapes", "a", "--modes", "forward", "--peers", "turnout-loop,dense-ffn", "--rounds", "2"]
    shown = turnout("bench", "layer", *use, "--base", "before", "--turns", "2", "--json")
    assert shown.code == 0, shown.err
    (row,) = shown.last["rows"]
    # 30 and 60 over 10 and 20, where medians over turns would be alike; then base, now, base, now
    assert (row["peer"], row["mode"], row["threads"]) == ("turnout-loop", "forward", 1)
    assert (row["base_ms"], row["ms"]) == ([30.0, 60.0], [10.0, 20.0])
    assert (row["base_over_now"], row["base_over_now_quartiles"]) == (3.0, [3.0, 3.0])
    assert [ms for ms, _, _ in _seen(checkout)] == [30.0, 10.0, 30.0, 10.0]
    asked = ["layer", "--shapes=a", "--modes=forward", "--peers=turnout-loop", "--rounds=2", "--no-memory", "--json"]
    assert all(sorted(words[1:]) == sorted(asked) for _, _, words in _seen(checkout))
    assert shown.last["base"]["commit"] == _git(checkout, "rev-parse", "before").strip()
    assert (shown.last["not_in_base"], shown.last["only_in_base"]) == (["turnout-new"], ["turnout-old"])
    assert "3.000 (3.000-3.000)" in shown.err
    # the base's code came out of the commit, and is gone
    files = {file for ms, file, _ in _seen(checkout) if ms == 30.0}
    assert not any(Path(file).exists() or Path(file).is_relative_to(checkout) for file in files)
    assert list(checkout.parents[1].glob("turnout-base-*")) == []


def test_ratios_are_those_of_a_turn(checkout: Path) -> None:
    main = checkout / "turnout" / "cli" / "main.py"
    main.write_text(main.read_text(encoding="utf-8").replace("MS * turn", "MS * turn**2"), encoding="utf-8")
    found = base.compare("before", [["layer"]], is_own=lambda peer: peer == "turnout-loop", turns=3)
    (row,) = found["rows"]
    assert row["base_over_now"] == 1.5
    assert row["base_over_now_quartiles"] == [1.25, 2.25]


def test_every_shape_and_mode_is_asked_for_our_peers_there(checkout: Path, turnout) -> None:
    shown = turnout("bench", "layer", "--shapes", "b,d1", "--base", "before", "--turns", "1")
    assert shown.code == 0, shown.err
    of_base = [words for ms, _, words in _seen(checkout) if ms == 30.0]
    asked = {(words[2], words[3]): words[4].partition("=")[2].split(",") for words in of_base}
    assert list(asked) == [("--shapes=b,d1", "--modes=forward"), ("--shapes=b", "--modes=train")]
    assert all(name.startswith("turnout-") for names in asked.values() for name in names)
    assert "turnout-int8" not in asked["--shapes=b", "--modes=train"]


def test_what_cannot_be_compared_is_one_clear_error(
    checkout: Path, turnout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ["bench", "layer", "--shapes", "a", "--modes", "forward", "--turns", "1"]
    errors = {
        ("--base", "nowhere"): r"--base 'nowhere' is no revision of the checkout",
        ("--base", "--all"): r"--base '--all' is no revision of the checkout",
        ("--base", "before", "--peers", "dense-ffn"): r"--base compares ours alone; --peers dense-ffn has none",
        ("--base", "before", "--skew", "2"): r"the base 'before' does not take .*: No such option: --skew=2.0; compare",
    }
    for words, text in errors.items():
        shown = turnout(*plain, *words)
        assert shown.code == 2
        assert re.search(text, shown.message), shown.message
    with pytest.raises(
        TurnoutError, match="nothing to compare: the base 'before' measured nothing, the code at hand turnout-"
    ):
        base.compare("before", [["layer"]], is_own=lambda peer: peer == "turnout-new", turns=1)
    shutil.rmtree(checkout / "turnout" / "cli")
    with pytest.raises(TurnoutError, match=r"fails with the code at hand: ModuleNotFoundError"):
        base.compare("before", [["layer"]], is_own=bool, turns=1)
    (tmp_path / "elsewhere" / "turnout").mkdir(parents=True)
    monkeypatch.setattr(base, "PACKAGE", tmp_path / "elsewhere" / "turnout")
    with pytest.raises(ConfigError, match=r"needs Turnout to run from a git checkout; .*elsewhere/turnout is in none"):
        base.compare("before", [["layer"]], is_own=bool, turns=1)


def test_a_package_that_a_checkout_ignores_or_did_not_have_is_none_of_its(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = checkout.parent / "venv" / "turnout"
    shutil.copytree(checkout / "turnout", site)
    monkeypatch.setattr(base, "PACKAGE", site)
    with pytest.raises(ConfigError, match="needs Turnout to run from a git checkout"):
        base.compare("before", [["layer"]], is_own=bool, turns=1)
    _git(checkout, "add", "../venv")
    with pytest.raises(ConfigError, match="--base 'before' has no folder 'turnout' where the code at hand has it"):
        base.compare("before", [["layer"]], is_own=bool, turns=1)


def test_a_slower_router_is_slower_than_its_base(tmp_path: Path, turnout, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "checkout" / "src"
    leave_out = shutil.ignore_patterns("__pycache__")
    shutil.copytree(base.PACKAGE, source / "turnout", ignore=leave_out)
    _committed(source.parent)
    routers = source / "turnout" / "bench" / "routers.py"
    text, call = routers.read_text(encoding="utf-8"), "out = layer(x_BSD, token_ids=token_ids_BS)"
    assert call in text
    routers.write_text(text.replace(call, f"__import__('time').sleep(0.2); {call}"), encoding="utf-8")
    monkeypatch.setattr(base, "PACKAGE", source / "turnout")
    sizes = ["--tokens", "48", "--dim", "16", "--hidden", "8", "--experts", "8", "--k", "2", "--seq-len", "12"]
    use = ["--shapes", "b", *sizes, "--routers", "topk", "--rounds", "2", "--warmup", "1"]
    shown = turnout("bench", "routers", *use, "--base", "HEAD", "--turns", "1", "--json")
    assert shown.code == 0, shown.err
    (row,) = shown.last["rows"]
    assert row["ms_median"] > 200 > row["base_ms_median"]
    assert row["base_over_now"] == row["base_ms_median"] / row["ms_median"]
