"""A few kilobytes of text and a recipe that trains on it in a second."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from turnout.data.prepare import DataConfig, Dataset, prepare
from turnout.layers.attention import AttentionConfig
from turnout.layers.moe import MoEConfig
from turnout.models import ModelConfig
from turnout.routers import TopK
from turnout.train.recipe import LoopConfig, Recipe, ScheduleConfig

SENTENCE = "a router sends each token to its experts and the experts answer in turn while the rest sleep"
WORDS = SENTENCE.split()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    # tests run side by side; threads that fight for two cores only wait for each other
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for number in range(40):
        words = [WORDS[(number * 7 + i * (i % 5 + 1)) % len(WORDS)] for i in range(300)]
        (folder / f"document-{number}.txt").write_text(" ".join(words), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def small_recipe(text_folder: Path) -> Recipe:
    model = ModelConfig(
        vocab_size=300,
        dim=16,
        num_layers=2,
        max_seq_len=64,
        attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8),
        moe=MoEConfig(num_experts=4, hidden=16, router=TopK(k=2)),
    )
    loop = LoopConfig(steps=12, batch_size=2, seq_len=16, eval_every=4, eval_tokens=64, save_every=5, keep_last=3)
    data = DataConfig(corpus=str(text_folder), vocab_size=300, val_fraction=0.2)
    return Recipe(name="small", model=model, data=data, loop=loop, schedule=ScheduleConfig(warmup=0.2))


@pytest.fixture(scope="session")
def small_dataset(small_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return prepare(small_recipe.data, tmp_path_factory.mktemp("cache"))


@pytest.fixture
def with_loop(small_recipe: Recipe) -> Callable[..., Recipe]:
    """The small recipe with some fields of its loop changed."""

    def change(**fields: Any) -> Recipe:
        return replace(small_recipe, loop=replace(small_recipe.loop, **fields))

    return change
