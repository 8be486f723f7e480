"""Damage is found before a byte is used: every flipped bit, every truncation, every hostile file."""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from turnout.errors import CheckpointError
from turnout.train.checkpoint import load, save, verify
from turnout.train.checkpoint_manifest import _sealed, read_manifest


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (10, 20):
        files = {name: {"w": torch.full((4, 8), float(step))} for name in ("model", "optimizer", "rng")}
        meta = {"lr": 1e-5, "betas": [0.9, 1e-05], "names": ["layers.0.w\u00e9", "E"]}
        save(tmp_path, step, files, meta, keep_last=2)
    return tmp_path


def overwrite(path: Path, place: int, data: bytes) -> None:
    """In place: a file that is truncated and written anew costs a disk flush each time."""
    with path.open("r+b") as file:
        file.seek(place)
        file.write(data)


def flip(path: Path, good: bytes, place: int, bit: int) -> None:
    overwrite(path, place, bytes([good[place] ^ 1 << bit]))


def test_a_thousand_flipped_bits_are_all_detected(run: Path) -> None:
    newest = run / "checkpoints" / "step-20"
    draw = random.Random(0)
    files = {path: path.read_bytes() for path in sorted(newest.iterdir())}
    for number in range(1000):
        path = sorted(files)[number % len(files)]
        place = draw.randrange(len(files[path]))
        flip(path, files[path], place, draw.randrange(8))
        with pytest.raises(CheckpointError):
            verify(newest)
        overwrite(path, place, files[path][place : place + 1])
    verify(newest)


def test_every_single_bit_of_a_manifest_is_covered(tmp_path: Path) -> None:
    # A hash of the parsed content would miss 1e-05 -> 1E-05 and \u00e9 -> \u00E9.
    checkpoint = save(tmp_path, 1, {}, {"lr": 1e-5, "name": "\u00e9"}, keep_last=1)
    path = checkpoint / "manifest.json"
    good = path.read_bytes()
    for place in range(len(good)):
        for bit in range(8):
            flip(path, good, place, bit)
            with pytest.raises(CheckpointError):
                read_manifest(checkpoint)
        overwrite(path, place, good[place : place + 1])
    read_manifest(checkpoint)


def test_every_flipped_bit_and_truncation_of_latest_is_detected_and_the_newest_loads(run: Path) -> None:
    path = run / "checkpoints" / "latest"
    good = path.read_bytes()
    flips = [good[:i] + bytes([good[i] ^ 1 << bit]) + good[i + 1 :] for i in range(len(good)) for bit in range(8)]
    for damaged in [*flips[::5], *(good[:length] for length in range(len(good)))]:
        overwrite(path, 0, damaged)
        os.truncate(path, len(damaged))
        loaded = load(run)
        assert loaded.step == 20
        assert "latest is damaged" in loaded.notes[0]


def test_every_truncation_is_detected(run: Path) -> None:
    newest = run / "checkpoints" / "step-20"
    for path in (newest / "manifest.json", newest / "model.safetensors"):
        good = path.read_bytes()
        for length in reversed(range(len(good))):
            os.truncate(path, length)
            with pytest.raises(CheckpointError):
                verify(newest)
        overwrite(path, 0, good + b"\0")
        with pytest.raises(CheckpointError):
            verify(newest)
        os.truncate(path, len(good))
    verify(newest)


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
def test_a_damaged_latest_falls_back_and_says_so_but_a_named_one_is_an_error(run: Path, name: str) -> None:
    newest = run / "checkpoints" / "step-20"
    path = newest / name
    path.write_bytes(path.read_bytes()[:-3] + b"abc")
    loaded = load(run)
    assert loaded.step == 10
    assert loaded.files["model"]["w"][0, 0] == 10
    assert len(loaded.notes) == 2
    assert "step-20" in loaded.notes[0]
    assert "damaged" in loaded.notes[0]
    assert loaded.notes[1] == "loaded step-10 instead"
    with pytest.raises(CheckpointError, match="damaged"):
        load(newest)


