"""Pieces of logical tensors: what is saved at one layout of ranks loads at any other, bit for bit, and damage is named.

The ranks are played one after another in this process, by the planners and the storage that DCP calls on real ones.
"""

import json
import math
import os
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from turnout.comm import World
from turnout.errors import CheckpointError
from turnout.experts.cut import Cut
from turnout.parallel import Shards
from turnout.parallel.boxes import Layout, layout_of
from turnout.placement import Placement
from turnout.train import checkpoint
from turnout.train.checkpoint_manifest import _sealed, read_manifest
from turnout.train.checkpoint_pieces import Piece, box
from turnout.train.checkpoint_sharded import read_pieces, save_pieces
from turnout.train.checkpoint_write import PieceSavePlanner, PieceWriter

HIDDEN, DIM = 12, 3
ALONE = World()


@pytest.fixture(autouse=True)
def _no_flushing(monkeypatch: pytest.MonkeyPatch) -> None:
    # that bytes reach the disk before names is looked at elsewhere; here it would be most of the time
    monkeypatch.setattr(os, "fsync", lambda _: None)


@dataclass(frozen=True)
class Rows:
    """What `layout_of` asks of FSDP's shards: even rows of each part, the last ones with fewer or none."""

    rows: int
    shards: int
    at: int

    @property
    def first_row(self) -> int:
        return self.at * math.ceil(self.rows / self.shards)

    @property
    def num_rows(self) -> int:
        return max(0, min(math.ceil(self.rows / self.shards), self.rows - self.first_row))


