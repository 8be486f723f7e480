"""`turnout fit-hme`: from a CSV file to a fit, a page and one line of JSON."""

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")

from tests.conftest import Turnout


@pytest.fixture
def fit_hme(turnout: Turnout) -> Turnout:
    """`turnout fit-hme`."""
    return partial(turnout, "fit-hme")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    lines = ["width,height,colour,size,kind"]
    for a, b in random.normal(size=(300, 2)):
        colour = "red" if random.random() < 0.5 else "<b>blue</b>"
        size = abs(a) + 0.2 * b + (colour == "red") + 0.05 * random.normal()
        lines.append(f"{a:.4f},{b:.4f},{colour},{size:.4f},{'big' if size > 1.2 else '<i>small</i>'}")
    path = tmp_path / "things.csv"
    path.write_text("\n".join(lines))
    return path


def _stands_alone(page: str) -> bool:
    return "<script" not in page and not re.search(r"https?://", page) and "<b>blue" not in page and "<i>" not in page


def test_a_fit_ends_in_one_line_of_json_and_a_page_that_needs_nothing(
    fit_hme: Turnout, table: Path, tmp_path: Path
) -> None:
    page = tmp_path / "out.html"
    done = fit_hme(str(table), "--target", "size", "--depth", "2", "--report", str(page), "--json")
    assert done.code == 0, done.err
    assert {"log_likelihood", "relative_error", "iterations", "seconds"} <= set(done.last)
    # `kind` is a column of words made from the target
    assert done.last["relative_error"] < 0.2
    text = page.read_text()
    assert text.count('<circle class="dot"') == 75  # a quarter of the rows was kept aside
    assert text.count('<circle class="leaf"') == 4
    assert 'style="min-width:760px"' in text
    assert _stands_alone(text)


def test_noise_that_is_held_is_a_setting(fit_hme: Turnout, table: Path) -> None:
    fits = [
        fit_hme(str(table), "--target", "size", "--depth", "3", "--max-iter", "12", "--json", *settings)
        for settings in ([], ["--noise-start", "0.3", "--hold-noise", "8"])
    ]
    assert [done.code for done in fits] == [0, 0]
    assert fits[0].last["log_likelihood"] != fits[1].last["log_likelihood"]


