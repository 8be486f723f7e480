"""The notebook runs from top to bottom, and shows what it says."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "hme.ipynb"


def test_the_notebook_runs_and_its_trees_beat_a_line() -> None:
    names: dict[str, Any] = {}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), str(NOTEBOOK), "exec"), names)
    # Jacobs et al. 1991 have 0.90 on the vowels themselves
    assert names["share_right"]["mixture"] >= max(0.88, names["share_right"]["logistic"] - 0.01)
    assert names["X"].shape == (600, 2)
    assert len(names["time"]) == len(names["head"]) == 133
    assert names["head"].mean() == pytest.approx(-25.5459, abs=1e-4)  # as everywhere the data are quoted
    assert names["tree"].score(names["time"][:, None], names["head"]) > names["line"] + 0.6
    assert names["quiet"] < 0.2 * names["loud"]
    assert len(names["tree_axes"].patches) == names["tree"].mixture_.tree.num_gates
