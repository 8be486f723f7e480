"""Token shards: what was written is what is read, and anything else is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnout.data.atomic import atomic_file
from turnout.data.shards import TokenShard, write_shard
from turnout.errors import DataError

EOT = 0


def write(path: Path, documents: list[list[int]], vocab_size: int = 400) -> Path:
    with write_shard(path, vocab_size=vocab_size, eot_id=EOT, tokenizer="t" * 64, corpus="c" * 64) as writer:
        for tokens in documents:
            writer.append(tokens)
    return path


@settings(max_examples=40)
@given(
    vocab_size=st.sampled_from([300, 65_536, 65_537, 2**24]),
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    seed=st.integers(0, 99),
)
def test_documents_come_back_with_their_borders(
    tmp_path_factory: pytest.TempPathFactory, vocab_size: int, lengths: list[int], seed: int
) -> None:
    random = np.random.default_rng(seed)
    documents = [random.integers(0, vocab_size, length).tolist() for length in lengths]
    path = write(tmp_path_factory.mktemp("shard") / "train.bin", documents, vocab_size)
    shard = TokenShard.open(path, tokenizer="t" * 64)
    assert [shard.document(number).tolist() for number in range(shard.num_documents)] == documents
    assert shard.tokens.tolist() == [token for tokens in documents for token in [*tokens, EOT]]
    assert shard.num_tokens == len(shard.tokens)
    assert shard.tokens.itemsize == (2 if vocab_size <= 65_536 else 4)
    assert sorted(file.name for file in path.parent.iterdir()) == ["train.bin", "train.json"]


def test_the_same_tokens_have_the_same_fingerprint_and_others_do_not(tmp_path: Path) -> None:
    shards = [
        TokenShard.open(write(tmp_path / f"{name}.bin", documents))
        for name, documents in {"a": [[1, 2], [3]], "b": [[1, 2], [3]], "c": [[1, 2, 3]]}.items()
    ]
    assert shards[0].fingerprint == shards[1].fingerprint != shards[2].fingerprint


@settings(max_examples=25)
@given(place=st.integers(0, 13), flip=st.integers(1, 255))
def test_any_changed_byte_is_noticed(tmp_path_factory: pytest.TempPathFactory, place: int, flip: int) -> None:
    path = write(tmp_path_factory.mktemp("shard") / "train.bin", [[1, 2, 3], [4, 5]])
    content = bytearray(path.read_bytes())
    content[place] ^= flip
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"changed or damaged.*delete the folder .* and prepare again"):
        TokenShard.open(path)


@pytest.mark.parametrize("size", range(14))
def test_any_truncation_is_noticed(tmp_path: Path, size: int) -> None:
    path = write(tmp_path / "train.bin", [[1, 2, 3], [4, 5]])
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match=rf"has {size} bytes; its index says 14; delete the folder"):
        TokenShard.open(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "turnout-tokens-9"}, "has format 'turnout-tokens-9'; this version reads 'turnout-tokens-1'"),
        ({"dtype": "float64"}, r"damaged \(dtype 'float64'; it must be one of: uint16, uint32"),
        ({"num_tokens": "7"}, r"damaged \(num_tokens='7' must be an integer"),
        ({"document_starts": [0, 3]}, r"damaged \(document_starts must run from 0 to num_tokens=7"),
        ({"document_starts": [0, 4, 4, 7]}, "document_starts must rise"),
        ({"document_starts": [0, 9, 4, 7]}, "document_starts must rise"),
        ({"document_starts": "none"}, "damaged"),
        ({"document_starts": [0, 10**30]}, "damaged"),
        ({"extra": 1}, "unknown field 'extra'"),
    ],
)
def test_an_index_that_makes_no_sense_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = write(tmp_path / "train.bin", [[1, 2, 3], [4, 5]])
    index = path.with_suffix(".json")
    index.write_text(json.dumps(json.loads(index.read_text()) | change))
    with pytest.raises(DataError, match=message):
        TokenShard.open(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"null"])
def test_an_index_that_is_no_index_is_refused(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path / "train.bin", [[1]])
    path.with_suffix(".json").write_bytes(content)
    with pytest.raises(DataError, match=r"train\.json"):
        TokenShard.open(path)


def test_missing_files_and_another_tokenizer_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "train.bin", [[1]])
    with pytest.raises(DataError, match=r"made with tokenizer tttttttttttt, not xxxxxxxxxxxx"):
        TokenShard.open(path, tokenizer="x" * 64)
    with pytest.raises(DataError, match=r"no index val\.json"):
        TokenShard.open(tmp_path / "val.bin")
    path.unlink()
    with pytest.raises(DataError, match="cannot read token shard"):
        TokenShard.open(path)


def test_a_writer_that_is_stopped_leaves_nothing_behind(tmp_path: Path) -> None:
    def write_and_stop() -> None:
        with write_shard(tmp_path / "train.bin", vocab_size=9, eot_id=EOT, tokenizer="t", corpus="c") as writer:
            writer.append([1, 2])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_stop()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="no documents to write"):
        write(tmp_path / "train.bin", [])


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with atomic_file(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
