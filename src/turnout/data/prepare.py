"""Text -> tokens on disk, once: choose the split, learn the tokenizer, write the shards, remember."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import tokenizers

from turnout.cache import path_of
from turnout.config import Settings, from_dict
from turnout.data.atomic import write_atomic
from turnout.data.corpora import Corpus, Document, open_corpus
from turnout.data.excerpt import spread_excerpt
from turnout.data.shards import FORMAT, ShardWriter, TokenShard, write_shard
from turnout.data.split import Split, choose_split, in_validation
from turnout.data.survey import CorpusCard, is_blank, survey
from turnout.data.tokenizer import MIN_VOCAB_SIZE, Tokenizer
from turnout.data.utf8 import InvalidUtf8
from turnout.errors import ConfigError, DataError

# more text makes learning a tokenizer slower and its tokens hardly better
_LEARN_CHARS = 8_000_000
_ENCODE_CHARS = 1 << 22


@dataclass(frozen=True, kw_only=True)
class DataConfig(Settings):
    """Which text, in which tokens."""

    corpus: str = "stdlib"  # name of a corpus, or path of your own file, folder or glob
    tokenizer: str = "bpe"  # "bpe" learns one from the train text; or path of a tokenizer.json
    vocab_size: int = 4096  # tokens to learn for "bpe"; a tokenizer.json brings its own number
    val_fraction: float = 0.02  # share of the documents set aside for validation
    invalid_utf8: InvalidUtf8 = "error"  # own text that is not UTF-8: stop, skip the document, or put U+FFFD
    text_field: str = "text"  # field that holds the text in .jsonl files

    def __post_init__(self) -> None:
        if not self.corpus:
            raise ConfigError("data.corpus is empty; give the name of a corpus or a path")
        for name in ("corpus", "tokenizer"):
            _require_utf8(name, getattr(self, name))
        if not self.tokenizer:
            raise ConfigError('data.tokenizer is empty; give "bpe" or the path of a tokenizer.json')
        if not MIN_VOCAB_SIZE <= self.vocab_size <= 2**24:
            raise ConfigError(f"data.vocab_size={self.vocab_size} must be {MIN_VOCAB_SIZE} (every byte) to {2**24}")
        if not 0 < self.val_fraction <= 0.5:
            raise ConfigError(f"data.val_fraction={self.val_fraction} must be above 0 and at most 0.5")


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Everything a run needs to know about its text."""

    train: TokenShard
    val: TokenShard
    tokenizer: Tokenizer
    corpus: CorpusCard
    notes: tuple[str, ...]  # what a reader of the results should know about the text
    path: Path  # folder in the cache that holds the shards and tokenizer.json


@dataclass(frozen=True, kw_only=True)
class _Record:
    """dataset.json: written last, so a folder that has it is complete."""

    corpus: CorpusCard
    notes: list[str]


def _require_utf8(name: str, path: str) -> None:
    # a byte of a path that is not UTF-8 arrives as half of a surrogate pair, and a recipe is a UTF-8 file
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"data.{name}={path!a} is not UTF-8 at character {error.start}; rename it, or give a link with such a name"
        ) from error


def prepare(config: DataConfig, cache: Path, say: Callable[[str], None] = lambda line: None) -> Dataset:
    """The corpus as token shards; found in `cache` if the same text was prepared in the same way before.

    `say` is told what is being done, line by line.
    Raises: ConfigError for an unknown corpus or path; DataError if the text or the tokenizer cannot be used.
    """
    corpus, given = _sources(config)
    try:
        folder = _folder(config, corpus, given, cache)
        if not _is_complete(folder):
            _build(config, corpus, given, cache, folder, say)
    except OSError as error:
        raise DataError(f"cannot use the cache {cache}: {error}; set $TURNOUT_CACHE to a folder with room") from error
    return _open(folder)


def is_prepared(config: DataConfig, cache: Path) -> bool:
    """Whether `prepare` would find its work done; looks at text and tokenizer, fetches nothing and writes nothing.

    Raises: ConfigError for an unknown corpus or path; DataError if the text or the tokenizer cannot be read, or the
    text is not here and cannot be fetched.
    """
    corpus, given = _sources(config)
    if not corpus.is_here(cache):
        if problem := corpus.problem():
            raise DataError(f"cannot fetch corpus {corpus.name!r}: {problem}")
        return False
    try:
        return _is_complete(_folder(config, corpus, given, cache))
    except OSError as error:
        raise DataError(f"cannot read corpus {corpus.name!r}: {error}") from error


def _sources(config: DataConfig) -> tuple[Corpus, Tokenizer | None]:
    corpus = open_corpus(config.corpus, text_field=config.text_field, invalid_utf8=config.invalid_utf8)
    return corpus, None if config.tokenizer == "bpe" else Tokenizer.load(path_of(config.tokenizer))


def _folder(config: DataConfig, corpus: Corpus, given: Tokenizer | None, cache: Path) -> Path:
    return cache / "prepared" / f"{corpus.name}-{_key(config, corpus.fingerprint(cache), given)}"


def _is_complete(folder: Path) -> bool:
    return (folder / "dataset.json").exists()