@dataclass(frozen=True)
class Ranks:
    """Experts by place and by slice of their hidden width; the part of each such rank in shards over some more."""

    bounds: tuple[int, ...]
    slices: int = 1
    shards: int = 1
    copies: int = 1  # of each shard

    @property
    def size(self) -> int:
        return (len(self.bounds) - 1) * self.slices * self.shards * self.copies

    def layout(self, name: str, whole: tuple[int, ...], rank: int) -> Layout:
        cut = self.cut(name, whole)
        place, at = divmod(rank // self.copies, self.shards)
        rows = (cut.part_shape(place) if cut else whole or (0,))[0]
        shards: Any = Rows(rows, self.shards, at) if self.shards > 1 and whole else None
        return layout_of(whole, cut, place, shards)

    def cut(self, name: str, whole: tuple[int, ...]) -> Cut | None:
        if name.startswith(("dense", "tied")) or not whole:
            return None
        axis, halves = {"gate_up": (2, 2), "down": (1, 1), "down_bias": (0, 1)}[name.split("/")[0]]
        return Cut(shape=whole, placement=Placement(bounds=self.bounds), slices=self.slices, axis=axis, halves=halves)


LAYOUTS = {
    "one": Ranks((0, 5)),
    "uneven": Ranks((0, 2, 5)),
    "ep 4": Ranks((0, 1, 2, 4, 5)),
    "sliced": Ranks((0, 2, 5), slices=2),
    "sliced by 3": Ranks((0, 5), slices=3),
    "shards": Ranks((0, 3, 5), shards=2),
    "sliced shards": Ranks((0, 3, 5), slices=2, shards=4),
    "copies": Ranks((0, 3, 5), shards=2, copies=2),
}


def wholes(seed: int = 0) -> dict[str, Tensor]:
    shapes = {
        "gate_up": (5, DIM, 2 * HIDDEN),
        "gate_up/exp_avg": (5, DIM, 2 * HIDDEN),
        "down": (5, HIDDEN, DIM),
        "down_bias": (5, DIM),
        "dense": (7, 2),
        "dense/step": (),
        "dense.empty": (0, 3),
    }
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return tensors | {"down": tensors["down"].bfloat16(), "dense/step": torch.tensor(3.0)}


def pieces_of(tensors: Mapping[str, Tensor], ranks: Ranks, rank: int) -> dict[str, Piece]:
    """What a rank has of the wholes, cut out by `Cut.part` and rows, and not by the boxes that are tested."""
    found = {}
    for name, whole in tensors.items():
        layout = ranks.layout(name, tuple(whole.shape), rank)
        cut = ranks.cut(name, tuple(whole.shape))
        part = whole if cut is None else cut.part(whole, rank // ranks.copies // ranks.shards)
        if layout.sharding is not None:
            first = layout.sharding.first_row
            part = part[first : first + layout.sharding.num_rows]
        assert part.shape == layout.here
        found[name] = Piece(tensor=part, layout=layout)
    return found


def save_as(run: Path, step: int, tensors: Mapping[str, Tensor], ranks: Ranks, meta: Mapping[str, Any]) -> Path:
    """The calls that DCP makes, for all ranks in turn."""
    held = [{f"model/{name}": p for name, p in pieces_of(tensors, ranks, rank).items()} for rank in range(ranks.size)]
    run.mkdir(exist_ok=True)
    alone = save_pieces(run, step, {"model": pieces_of(tensors, Ranks((0, 5)), 0)}, meta, keep_last=9, world=ALONE)
    manifest = read_manifest(alone)
    staged = run / "staged"
    entries: dict[str, Any] = {}
    writers = [PieceWriter(staged, staged.mkdir, lambda _, each: entries.update(each)) for _ in held]
    planners = [PieceSavePlanner(own, lambda: None) for own in held]
    for planner, own in zip(planners, held, strict=True):
        planner.set_up_planner(dict(own), is_coordinator=own is held[0])
    plans, metadata = planners[0].create_global_plan([planner.create_local_plan() for planner in planners])
    plans = writers[0].prepare_global_plan(plans)
    results = [w.write_data(plan, p).value() for w, p, plan in zip(writers, planners, plans, strict=True)]
    writers[0].finish(metadata, results)
    part = replace(manifest.parts["model"], files=tuple(sorted(entries)))
    body = json.loads((alone / "manifest.json").read_text()) | {
        "files": {name: vars(entry) for name, entry in entries.items()},
        "parts": {"model": vars(part)},
    }
    del body["blake2b"]
    (staged / "manifest.json").write_bytes(_sealed(body))
    shutil.rmtree(alone)
    staged.rename(alone)
    return alone


def read_as(path: Path, ranks: Ranks, rank: int) -> dict[str, Tensor]:
    manifest = checkpoint.verify(path)

    def wanted(part: str, name: str, whole: tuple[int, ...]) -> Layout:
        layout = ranks.layout(name, whole, rank)
        # there is no mesh here to place a shard on
        return replace(layout, sharding=None)

    return read_pieces(path, manifest, wanted, "cpu")["model"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_saved_at_one_layout_loads_at_any_other(name: str, tmp_path: Path) -> None:
    tensors = wholes()
    path = save_as(tmp_path, 1, tensors, LAYOUTS[name], {})
    whole = checkpoint.load(path).files["model"]
    assert whole.keys() == tensors.keys()
    assert all(torch.equal(whole[n], each) and whole[n].dtype == each.dtype for n, each in tensors.items())
    for ranks in LAYOUTS.values():
        for rank in range(ranks.size):
            got, want = read_as(path, ranks, rank), pieces_of(tensors, ranks, rank)
            assert got.keys() == want.keys()
            assert all(torch.equal(got[n], piece.tensor) for n, piece in want.items()), (ranks, rank)


def test_no_number_is_stored_twice_and_each_rank_writes_its_own(tmp_path: Path) -> None:
    tensors = wholes()
    path = save_as(tmp_path, 1, tensors, LAYOUTS["copies"], {})
    files = sorted(path.glob("*.safetensors"))
    assert len(files) == LAYOUTS["copies"].size
    stored = sum(file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little") for file in files)
    assert stored == sum(each.numel() * each.element_size() for each in tensors.values())


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_file_of_whole_tensors_is_read_in_pieces(name: str, tmp_path: Path) -> None:
    tensors, ranks = wholes(), LAYOUTS[name]
    tensors |= {"tied": tensors["dense"]}
    path = checkpoint.save(tmp_path, 1, {"model": tensors}, {}, keep_last=1)
    for rank in range(ranks.size):
        want, got = pieces_of(tensors, ranks, rank), read_as(path, ranks, rank)
        assert got.keys() == want.keys()
        assert all(torch.equal(got[n], piece.tensor) for n, piece in want.items())


def test_every_box_of_a_cut_is_where_its_part_has_it() -> None:
    draw = random.Random(0)
    for _ in range(100):
        slices, halves = draw.choice((1, 2, 3)), draw.choice((1, 2))
        bounds = [0, *sorted(draw.sample(range(1, 6), draw.randrange(4))), 6]
        axis = draw.choice((0, 1, 2))
        shape = [6, 2, 2]
        if axis:
            shape[axis] *= slices * halves
        placement = Placement(bounds=tuple(bounds))
        cut = Cut(shape=tuple(shape), placement=placement, slices=slices, axis=axis, halves=halves)
        whole, met = torch.arange(math.prod(shape)).view(shape), torch.zeros(shape)
        for rank in range(cut.ranks):
            part = cut.part(whole, rank)
            seen = torch.full(part.shape, -1)
            for block in cut.blocks(rank):
                seen[box(block.part_at, block.sizes)] = whole[box(block.whole_at, block.sizes)]
                met[box(block.whole_at, block.sizes)] += 1
            assert torch.equal(seen, part)
        assert (met == 1).all()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (10, 20):
        save_as(tmp_path, step, wholes(step), LAYOUTS["sliced"], {"step": step})
    (tmp_path / "checkpoints" / "latest").unlink()
    return tmp_path


def test_every_flipped_bit_of_every_file_is_found_and_named_before_use(run: Path) -> None:
    newest, draw = run / "checkpoints" / "step-20", random.Random(0)
    files = {path: path.read_bytes() for path in sorted(newest.iterdir())}
    for number in range(300):
        path = sorted(files)[number % len(files)]
        place, bit = draw.randrange(len(files[path])), draw.randrange(8)
        with path.open("r+b") as file:
            file.seek(place)
            file.write(bytes([files[path][place] ^ 1 << bit]))
        with pytest.raises(CheckpointError, match=path.name.replace(".", r"\.")):
            checkpoint.load(newest)
        path.write_bytes(files[path])
    checkpoint.verify(newest)


def test_a_damaged_piece_falls_back_to_the_last_good_checkpoint_of_either_kind(run: Path) -> None:
    path = run / "checkpoints" / "step-20" / "model.00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    loaded = checkpoint.load(run)
    assert loaded.step == 10
    assert torch.equal(loaded.files["model"]["down"], wholes(10)["down"])
    assert "model.00002.safetensors is damaged" in "; ".join(loaded.notes)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"missing model\.00002\.safetensors"):
        checkpoint.load(path.parent)


def test_the_last_ones_are_kept_whatever_their_kind(tmp_path: Path) -> None:
    tensors = wholes()
    pieces = pieces_of(tensors, LAYOUTS["one"], 0)
    for step in range(1, 6):
        if step % 2:
            checkpoint.save(tmp_path, step, {"model": tensors}, {}, keep_last=3)
        else:
            save_pieces(tmp_path, step, {"model": pieces}, {}, keep_last=3, world=ALONE)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "latest",
        "step-3",
        "step-4",
        "step-5",
    ]
    assert checkpoint.load(tmp_path).step == 5


def lie(path: Path, change: Any) -> None:
    """A manifest that is sealed all the same, as somebody else could write it."""
    body = json.loads((path / "manifest.json").read_text())
    del body["blake2b"]
    change(body)
    (path / "manifest.json").write_bytes(_sealed(body))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: b["parts"]["model"]["tensors"].pop("down"), r"have 'down' beside what its manifest lists"),
        (lambda b: b["parts"]["model"]["tensors"].update(more=["F32", [2]]), r"lack 'more'"),
        (
            lambda b: b["parts"]["model"]["tensors"].update(dense=["F32", [70, 2]]),
            r"dense do not make up the \[70, 2\]",
        ),
        (lambda b: b["parts"]["model"]["tensors"].update(dense=["F64", [7, 2]]), r"dense do not make up the \[7, 2\]"),
        (lambda b: b["parts"]["model"]["files"].pop(), r"its parts do not have each of its files once"),
        (lambda b: b["parts"].update(model=3), r"does not say what its parts are"),
        (lambda b: b["parts"].update({"../x": b["parts"].pop("model")}), r"'\.\./x' is refused"),
        (lambda b: b.pop("parts"), r"does not say what its parts are"),
    ],
)
def test_a_manifest_that_does_not_fit_its_files_is_refused(change: Any, words: str, run: Path) -> None:
    path = run / "checkpoints" / "step-20"
    lie(path, change)
    with pytest.raises(CheckpointError, match=words):
        checkpoint.load(path)