def test_missing_and_extra_files_are_named(run: Path) -> None:
    newest = run / "checkpoints" / "step-20"
    (newest / "notes.txt").write_text("mine")
    (newest / "rng.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"missing rng\.safetensors, unexpected notes\.txt"):
        load(newest)


def test_a_link_is_not_followed(run: Path) -> None:
    path = run / "checkpoints" / "step-20" / "model.safetensors"
    path.rename(run / "elsewhere")
    path.symlink_to(run / "elsewhere")
    with pytest.raises(CheckpointError, match="not a plain file"):
        load(path.parent)


def test_all_damaged_is_an_error_that_lists_each(run: Path) -> None:
    for step in (10, 20):
        (run / "checkpoints" / f"step-{step}" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"passed over step-20: .*; passed over step-10: "):
        load(run)


# A hostile author can compute every hash. Sealed again, these must still be refused, one by one.
MANIFESTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "future version": lambda m: m | {"version": 2},
    "another format": lambda m: m | {"format": "pickle"},
    "no step": lambda m: {k: v for k, v in m.items() if k != "step"},
    "negative step": lambda m: m | {"step": -1},
    "step true": lambda m: m | {"step": True},
    "step text": lambda m: m | {"step": "20"},
    "files list": lambda m: m | {"files": []},
    "meta list": lambda m: m | {"meta": [1]},
    "parent folder": lambda m: m | {"files": m["files"] | {"../../step-10/model": m["files"]["model"]}},
    "absolute path": lambda m: m | {"files": m["files"] | {"/etc/passwd": m["files"]["model"]}},
    "entry null": lambda m: m | {"files": m["files"] | {"model": None}},
    "negative size": lambda m: m | {"files": m["files"] | {"model": m["files"]["model"] | {"size_bytes": -1}}},
    "huge size": lambda m: m | {"files": m["files"] | {"model": m["files"]["model"] | {"size_bytes": 2**70}}},
    "size true": lambda m: m | {"files": m["files"] | {"model": m["files"]["model"] | {"size_bytes": True}}},
    "hash number": lambda m: m | {"files": m["files"] | {"model": m["files"]["model"] | {"blake2b": 5}}},
    "alias number": lambda m: m | {"files": m["files"] | {"model": m["files"]["model"] | {"aliases": {"a": 1}}}},
    "alias of none": lambda m: m | {"files": m["files"] | {"model": m["files"]["model"] | {"aliases": {"a": "b"}}}},
    "alias of itself": lambda m: m | {"files": m["files"] | {"model": m["files"]["model"] | {"aliases": {"w": "w"}}}},
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_hostile_manifest_is_refused(run: Path, case: str) -> None:
    path = run / "checkpoints" / "step-20" / "manifest.json"
    data = json.loads(path.read_bytes())
    del data["blake2b"]
    path.write_bytes(_sealed(MANIFESTS[case](data)))
    with pytest.raises(CheckpointError):
        load(path.parent)


@pytest.mark.parametrize("raw", [b"", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"format": NaN}', b"9" * 5000])
def test_a_manifest_that_is_no_manifest_is_refused(run: Path, raw: bytes) -> None:
    path = run / "checkpoints" / "step-20" / "manifest.json"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError):
        load(path.parent)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError):
        load(path.parent)


def hostile_files() -> list[bytes]:
    def file(header: Any, data: bytes = b"\0" * 16, length: int | None = None) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return (len(text) if length is None else length).to_bytes(8, "little") + text + data

    def entry(dtype: Any = "F32", shape: Any = (4,), offsets: Any = (0, 16)) -> dict[str, Any]:
        return {"dtype": dtype, "shape": shape, "data_offsets": offsets}

    good = {"w": entry()}
    shapes = [[-4], [5], [2**63], [2**32, 2**32], [4.0], "4", None, [[4]], [True], [2**200]]
    offsets = [[0, 15], [0, 17], [1, 17], [16, 0], [-16, 0], [0, 2**63], [0], [], None, [0, 16, 32], ["0", "16"]]
    headers: list[Any] = [
        *({"w": entry(shape=shape)} for shape in shapes),
        *({"w": entry(offsets=offset)} for offset in offsets),
        *({"w": entry(dtype=dtype)} for dtype in ("F33", "", None, 4, "O", "F64", "BOOL", "pickle")),
        {"w": entry(), "v": entry()},
        {"w": entry(shape=(2,), offsets=(0, 8)), "v": entry(shape=(3,), offsets=(4, 16))},
        {"w": entry(shape=(2,), offsets=(0, 8))},
        {"w": entry(shape=(2,), offsets=(8, 16))},
        {"w": {}}, {"w": None}, {"w": []}, {"__metadata__": {"a": 1}}, [], None, 3, "x",
        b"", b"{", b"\xff\xfe", b"[" * 50_000, b'{"w":' * 20_000, b'{"w":1e999}',
    ]  # fmt: skip
    lengths = [0, 1, 7, 2**20, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
    files = [file(header) for header in headers] + [file(good, length=length) for length in lengths]
    whole = file(good)
    draw = random.Random(1)
    scrambled = [
        bytes(draw.randrange(256) if draw.random() < 0.2 else byte for byte in whole[:64]) + whole[64:]
        for _ in range(100)
    ]
    return [*files, *scrambled, *(whole[:length] for length in range(0, len(whole), 3)), b"", b"\x80\x04.", b"PK\3\4"]


def test_two_hundred_hostile_tensor_files_with_right_hashes_are_refused(run: Path) -> None:
    folder = run / "checkpoints" / "step-20"
    body = json.loads((folder / "manifest.json").read_bytes())
    del body["blake2b"]
    files = hostile_files()
    assert len(files) > 150
    refused = 0
    for raw in files:
        overwrite(folder / "model.safetensors", 0, raw)
        os.truncate(folder / "model.safetensors", len(raw))
        digest = hashlib.blake2b(raw, digest_size=32).hexdigest()
        body["files"]["model"] = {"size_bytes": len(raw), "blake2b": digest, "aliases": {}}
        (folder / "manifest.json").write_bytes(_sealed(body))
        try:
            tensors = load(folder).files["model"]
        except CheckpointError:
            refused += 1
            continue
        # Some scrambled bytes only rename the tensor: what loads must fit in the file it came from.
        assert sum(tensor.nbytes for tensor in tensors.values()) <= len(raw)
    assert refused > 0.9 * len(files)


def test_opening_a_checkpoint_calls_no_pickle(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pickle was called")

    for name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load"):
        monkeypatch.setattr(name, refuse)
    assert load(run).step == 20
    shutil.rmtree(run)
