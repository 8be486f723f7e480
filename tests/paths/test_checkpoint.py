"""A checkpoint gives back exactly what was saved, and says plainly what it cannot do."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from turnout.errors import CheckpointError, ConfigError
from turnout.train.checkpoint import load, save, verify
from turnout.train.checkpoint_fit import check_fits

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.complex64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16,
    torch.uint8, torch.bool,
]  # fmt: skip


def contents(mark: int) -> dict[str, dict[str, Tensor]]:
    return {
        "model": {"w": torch.full((3, 4), float(mark)), "empty": torch.zeros(0, 5)},
        "optimizer": {"w/exp_avg": torch.full((3, 4), float(mark))},
    }


def save_marked(run: Path, step: int, mark: int | None = None, *, keep_last: int = 3) -> Path:
    mark = step if mark is None else mark
    return save(run, step, contents(mark), {"mark": mark}, keep_last=keep_last)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@settings(max_examples=40, deadline=None)
@given(
    forms=st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)), min_size=0, max_size=6)
)
def test_any_bits_dtype_and_shape_come_back_exactly(
    forms: list[tuple[torch.dtype, list[int]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = tmp_path_factory.mktemp("run")
    tensors = {}
    for i, (dtype, shape) in enumerate(forms):
        size = math.prod(shape) * dtype.itemsize
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8)
        tensors[f"t{i}"] = raw.view(dtype).reshape(shape)
    loaded = load(save(run, 1, {"model": tensors}, {}, keep_last=1)).files["model"]
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(loaded[name]) == bits(tensor)


def test_tied_tensors_are_stored_once_and_overlapping_ones_apart(tmp_path: Path) -> None:
    w = torch.randn(64, 64)
    tensors = {"head": w, "embedding": w, "row": w[1], "turned": w.T}
    path = save(tmp_path, 1, {"model": tensors}, {}, keep_last=1)
    assert (path / "model.safetensors").stat().st_size < 2.2 * w.nbytes
    loaded = load(path).files["model"]
    assert loaded["head"] is loaded["embedding"]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert loaded["row"].data_ptr() != loaded["embedding"][1].data_ptr()


def test_loaded_tensors_do_not_change_when_the_file_does(tmp_path: Path) -> None:
    path = save_marked(tmp_path, 7)
    loaded = load(path)
    with (path / "model.safetensors").open("r+b") as file:
        file.truncate(0)
    assert torch.equal(loaded.files["model"]["w"], torch.full((3, 4), 7.0))


def test_meta_comes_back_equal_and_what_would_not_is_refused(tmp_path: Path) -> None:
    meta = {"loss": 0.1 + 0.2, "tiny": 5e-324, "big": 2**80, "text": "Weiche \u00e9 \U0001f600", "list": [None, True]}
    assert load(save(tmp_path, 1, {}, {"m": meta}, keep_last=1)).meta == {"m": meta}
    for bad in (math.nan, (1, 2), {1: "x"}, {1, 2}, torch.zeros(1)):
        with pytest.raises(CheckpointError, match=r"meta\['bad'\]"):
            save(tmp_path, 2, {}, {"bad": bad}, keep_last=1)
    assert names(tmp_path) == ["latest", "step-1"]


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (torch.zeros(2, dtype=torch.complex128), "dtype torch.complex128; safetensors holds F64"),
        (torch.zeros(2).to_sparse(), "needs a dense tensor"),
        (torch.zeros(2, device="meta"), "needs a dense tensor"),
        (torch.zeros(2, dtype=torch.complex64).conj(), "no pending conj"),
        (nn.UninitializedParameter(), "is a UninitializedParameter; a checkpoint holds plain tensors"),
    ],
)
def test_what_cannot_come_back_exactly_is_refused_before_writing(tensor: Tensor, text: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"model/x.*{text}"):
        save(tmp_path, 1, {"model": {"x": tensor}}, {}, keep_last=1)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("name", ["../model", "a/b", ".hidden", "", "..", "a\\b", "x" * 101, "a\n"])
def test_a_file_name_cannot_leave_the_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is refused"):
        save(tmp_path, 1, {name: {}}, {}, keep_last=1)


def test_only_the_last_are_kept_and_temporary_folders_of_the_dead_go(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for left in (".tmp-step-3-999999", ".tmp-step-3-1", ".gone-step-1-7"):
        (folder / left).mkdir(parents=True)
        (folder / left / "model.safetensors").write_bytes(b"half")
    for step in range(1, 6):
        save_marked(tmp_path, step, keep_last=2)
    assert names(tmp_path) == ["latest", "step-4", "step-5"]
    assert load(tmp_path).step == 5


def test_going_back_to_an_old_checkpoint_never_deletes_the_latest(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save_marked(tmp_path, step)
    save_marked(tmp_path, 15, keep_last=1)
    assert names(tmp_path) == ["latest", "step-15", "step-20", "step-30"]
    assert load(tmp_path).step == 15


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_marked(tmp_path, 4, mark=1)
    save_marked(tmp_path, 4, mark=2)
    assert names(tmp_path) == ["latest", "step-4"]
    assert load(tmp_path).meta == {"mark": 2}


def test_a_checkpoint_whose_successor_never_came_is_still_there(tmp_path: Path) -> None:
    path = save_marked(tmp_path, 4)
    path.rename(path.with_name(".replaced-step-4"))
    loaded = load(tmp_path)
    assert loaded.step == 4
    assert loaded.notes
    save_marked(tmp_path, 5)
    assert names(tmp_path) == ["latest", "step-4", "step-5"]


def test_only_the_named_files_are_read(tmp_path: Path) -> None:
    path = save_marked(tmp_path, 1)
    damaged = path / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    assert load(tmp_path, names={"model"}).files.keys() == {"model"}
    with pytest.raises(CheckpointError, match="no part 'weights'; it has: model, optimizer"):
        load(path, names={"weights"})


def test_a_path_that_is_no_run_and_a_run_without_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a run nor a checkpoint"):
        load(tmp_path / "nothing")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match=r"no checkpoint of .* can be loaded"):
        load(tmp_path)
    (tmp_path / "checkpoints" / "step-3").mkdir()
    with pytest.raises(CheckpointError, match="not a finished checkpoint"):
        load(tmp_path / "checkpoints" / "step-3")


def test_a_renamed_folder_is_found_out_but_a_copy_elsewhere_loads(tmp_path: Path) -> None:
    path = save_marked(tmp_path, 5)
    path.rename(path.with_name("step-6"))
    with pytest.raises(CheckpointError, match="holds step 5: the folder was renamed"):
        load(path.with_name("step-6"))
    path.with_name("step-6").rename(tmp_path / "best")
    assert verify(tmp_path / "best").step == 5
    assert load(tmp_path / "best").step == 5


def test_keep_last_and_step_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keep_last=0 must be at least 1"):
        save_marked(tmp_path, 1, keep_last=0)
    with pytest.raises(ConfigError, match="step=-1 at least 0"):
        save_marked(tmp_path, -1)


def test_a_misfit_lists_every_difference_with_the_nearest_name() -> None:
    here = {"layers.0.up_EDG": torch.zeros(4, 2, 3), "norm": torch.zeros(2), "head": torch.zeros(2)}
    there = {"layers.0.up_EDF": torch.zeros(4, 2, 3), "norm": torch.zeros(3), "head": torch.zeros(2).half()}
    with pytest.raises(CheckpointError) as caught:
        check_fits(here, there)
    text = str(caught.value)
    assert "1 missing, 1 unexpected, 2 differing" in text
    assert "missing in the checkpoint: layers.0.up_EDG; did you mean 'layers.0.up_EDF'?" in text
    assert "norm is (3,) float32 in the checkpoint, (2,) float32 here" in text
    assert "head is (2,) float16 in the checkpoint, (2,) float32 here" in text
    check_fits(here, here)