def test_words_as_a_target_are_classes_and_are_counted_right_and_wrong(
    fit_hme: Turnout, table: Path, tmp_path: Path
) -> None:
    page = tmp_path / "out.html"
    done = fit_hme(str(table), "--target", "kind", "--report", str(page), "--json")
    assert done.code == 0, done.err
    assert done.last["task"] == "classification"
    text = page.read_text()
    counts = [int(count) for count in re.findall(r"<td[^>]*>(\d+)</td>", text)]
    assert sum(counts) == 75
    right = sum(int(count) for count in re.findall(r'<td class="right">(\d+)</td>', text))
    assert 1 - right / 75 == pytest.approx(done.last["relative_error"])
    assert _stands_alone(text)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--target", "sise"], 2, "no column of .*did you mean 'size'"),
        (["--target", "size", "--solver", "magic"], 1, "must be one of: em, least_squares"),
        (["--target", "size", "--test-share", "1.5"], 2, "--test-share 1.5 must be at least 0 and below 1"),
        (["--target", "kind", "--task", "counts"], 1, "needs numbers in column 'kind'"),
        (["--target", "kind", "--hold-noise", "9"], 2, "classes have no noise"),
        (["--target", "size", "--depth", "8"], 1, r"225 rows .* cannot fit 256 experts.*75 of 300 rows are kept aside"),
    ],
)
def test_bad_use_is_one_line(fit_hme: Turnout, table: Path, arguments: list[str], code: int, message: str) -> None:
    done = fit_hme(str(table), *arguments)
    assert done.code == code
    assert re.search(message, done.message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rows below its first line"),
        ("a,y\n", "no rows below its first line"),
        ("a,y\n1,2\n1\n", "line 3 has 1 cells"),
        ("a,a,y\n1,2,3\n", "names a column twice"),
        ("a,y\n1,\n2,3\n", "line 2: the target 'y' is missing"),
        ("y\n1\n2\n", "no column beside the target"),
        ("a;y\n1;2\n3;4\n", "has its cells between ';'"),
        ("a,y\n1,2\n-inf,3\n", "line 3: column 'a' is infinite"),
        ("a,y\n1,Infinity\n2,3\n", "line 2: column 'y' is infinite"),
        ("a,y\n1,2\n,3\n4,5\n6,7\n8,9\n1,3\n", "line 3: column 'a' is missing; use --missing mean"),
        ("a,y\n\n1,2\n1\n", "line 4 has 1 cells"),
        ('a,c,y\n1,"two\nlines",3\n,b,3\n1,b,2\n', "line 4: column 'a' is missing"),
        ("a,y\n1,2\n\n-inf,3\n", "line 4: column 'a' is infinite"),
        ("a,y\n1,2\n3,\n", "line 3: the target 'y' is missing"),
        (
            "a,y\n" + "".join(f"{i},{'x' if i == 30 else i}\n" for i in range(40)),
            "line 32: the target 'y' has 'x', which is no number, and 40 different values; for so many classes",
        ),
    ],
)
def test_a_file_that_is_no_table_is_refused_by_line(fit_hme: Turnout, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    done = fit_hme(str(path), "--target", "y", "--depth", "1")
    assert done.code == 1
    assert message in done.message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--report", "nowhere/out.html"], "there is no folder nowhere"),
        (["--seed", "-1"], "Invalid value for '--seed'"),
        (["--max-experts", "-2"], "Invalid value for '--max-experts'"),
        (["--max-experts", "3"], "max_experts=3 must be at least the 4 experts"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(
    fit_hme: Turnout, table: Path, settings: list[str], message: str
) -> None:
    done = fit_hme(str(table), "--target", "size", *settings)
    assert done.code != 0
    assert message in done.err.replace("\n", " ") or message in done.message


def test_a_word_that_is_missing_is_a_word_and_a_column_without_a_name_gets_one(
    fit_hme: Turnout, tmp_path: Path
) -> None:
    """As pandas writes them: the index has no name, and what is missing is an empty cell."""
    path = tmp_path / "frame.csv"
    words = ("red", "", "blue", "NA")
    path.write_text("\n".join([",colour,y", *(f"{n},{words[n % 4]},{n % 4 + n / 100}" for n in range(80))]))
    done = fit_hme(str(path), "--target", "y", "--depth", "0")
    assert done.code == 0, done.err
    assert "colour: 3 words, a column each; missing is one of them (40 rows)" in done.out
    assert "colour=(missing)" in done.out
    assert "column 1 has no name in the first line" in done.out


def test_a_file_in_another_encoding_says_which_is_wanted(fit_hme: Turnout, tmp_path: Path) -> None:
    path = tmp_path / "latin.csv"
    path.write_bytes("gr\xf6\xdfe,y\n1,2\n".encode("latin-1"))
    done = fit_hme(str(path), "--target", "y")
    assert done.code == 1
    assert "save it as UTF-8" in done.message


def test_neither_turnout_nor_the_estimators_import_what_they_do_not_need() -> None:
    check = "import turnout, turnout.hme, sys; assert 'sklearn' not in sys.modules and 'torch' not in sys.modules; "
    check += "from turnout.hme import HMERegressor; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_the_tree_in_words_names_the_target_and_what_is_linear(fit_hme: Turnout, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    path, a_N = tmp_path / "calls.csv", random.normal(size=200)
    path.write_text("\n".join(["a,calls,half", *(f"{a:.3f},{random.poisson(np.exp(a))},{int(a > 0)}" for a in a_N)]))
    counts = fit_hme(str(path), "--target", "calls", "--task", "counts", "--depth", "0")
    assert "expert 0: log of calls = " in counts.out
    amounts = fit_hme(str(path), "--target", "half", "--depth", "0")
    assert "expert 0: half = " in amounts.out
    assert "half: few different numbers, fitted as amounts" in amounts.out
    classes = fit_hme(str(path), "--target", "half", "--depth", "0", "--task", "classification")
    assert "log odds of 0 to 1 = " in classes.out
    assert "few different" not in classes.out