def _key(config: DataConfig, corpus_fingerprint: str, given: Tokenizer | None) -> str:
    """What decides the tokens, and nothing else: a folder of text may move."""
    parts = asdict(config) | {
        "format": FORMAT,
        "corpus": corpus_fingerprint,
        "tokenizer": given.fingerprint if given else f"bpe of tokenizers {tokenizers.__version__}",
        "vocab_size": None if given else config.vocab_size,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _build(
    config: DataConfig, corpus: Corpus, given: Tokenizer | None, cache: Path, folder: Path, say: Callable[[str], None]
) -> None:
    say(f"reading corpus {corpus.name}: {corpus.obtained}")
    names: list[str] = []
    card = survey(corpus, cache, lambda document: names.append(document.name))
    in_val = sum(in_validation(name, config.val_fraction) for name in names)
    split = choose_split(card.documents, in_val, config.val_fraction)
    tokenizer = given or _learn(config, corpus, split, cache, say)
    say(f"encoding {card.documents} documents, {card.text_bytes / 1e6:.1f} MB")
    tokenizer.save(folder / "tokenizer.json")
    _write(_texts(corpus, cache), split, tokenizer, folder, card)
    if corpus.fingerprint(cache) != card.fingerprint:
        raise DataError(f"the text of corpus {config.corpus!r} changed while it was being prepared; run again")
    record = _Record(corpus=card, notes=list(_notes(config, card, split, tokenizer, given)))
    write_atomic(folder / "dataset.json", json.dumps(asdict(record), indent=1).encode())


def _learn(config: DataConfig, corpus: Corpus, split: Split, cache: Path, say: Callable[[str], None]) -> Tokenizer:
    say(f"learning a tokenizer of {config.vocab_size} tokens")
    # from train text alone: tokens made to fit the validation text would flatter every loss measured on it
    train_texts = (split.divide(document)[0] for document in _texts(corpus, cache))
    return Tokenizer.train(spread_excerpt(train_texts, _LEARN_CHARS), config.vocab_size)


def _write(documents: Iterator[Document], split: Split, tokenizer: Tokenizer, folder: Path, card: CorpusCard) -> None:
    write_side = partial(
        write_shard,
        vocab_size=tokenizer.vocab_size,
        eot_id=tokenizer.eot_id,
        tokenizer=tokenizer.fingerprint,
        corpus=card.fingerprint,
    )
    with write_side(folder / "train.bin") as train, write_side(folder / "val.bin") as val:
        for group in _groups(documents):
            sides = [split.divide(document) for document in group]
            _append(train, tokenizer, [train_text for train_text, _ in sides])
            _append(val, tokenizer, [val_text for _, val_text in sides])
        for side, writer in (("train", train), ("validation", val)):
            if not writer.num_documents:
                raise DataError(
                    f"corpus {card.name!r} has {card.text_bytes} bytes in {card.documents} documents: too little to "
                    f"leave any {side} text at data.val_fraction={split.fraction}; give more text"
                )


def _append(writer: ShardWriter, tokenizer: Tokenizer, texts: list[str]) -> None:
    for ids in tokenizer.encode_batch([text for text in texts if text and not text.isspace()]):
        writer.append(ids)


def _texts(corpus: Corpus, cache: Path) -> Iterator[Document]:
    return (document for document in corpus.documents(cache) if not is_blank(document))


def _groups(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents by the handful: enough text to keep all cores at work, little enough to keep in memory."""
    group, chars = [], 0
    for document in documents:
        group.append(document)
        chars += len(document.text)
        if chars >= _ENCODE_CHARS:
            yield group
            group, chars = [], 0
    yield group


def _notes(
    config: DataConfig, card: CorpusCard, split: Split, tokenizer: Tokenizer, given: Tokenizer | None
) -> Iterator[str]:
    if split.by == "tail":
        yield (
            f"{card.documents} documents are too few to set {split.fraction:.2%} of them aside: "
            "the end of each document is the validation text"
        )
    if card.left_out:
        yield f"{card.left_out} documents left out: empty, or not UTF-8 and skipped"
    if given is not None and given.vocab_size != config.vocab_size:
        yield f'the tokenizer file has {given.vocab_size} tokens; data.vocab_size={config.vocab_size} is for "bpe" only'
    if given is None and tokenizer.vocab_size < config.vocab_size:
        yield f"the text has pairs for only {tokenizer.vocab_size} of data.vocab_size={config.vocab_size} tokens"


def _open(folder: Path) -> Dataset:
    try:
        record = from_dict(_Record, json.loads((folder / "dataset.json").read_bytes()))
    except (OSError, ValueError, ConfigError) as error:
        raise DataError(f"{folder / 'dataset.json'} is damaged ({error}); delete {folder} and prepare again") from error
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    return Dataset(
        train=TokenShard.open(folder / "train.bin", tokenizer=tokenizer.fingerprint),
        val=TokenShard.open(folder / "val.bin", tokenizer=tokenizer.fingerprint),
        tokenizer=tokenizer,
        corpus=record.corpus,
        notes=tuple(record.notes),
        path=folder,
    )