def test_pieces_that_leave_a_gap_or_overlap_are_never_saved(tmp_path: Path) -> None:
    tensors = wholes()
    checkpoint.save(tmp_path, 1, {"model": tensors}, {}, keep_last=2)
    held: Sequence[dict[str, Piece]] = [
        {f"model/{name}": p for name, p in pieces_of(tensors, LAYOUTS["uneven"], rank).items()} for rank in (0, 0)
    ]
    planners = [PieceSavePlanner(own, lambda: None) for own in held]
    for planner, own in zip(planners, held, strict=True):
        planner.set_up_planner(dict(own), is_coordinator=True)
    with pytest.raises(ValueError, match="invalid fill tensor-volume"):
        planners[0].create_global_plan([planner.create_local_plan() for planner in planners])


def test_a_tensor_of_another_number_of_experts_is_refused_even_where_it_looks_like_a_part() -> None:
    cut = Cut(shape=(4, 3), placement=Placement.even(4, 2))
    shards = Shards(cuts={"up": cut}, group=None, has_first=True)
    assert shards.layout("up/step", ()).here == ()
    with pytest.raises(CheckpointError, match=r"up/exp_avg is \[2, 3\] in the checkpoint, \[4, 3\] here"):
        shards.layout("up/exp_avg", (2, 3))
