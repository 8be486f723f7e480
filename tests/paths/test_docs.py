"""The Python examples of docs/layers.md run as they stand there; no router or loss is left out of it, or of README."""

import re
from pathlib import Path

import pytest

from turnout.contracts import Loss, RouterConfig

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "layers.md"
# heading -> its example
EXAMPLES = dict(re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?```python\n(.*?)```", PAGE.read_text("utf-8"), re.M | re.S))


@pytest.mark.parametrize("heading", EXAMPLES)
def test_an_example_of_the_page_of_layers_runs(heading: str) -> None:
    exec(compile(EXAMPLES[heading], f"{PAGE.name}: {heading}", "exec"), {"__name__": "example"})


def test_the_page_has_an_example_of_every_layer_that_is_not_in_a_table() -> None:
    text = " ".join(EXAMPLES.values())
    assert all(name in text for name in ("Replay(", "latent_dim=", "SoftMoE(", "MixtureOfDepths(", "scope=scope"))
    assert len(EXAMPLES) == 5
    assert text.count("import torch") == PAGE.read_text("utf-8").count("```python")


def test_readme_names_the_file_of_every_router_and_loss() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    files = {
        row.__module__.rsplit(".", 1)[-1] for table in (RouterConfig.TABLE, Loss.TABLE) for _, row in table.items()
    }
    assert {name for name in files if f"{name}.py`" not in readme} == set()


def test_the_page_names_every_router_and_every_loss() -> None:
    page = PAGE.read_text("utf-8")
    names = [*RouterConfig.TABLE.names(), *Loss.TABLE.names()]
    assert [name for name in names if f"`{name}`" not in page and f"`{name}." not in page] == []
