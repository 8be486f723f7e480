"""Byte-level BPE: text <-> token ids, learnt here or read from any tokenizer.json."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from turnout.data.atomic import write_atomic
from turnout.data.utf8 import require_encodable
from turnout.errors import ConfigError, DataError

END_OF_TEXT = "<|endoftext|>"
# what other tokenizers call the token between documents, likeliest first
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "<|im_end|>", "[SEP]")
MIN_VOCAB_SIZE = 257  # every byte, and the end of text

_REPLACEMENT = "\ufffd".encode()
_PIECE_CHARS = 1 << 20
# a newline between two printed ASCII characters is a token border of byte-level BPE whatever stands around it
_BORDER = re.compile(r"(?<=[!-~]\n)(?=[!-~])")


class Tokenizer:
    """Text to token ids and back. The text `<|endoftext|>` in a document is only text: no document can end another."""

    def __init__(self, core: tokenizers.Tokenizer) -> None:
        self._core = core
        self._core.encode_special_tokens = True
        self._core.no_padding()
        self._core.no_truncation()
        ends = {name: core.token_to_id(name) for name in _END_NAMES}
        known = [(name, token) for name, token in ends.items() if token is not None]
        if not known:
            raise DataError(f"the tokenizer has no end-of-text token; one of these is needed: {', '.join(_END_NAMES)}")
        self.eot, self.eot_id = known[0]
        # ids may have gaps, and a model needs a row for the last one
        self.vocab_size = 1 + max(core.get_vocab().values())

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn byte-level BPE; the same texts in the same order give the same tokenizer.

        Fewer tokens than `vocab_size` come out if the texts hold fewer pairs worth merging.
        Raises: ConfigError if `vocab_size` has no room for every byte.
        Source: Sennrich et al. 2016, arXiv:1508.07909; over bytes as in GPT-2 (Radford et al. 2019).
        """
        if vocab_size < MIN_VOCAB_SIZE:
            raise ConfigError(f"vocab_size={vocab_size} must be at least {MIN_VOCAB_SIZE}: 256 bytes and {END_OF_TEXT}")
        core = tokenizers.Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        core.train_from_iterator(texts, trainer)
        return cls(core)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """The tokenizer in a tokenizer.json file, or in a folder that holds one.

        Raises: DataError if it is missing, is not a tokenizer, or has no token that ends a text.
        """
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            return cls(tokenizers.Tokenizer.from_str(file.read_text("utf-8")))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read tokenizer {file}: {error}") from error
        except DataError as error:
            raise DataError(f"{file}: {error}") from error
        except Exception as error:  # the library raises bare Exception for whatever it cannot parse
            raise DataError(f"{file} is not a tokenizer.json file of the tokenizers library: {error}") from error

    def save(self, path: Path) -> None:
        """Write tokenizer.json, which every library that reads such files can load."""
        write_atomic(path, self._json.encode())

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal digest of everything that decides which ids a text gets."""
        return hashlib.sha256(self._json.encode()).hexdigest()

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Token ids. `parse_special` reads `<|endoftext|>` and its like as the tokens: for prompts you wrote yourself.

        Raises: DataError if `text` holds half a surrogate pair, which no UTF-8 has.
        """
        core = self._special_core if parse_special else self._core
        return core.encode(require_encodable(text, "text to encode"), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`[encode(text) for text in texts]`, on all cores.

        Raises: DataError as `encode`.
        """
        pieces = [list(self._pieces(require_encodable(text, "text to encode"), _PIECE_CHARS)) for text in texts]
        encoded = iter(self._core.encode_batch_fast([p for group in pieces for p in group], add_special_tokens=False))
        return [[token for _ in group for token in next(encoded).ids] for group in pieces]

    def decode(self, ids: Sequence[int]) -> str:
        """The text; bytes that are not UTF-8, as half a character at the end, come out as U+FFFD."""
        if self._is_byte_level:
            return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")
        return self._core.decode(list(ids), skip_special_tokens=False)

    def token_bytes(self, token: int) -> bytes:
        """The bytes one token stands for, perhaps part of a character: join before decoding, or decode incrementally.

        An id past the vocabulary, which a model with a padded vocabulary can draw, gives U+FFFD.
        Raises: DataError for a tokenizer whose tokens are not bytes, as WordPiece.
        """
        return self._bytes_by_id.get(token, _REPLACEMENT)

    def require_fits(self, model_vocab_size: int) -> None:
        """Check that a model has a row for each token; it may have more, as padded vocabularies do.

        Raises: DataError naming both sizes.
        """
        if model_vocab_size < self.vocab_size:
            raise DataError(
                f"the tokenizer has {self.vocab_size} tokens, model.vocab_size={model_vocab_size}; "
                f"set model.vocab_size={self.vocab_size} or more, or use another tokenizer"
            )

    @cached_property
    def _json(self) -> str:
        return self._core.to_str()

    @cached_property
    def _special_core(self) -> tokenizers.Tokenizer:
        core = tokenizers.Tokenizer.from_str(self._json)
        core.encode_special_tokens = False
        return core

    @cached_property
    def _spec(self) -> dict[str, Any]:
        return json.loads(self._json)

    @cached_property
    def _decoders(self) -> set[str]:
        decoder: dict[str, Any] = self._spec["decoder"] or {"type": "none"}
        return {part["type"] for part in decoder.get("decoders", [decoder])}

    @cached_property
    def _is_byte_level(self) -> bool:
        return "ByteLevel" in self._decoders

    @cached_property
    def _bytes_by_id(self) -> dict[int, bytes]:
        if not self._decoders & {"ByteLevel", "ByteFallback", "Metaspace"}:
            kinds = ", ".join(sorted(self._decoders))
            raise DataError(f"tokens of this tokenizer (decoder {kinds}) have no bytes of their own; it cannot stream")
        added = {token["id"]: token["content"].encode() for token in self._spec["added_tokens"]}
        to_bytes = _gpt2_bytes if self._is_byte_level else _sentencepiece_bytes
        vocabulary = self._core.get_vocab()
        return added | {token: to_bytes(name) for name, token in vocabulary.items() if token not in added}

    def _pieces(self, text: str, size: int) -> Iterator[str]:
        """`text` cut at token borders into pieces of at least `size`, where it is known what a border is."""
        start = 0
        while self._cuts_at_newlines and len(text) - start > size:
            border = _BORDER.search(text, start + size)
            if border is None:
                break
            yield text[start : border.start()]
            start = border.start()
        yield text[start:]

    @cached_property
    def _cuts_at_newlines(self) -> bool:
        pre = self._spec["pre_tokenizer"] or {}
        plain = pre.get("type") == "ByteLevel" and pre["use_regex"] and not pre["add_prefix_space"]
        return plain and self._spec["normalizer"] is None


def _byte_of_char() -> dict[str, bytes]:
    """Source: bytes_to_unicode in encoder.py of https://github.com/openai/gpt-2."""
    printed = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    hidden = [byte for byte in range(256) if byte not in printed]
    chars = {chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
    return {char: bytes([byte]) for char, byte in chars.items()}


_BYTE_OF_CHAR = _byte_of_char()


def _gpt2_bytes(name: str) -> bytes:
    return b"".join(_BYTE_OF_CHAR.get(char, char.encode()) for char in name)


def _sentencepiece_bytes(name: str) -> bytes:
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", name)
    return bytes.fromhex(byte.group(1)) if byte else name.replace("▁", " ").encode()
