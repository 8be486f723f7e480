"""The tokenizer: what goes in comes out, byte for byte, whoever wrote it."""

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from turnout.data.excerpt import spread_excerpt
from turnout.data.tokenizer import END_OF_TEXT, Tokenizer
from turnout.errors import ConfigError, DataError

SENTENCES = [
    "the switch sends each wagon down its own track\n",
    "übergänge: 轨道 🚂 \r\n\t",
    "x = [1, 22, 333]  # it's\n",
]


@cache
def learnt() -> Tokenizer:
    return Tokenizer.train(SENTENCES * 20, vocab_size=400)


@cache
def sentencepiece_like() -> Tokenizer:
    """A small BPE with byte fallback, as Llama 2 and Mixtral have."""
    words = ["</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    vocab = {word: number for number, word in enumerate(words)}
    core = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens(["</s>"])
    return Tokenizer(core)


@pytest.mark.parametrize("make", [learnt, sentencepiece_like])
@given(text=st.text())
def test_any_unicode_text_comes_back_and_streams_byte_by_byte(make: Callable[[], Tokenizer], text: str) -> None:
    tokenizer = make()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


@given(
    texts=st.lists(st.text(alphabet=st.sampled_from("ab 1.\n\t'é轨"), max_size=60), max_size=5), size=st.integers(1, 9)
)
def test_a_batch_or_a_text_in_pieces_encodes_as_each_text_alone(texts: list[str], size: int) -> None:
    tokenizer = learnt()
    whole = [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch(texts) == whole
    pieces = [list(tokenizer._pieces(text, size)) for text in texts]
    assert ["".join(group) for group in pieces] == texts
    assert [[token for piece in group for token in tokenizer.encode(piece)] for group in pieces] == whole


def test_long_text_really_is_cut_at_lines() -> None:
    assert list(learnt()._pieces("one\ntwo\n\nthree\nfour", 2)) == ["one\n", "two\n\nthree\n", "four"]


@given(before=st.text(), after=st.text())
def test_no_document_can_spell_the_end_of_text(before: str, after: str) -> None:
    tokenizer = learnt()
    text = f"{before}{END_OF_TEXT}{after}"
    assert tokenizer.eot_id not in tokenizer.encode(text)
    assert tokenizer.eot_id not in tokenizer.encode_batch([text])[0]
    assert tokenizer.eot_id in tokenizer.encode(text, parse_special=True)
    assert tokenizer.decode([tokenizer.eot_id]) == END_OF_TEXT


def test_half_a_character_and_an_id_past_the_end_decode_to_replacements() -> None:
    tokenizer = learnt()
    ids = [token for byte in "é".encode() for token in range(257) if tokenizer.token_bytes(token) == bytes([byte])]
    assert tokenizer.decode(ids) == "é"
    assert tokenizer.decode(ids[:1]) == "\ufffd"
    assert tokenizer.decode([tokenizer.vocab_size]) == "\ufffd"


@settings(max_examples=10)
@given(texts=st.lists(st.text(), max_size=5), vocab_size=st.integers(257, 300))
def test_learning_twice_gives_one_tokenizer_and_a_file_brings_it_back(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], vocab_size: int
) -> None:
    first, second = (Tokenizer.train(texts, vocab_size) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert first.vocab_size <= vocab_size
    folder = tmp_path_factory.mktemp("tokenizer")
    first.save(folder / "tokenizer.json")
    for path in (folder, folder / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.fingerprint == first.fingerprint
        assert loaded.eot_id == first.eot_id
    assert [loaded.encode(text) for text in texts] == [first.encode(text) for text in texts]


def test_another_process_learns_the_same_tokenizer() -> None:
    code = (
        "from turnout.data.tokenizer import Tokenizer; import sys;"
        "print(Tokenizer.train(eval(sys.argv[1]) * 20, vocab_size=400).fingerprint)"
    )
    done = subprocess.run([sys.executable, "-c", code, repr(SENTENCES)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == learnt().fingerprint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"nonsense", "is not a tokenizer.json file"),
        (b"{}", "is not a tokenizer.json file"),
        (b"\xff\xfe", "cannot read tokenizer"),
        (
            tokenizers.Tokenizer(models.BPE()).to_str().encode(),
            r"no end-of-text token; one of these is needed: <\|endof",
        ),
    ],
)
def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        Tokenizer.load(tmp_path)


def test_a_missing_file_a_small_vocabulary_and_a_small_model_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read tokenizer .*nowhere\.json"):
        Tokenizer.load(tmp_path / "nowhere.json")
    with pytest.raises(ConfigError, match="vocab_size=256 must be at least 257"):
        Tokenizer.train(["text"], 256)
    learnt().require_fits(learnt().vocab_size)
    with pytest.raises(DataError, match=r"has \d+ tokens, model\.vocab_size=300; set model\.vocab_size=\d+"):
        learnt().require_fits(300)


def test_a_tokenizer_with_gaps_and_one_that_cannot_stream() -> None:
    core = tokenizers.Tokenizer(models.WordLevel({"</s>": 0, "egg": 7}, unk_token="</s>"))
    tokenizer = Tokenizer(core)
    assert tokenizer.vocab_size == 8
    assert tokenizer.decode([7, 0]) == "egg </s>"
    with pytest.raises(DataError, match=r"decoder none\) have no bytes of their own"):
        tokenizer.token_bytes(7)


def test_half_a_surrogate_pair_is_an_error() -> None:
    for encode in (learnt().encode, lambda text: learnt().encode_batch([text])):
        with pytest.raises(DataError, match=r"lone surrogate '\\udfff' at character 1"):
            encode("a\udfff")


@settings(max_examples=30)
@given(lengths=st.lists(st.integers(0, 30_000), max_size=12), max_chars=st.integers(4096, 60_000))
def test_an_excerpt_is_everything_or_every_nth_chunk_within_the_limit(lengths: list[int], max_chars: int) -> None:
    texts = [chr(ord("a") + number) * length for number, length in enumerate(lengths)]
    kept = spread_excerpt(texts, max_chars)
    chars = sum(map(len, kept))
    assert chars <= max_chars
    if sum(lengths) <= max_chars:
        assert "".join(kept) == "".join(texts)
    chunks = [text[at : at + 4096] for text in texts for at in range(0, len(text), 4096)]
    strides = [2**power for power in range(12)]
    assert kept in [chunks[::stride] for stride in strides]
