"""What `auto` knows of the Triton kernels: where they may run, which configs were measured, which races were won."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from turnout import MoE
from turnout.contracts import ExpertBackend
from turnout.errors import ConfigError
from turnout.experts import FFNExperts, available_backends, choose_backend, passed_by
from turnout.kernels import gpu
from turnout.kernels.gpu import configs, tuned
from turnout.kernels.gpu.configs import Config, candidates
from turnout.tensors import counted

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPE = tuned.shape_of((8, 64, 32), "swiglu", CUDA, torch.bfloat16)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("TURNOUT_CACHE", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    tuned.config_for.cache_clear()
    yield
    tuned.config_for.cache_clear()


def reason(experts: FFNExperts, *, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> str:
    return available_backends(experts, dtype=dtype, device=device)["fused_triton"]


def test_refusals_say_why() -> None:
    experts = FFNExperts(4, 4, 2)
    assert reason(experts).startswith("fused_triton computes on CUDA, not on cpu; use backend=")
    assert reason(experts, dtype=torch.float64).startswith("fused_triton computes float32, bfloat16 and float16, not ")
    with torch.device("meta"):
        assert "counts up to 1024 experts, not 1025" in reason(FFNExperts(4, 4, 1025))
        assert "up to 2^31 weights, not 65536 x 65536" in reason(FFNExperts(1 << 16, 1 << 15, 1))
    with pytest.raises(ConfigError, match=r"backend='fused_triton' cannot run here: fused_triton computes on CUDA"):
        MoE(4, 4, 2, backend="fused_triton")(torch.randn(3, 4))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_that_is_the_reason() -> None:
    assert "torch finds no such device here" in reason(FFNExperts(4, 4, 2), device=CUDA)


def test_a_device_that_is_too_old_or_another_makers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert gpu.device_failure(CUDA).endswith("needs compute capability 8.0 or later; this device has 7.5")
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert gpu.device_failure(CUDA).startswith("fused_triton is written for NVIDIA's GPUs")


def test_without_triton_the_reason_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert gpu.device_failure(CUDA).endswith("pip install triton")


def test_auto_takes_it_only_after_every_race_of_that_shape_was_won(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = ExpertBackend.TABLE["fused_triton"]
    monkeypatch.setattr(type(backend), "refusal", lambda self, experts, **where: None)
    experts = FFNExperts(32, 64, 8)

    def taken() -> bool:
        return choose_backend(experts, "auto", dtype=torch.bfloat16, device=CUDA) is backend

    assert not taken()
    assert "never raced here with such experts" in passed_by(experts, dtype=torch.bfloat16, device=CUDA)["fused_triton"]
    tuned.keep_race(SHAPE, "T64 K2 forward", rival="grouped_mm", ms=1.0, rival_ms=1.5)
    assert taken()
    assert choose_backend(FFNExperts(32, 48, 8), "auto", dtype=torch.bfloat16, device=CUDA) is not backend
    assert choose_backend(experts, "auto", dtype=torch.float16, device=CUDA) is not backend
    assert choose_backend(experts, "auto", dtype=torch.bfloat16, device=CPU) is not backend
    tuned.keep_race(SHAPE, "T1 K2 forward", rival="grouped_mm", ms=2.0, rival_ms=1.5)
    assert not taken()
    told = passed_by(experts, dtype=torch.bfloat16, device=CUDA)["fused_triton"]
    assert "slower at T1 K2 forward: 2 ms against 1.5 of grouped_mm" in told


@pytest.mark.parametrize("text", ["", "[]", "{", '{"KEY": 3}', '{"KEY": {"T1": {"ms": 1}}}', '{"KEY": {"T1": 7}}'])
def test_a_damaged_cache_is_no_win(text: str, tmp_path: Path) -> None:
    (tmp_path / "gpu").mkdir()
    for name in ("races.json", "tuned.json"):
        (tmp_path / "gpu" / name).write_text(text.replace("KEY", SHAPE.key))
    assert tuned.race_failure(SHAPE)
    assert tuned.config_for(SHAPE, 10) == candidates(1 << 10, 8, torch.bfloat16)[0]


def test_the_fastest_config_is_found_again_for_its_size_alone(tmp_path: Path) -> None:
    size = tuned.size_of(5000)
    likeliest, other = tuned.candidates_for(SHAPE, size)[:2]
    assert tuned.config_for(SHAPE, size) == likeliest
    tuned.keep_config(SHAPE, 5000, other, ms=1.0)
    assert tuned.config_for(SHAPE, size) == other
    assert tuned.config_for(SHAPE, tuned.size_of(4096)) == other
    assert tuned.config_for(SHAPE, tuned.size_of(9000)) != other
    # tiles of other rows would not fit the schedule a forward pass left
    path = tmp_path / "gpu" / "tuned.json"
    path.write_text(json.dumps({f"{SHAPE.key} | N2^{size}": {"config": configs.FEW_ROWS[0].as_list()}}))
    tuned.config_for.cache_clear()
    assert tuned.config_for(SHAPE, size) == likeliest


def test_configs_of_one_size_share_their_rows_and_come_back_from_json() -> None:
    for dtype in DTYPES:
        for num in (1, 100, 1000, 10**6):
            rows = {config.rows for config in candidates(num, 8, dtype)}
            assert len(rows) == 1
    for config in (*configs.MANY_ROWS, *configs.FEW_ROWS):
        assert Config.of_list(json.loads(json.dumps(config.as_list()))) == config


def test_counts_without_bincount_are_those_of_bincount() -> None:
    index_N = torch.randint(7, (100,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(counted(index_N, 9), torch.bincount(index_N, minlength=9))
    assert counted(index_N.to("meta"), 9).shape == (9,)
