"""`turnout fit-hme`: from a CSV file to a fit, a page and one line of JSON."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "turnout", "fit-hme", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    x_ND = random.normal(size=(300, 2))
    lines = ["width,height,colour,size,kind"]
    for a, b in x_ND:
        colour = "red" if random.random() < 0.5 else "<b>blue</b>"
        size = abs(a) + 0.2 * b + (colour == "red") + 0.05 * random.normal()
        lines.append(f"{a:.4f},{b:.4f},{colour},{size:.4f},{'big' if size > 1.2 else 'small'}")
    path = tmp_path / "things.csv"
    path.write_text("\n".join(lines))
    return path


def test_a_fit_ends_in_one_line_of_json_and_a_page_that_needs_nothing(table: Path, tmp_path: Path) -> None:
    page = tmp_path / "out.html"
    done = _run(str(table), "--target", "size", "--depth", "2", "--report", str(page), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {"log_likelihood", "relative_error", "iterations", "seconds"} <= set(found)
    # `kind` is a column of words made from the target
    assert found["relative_error"] < 0.2
    text = page.read_text()
    assert "<svg" in text
    assert "<script" not in text
    assert not re.search(r"https?://(?!www\.w3\.org)", text)
    assert "<b>blue" not in text


def test_words_as_a_target_are_classes(table: Path) -> None:
    done = _run(str(table), "--target", "kind", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["task"] == "classification"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--target", "sise"], 2, "no column of .*did you mean 'size'"),
        (["--target", "size", "--solver", "magic"], 1, "must be one of: em, least_squares"),
        (["--target", "size", "--test-share", "1.5"], 2, "--test-share 1.5 must be at least 0 and below 1"),
        (["--target", "kind", "--task", "counts"], 1, "needs numbers in column 'kind'"),
    ],
)
def test_bad_use_is_one_line(table: Path, arguments: list[str], code: int, message: str) -> None:
    done = _run(str(table), *arguments)
    assert done.returncode == code
    assert re.search(message, " ".join(done.stderr.split()))
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rows below its first line"),
        ("a,y\n", "no rows below its first line"),
        ("a,y\n1,2\n1\n", "line 3 has 1 cells"),
        ("a,a,y\n1,2,3\n", "names a column twice"),
        ("a,y\n1,\n2,3\n", "line 2: the target 'y' is missing"),
        ("y\n1\n2\n", "no column beside the target"),
        ("a,y\n1,2\n,3\n4,5\n6,7\n8,9\n1,3\n", "line 3: column 'a' is missing; use --missing mean"),
    ],
)
def test_a_file_that_is_no_table_is_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    done = _run(str(path), "--target", "y", "--depth", "1")
    assert done.returncode == 1
    assert message in " ".join(done.stderr.split())


def test_neither_turnout_nor_the_estimators_import_what_they_do_not_need() -> None:
    check = "import turnout, turnout.hme, sys; assert 'sklearn' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)
    check = "from turnout.hme import HMERegressor; import sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)
