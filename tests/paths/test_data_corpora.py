"""Corpora: names and paths, your own files, and fetching with no network in sight."""

import gzip
import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnout.data import CORPORA, Corpus, Document, open_corpus, survey
from turnout.data.corpora import (
    Austen,
    DebianPackageDescriptions,
    Gcide,
    KingJames,
    LinuxDoc,
    MobyDick,
    WordNet,
    corpus_names,
)
from turnout.data.corpora.contract import FetchedCorpus
from turnout.data.sources import DebianDescriptions, DebianPackages, NpmPackage, Source, run_command
from turnout.errors import ConfigError, DataError


def texts(corpus: Corpus, cache: Path) -> dict[str, str]:
    return {document.name: document.text for document in corpus.documents(cache)}


@pytest.mark.parametrize("name", CORPORA.names())
def test_every_row_says_what_it_is_and_how_it_is_obtained(name: str) -> None:
    corpus = CORPORA[name]()
    assert corpus.name == name
    assert corpus.title
    assert corpus.licence
    assert corpus.obtained.endswith(".")
    assert corpus.size_bytes >= 0
    assert isinstance(corpus.needs, tuple)


def test_the_standard_library_is_text_on_every_machine_and_the_same_twice(tmp_path: Path) -> None:
    corpus = open_corpus("stdlib")
    first = [document.name for document in corpus.documents(tmp_path)]
    assert first == sorted(first)
    assert {"os.py", "json/decoder.py"} <= set(first)
    assert not any("site-packages" in name for name in first)
    assert corpus.problem() is None
    assert corpus.fingerprint(tmp_path) == corpus.fingerprint(tmp_path)


def test_a_python_without_source_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "python.zip"))
    with pytest.raises(DataError, match=r"corpus 'stdlib': this Python has no \.py source in .*another corpus"):
        open_corpus("stdlib").documents(tmp_path)


def test_an_unknown_name_lists_the_names_and_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown corpus 'sotv'.*austen.*wordnet.*did you mean 'sotu'"):
        open_corpus("sotv")


def test_a_home_that_nobody_has_is_no_path() -> None:
    with pytest.raises(ConfigError, match=r"path '~no-such-user/x': this machine knows no home folder '~no-such-user'"):
        open_corpus("~no-such-user/x")


@pytest.mark.parametrize("asked", ["txt", "text", "no/text"])
def test_no_name_is_offered_that_is_then_refused(asked: str) -> None:
    with pytest.raises(ConfigError) as refused:
        open_corpus(asked)
    listed = re.split(r"available: |by name: ", str(refused.value))[1].split("; ")[0]
    assert "did you mean" not in str(refused.value)
    assert "text" not in listed.split(", ")
    assert [open_corpus(name).name for name in listed.split(", ")] == corpus_names()


@pytest.mark.parametrize("path", ["no/such/folder", "missing.txt"])
def test_a_path_that_does_not_exist_is_named(path: str) -> None:
    with pytest.raises(ConfigError, match=rf"path '{path}' does not exist"):
        open_corpus(path)


def test_the_row_for_own_text_needs_a_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a path"):
        list(CORPORA["text"]().documents(tmp_path))


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    (folder / "deep").mkdir(parents=True)
    (folder / ".git").mkdir()
    for name, content in {
        "b.md": "bee",
        "a.txt": "\ufeffay",
        "deep/c.py": "sea",
        ".git/x.txt": "no",
        "picture.png": "no",
        "empty.txt": " \n",
        "rows.jsonl": '{"text": "one"}\n\n{"text": "two", "more": 1}\n',
        "shout.JSONL": '{"text": "three"}\n',
    }.items():
        (folder / name).write_text(content, "utf-8")
    return folder


def test_a_folder_gives_its_text_files_in_the_order_of_their_names(notes: Path) -> None:
    assert texts(open_corpus(str(notes)), notes) == {
        "a.txt": "ay",
        "b.md": "bee",
        "deep/c.py": "sea",
        "empty.txt": " \n",
        "rows.jsonl:1": "one",
        "rows.jsonl:3": "two",
        "shout.JSONL:1": "three",
    }


def test_a_file_and_a_glob_are_named_from_where_they_stand(notes: Path) -> None:
    assert texts(open_corpus(str(notes / "b.md")), notes) == {"b.md": "bee"}
    assert texts(open_corpus(f"{notes}/**/*.py"), notes) == {"deep/c.py": "sea"}
    assert texts(open_corpus(str(notes / "picture.png")), notes) == {"picture.png": "no"}


def test_a_changed_file_changes_the_fingerprint_and_a_moved_folder_does_not(notes: Path) -> None:
    before = open_corpus(str(notes)).fingerprint(notes)
    moved = notes.rename(notes.with_name("elsewhere"))
    assert open_corpus(str(moved)).fingerprint(moved) == before
    (moved / "b.md").write_text("bees")
    assert open_corpus(str(moved)).fingerprint(moved) != before


def test_a_survey_counts_text_and_what_holds_none(notes: Path) -> None:
    card = survey(open_corpus(str(notes)), notes)
    assert (card.documents, card.left_out, card.text_bytes) == (6, 1, len("aybeeseaonetwothree"))


def test_a_folder_or_file_without_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no text in .*searched for: \.txt"):
        list(open_corpus(str(tmp_path)).documents(tmp_path))
    (tmp_path / "blank.txt").write_text("\n\n")
    with pytest.raises(DataError, match=r"is empty: 1 documents, none with text"):
        survey(open_corpus(str(tmp_path)), tmp_path)


@settings(max_examples=30)
@given(before=st.text(max_size=20), after=st.text(max_size=20))
def test_bytes_that_are_not_utf8_are_found_where_they_are(
    tmp_path_factory: pytest.TempPathFactory, before: str, after: str
) -> None:
    file = tmp_path_factory.mktemp("utf8") / "broken.txt"
    before = before.removeprefix("\ufeff")
    file.write_bytes(before.encode() + b"\xff" + after.encode())
    offset = len(before.encode())
    with pytest.raises(DataError, match=rf"broken\.txt: byte 0xff at offset {offset} .*\"replace\".*\"skip\""):
        texts(open_corpus(str(file)), file.parent)
    assert texts(open_corpus(str(file), invalid_utf8="skip"), file.parent) == {"broken.txt": ""}
    replaced = texts(open_corpus(str(file), invalid_utf8="replace"), file.parent)
    assert replaced == {"broken.txt": f"{before}\ufffd{after}"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"rows\.jsonl:2: not JSON"),
        (b'["text"]', r"rows\.jsonl:2: a list, not an object"),
        (b'{"txt": "x", "id": 1}', r"rows\.jsonl:2: no field 'text'; this line has: txt, id; did you mean 'txt'\?"),
        (b'{"text": null}', r"rows\.jsonl:2: field 'text' is a NoneType, not a string"),
        (b'{"text": "\\ud800"}', r"rows\.jsonl:2: lone surrogate '\\ud800' at character 0"),
        (b'{"text": "\xe9"}', r"rows\.jsonl:2: byte 0xe9 at offset 10 is not UTF-8"),
    ],
)
def test_a_bad_line_of_json_is_named_by_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(DataError, match=message):
        list(open_corpus(str(tmp_path)).documents(tmp_path))


def test_another_field_of_json_lines_can_hold_the_text(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"body": "hello"}\n')
    assert texts(open_corpus(str(tmp_path), text_field="body"), tmp_path) == {"rows.jsonl:1": "hello"}


@dataclass(frozen=True, kw_only=True)
class FakeSource(Source):
    """Unpacks three files, or fails after the first."""

    needs: ClassVar[tuple[str, ...]] = ()

    calls: list[Path]
    fails: bool = False

    def unpack(self, folder: Path) -> None:
        self.calls.append(folder)
        for name in "abc":
            (folder / name).write_text(f"text of {name}")
            if self.fails:
                raise DataError("the network went away")


def fake_corpus(source: Source) -> FetchedCorpus:
    class Fake(FetchedCorpus):
        name = "fake"  # pyright: ignore[reportAssignmentType]
        title, licence, size_bytes, languages, obtained = "fake", "none", 0, (), "Made up."

        def read(self, root: Path):
            return (Document(name=file.name, text=file.read_text()) for file in sorted(root.iterdir()))

    Fake.source = source
    return Fake()


def test_a_corpus_is_fetched_once_and_its_packages_are_thrown_away(tmp_path: Path) -> None:
    calls: list[Path] = []
    corpus = fake_corpus(FakeSource(calls=calls))
    assert texts(corpus, tmp_path) == {name: f"text of {name}" for name in "abc"}
    first = corpus.fingerprint(tmp_path)
    assert texts(corpus, tmp_path / ".")
    assert corpus.fingerprint(tmp_path) == first
    assert len(calls) == 1
    assert not calls[0].exists()


def test_a_corpus_cut_short_or_changed_in_the_cache_is_not_taken_for_the_one_that_was_fetched(tmp_path: Path) -> None:
    corpus = fake_corpus(FakeSource(calls=[]))
    first = corpus.fingerprint(tmp_path)
    file = corpus.location(tmp_path)
    whole = file.read_bytes()
    for damaged in (b"".join(whole.splitlines(keepends=True)[:2]), whole.replace(b"text of b", b"text of x")):
        file.write_bytes(damaged)
        for look in (corpus.fingerprint, lambda cache: survey(corpus, cache)):
            with pytest.raises(
                DataError, match=rf"fake\.jsonl is not the text that was fetched \({len(damaged)} bytes"
            ):
                look(tmp_path)
    # the way out that the message names
    file.unlink()
    assert corpus.fingerprint(tmp_path) == first
    assert file.read_bytes() == whole


def test_a_fetch_that_fails_leaves_nothing_and_can_be_tried_again(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the network went away"):
        texts(fake_corpus(FakeSource(calls=[], fails=True)), tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert texts(fake_corpus(FakeSource(calls=[])), tmp_path)


def test_a_missing_tool_is_named_with_the_command_that_installs_it(tmp_path: Path) -> None:
    class NeedsMuch(FakeSource):
        needs = ("no-such-tool-here",)

    source = NeedsMuch(calls=[])
    with pytest.raises(DataError, match=r"cannot fetch corpus 'fake': needs no-such-tool-here on the PATH; .*install"):
        texts(fake_corpus(source), tmp_path)


def test_a_command_that_fails_says_which_and_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"`sh -c echo dear me >&2; exit 3` failed with exit code 3: dear me"):
        run_command(["sh", "-c", "echo dear me >&2; exit 3"], tmp_path)
    with pytest.raises(DataError, match=r"`no-such-tool-here` is not installed"):
        run_command(["no-such-tool-here"], tmp_path)


class FakeRun:
    """Notes commands; the first one puts a file where the real one would."""

    def __init__(self, archive: str) -> None:
        self.commands: list[str] = []
        self.archive = archive

    def __call__(self, argv: Sequence[str], folder: Path) -> None:
        self.commands.append(" ".join(argv))
        if len(self.commands) == 1:
            (folder / self.archive).write_bytes(b"")


def test_package_sources_call_the_clients_of_their_registries(tmp_path: Path) -> None:
    run = FakeRun("words_1.0.deb")
    DebianPackages(packages=("words",), run=run).unpack(tmp_path)
    assert run.commands == ["apt-get -qq download words", "dpkg -x words_1.0.deb ."]
    run = FakeRun("words-1.0.tgz")
    NpmPackage(name="@a/words", version="1.0", run=run).unpack(tmp_path)
    assert run.commands == ["npm pack --silent @a/words@1.0", "tar -xzf words-1.0.tgz"]
    run = FakeRun("nothing")
    DebianDescriptions(language="de", run=run).unpack(tmp_path)
    assert "Acquire::Languages=de" in run.commands[0]
    assert run.commands[0].endswith("update")


def put(root: Path, name: str, content: bytes) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(content)


def read(corpus: FetchedCorpus, root: Path) -> dict[str, str]:
    return {document.name: document.text for document in corpus.read(root)}


def r_strings(lines: list[str]) -> bytes:
    """A character vector as R serializes it."""
    head = b"X\n" + struct.pack(">iiii", 3, 0x40201, 0x30500, 5) + b"UTF-8"
    body = b"".join(struct.pack(">ii", 0x40009, len(line.encode())) + line.encode() for line in lines)
    return head + struct.pack(">ii", 16, len(lines)) + body


@settings(max_examples=30)
@given(novels=st.lists(st.lists(st.text(max_size=8), max_size=4), max_size=3))
def test_novels_are_read_out_of_an_r_package(tmp_path_factory: pytest.TempPathFactory, novels: list[list[str]]) -> None:
    root = tmp_path_factory.mktemp("r")
    novels = [[f"TITLE {i}", *(line.replace("\ufeff", "") for line in lines)] for i, lines in enumerate(novels)]
    chunks = [struct.pack(">I", len(r_strings(lines))) + zlib.compress(r_strings(lines)) for lines in novels]
    put(root, "janeaustenr/data/Rdata.rdb", b"".join(chunks))
    assert read(Austen(), root) == {f"title {i}": "\n".join(lines) + "\n" for i, lines in enumerate(novels)}


def test_an_r_package_with_another_layout_is_an_error(tmp_path: Path) -> None:
    stored = r_strings(["x"]).replace(struct.pack(">i", 16), struct.pack(">i", 19), 1)
    put(tmp_path, "janeaustenr/data/Rdata.rdb", struct.pack(">I", len(stored)) + zlib.compress(stored))
    with pytest.raises(DataError, match="no longer holds plain character vectors"):
        read(Austen(), tmp_path)


def test_dictionary_entries_lose_their_marks_and_shared_entries_come_once(tmp_path: Path) -> None:
    text = b"about\nEgg \\Egg\\, n.\n   Laid by a {hen}.\n   [1913 Webster +PJC]\n"
    put(tmp_path, "usr/share/dictd/gcide.dict.dz", gzip.compress(text))
    # 6 is G, 58 is 6 in base 64
    put(tmp_path, "usr/share/dictd/gcide.index", b"00-about\tA\tG\nEgg\tG\t6\neggs\tG\t6\n")
    assert read(Gcide(), tmp_path) == {"Egg@6": "Egg \\Egg\\, n.\n   Laid by a hen.\n"}


def test_wordnet_gives_words_and_gloss(tmp_path: Path) -> None:
    line = b"00002137 03 n 02 abstraction 0 abstract_entity 0 001 @ 00001740 n 0000 | a general concept  \n"
    for part in ("noun", "verb", "adj", "adv"):
        put(tmp_path, f"usr/share/wordnet/data.{part}", b"  1 licence\n" + (line if part == "noun" else b""))
    assert read(WordNet(), tmp_path) == {"noun-00002137": "abstraction, abstract entity: a general concept\n"}


def test_descriptions_repeated_by_an_update_come_once(tmp_path: Path) -> None:
    entry = b"Package: x\nDescription-md5: 0f\nDescription-en: A tool\n It works.\n .\n Always.\n\n"
    put(tmp_path, "lists/a_Translation-en", entry + entry.replace(b"0f", b"1f"))
    put(tmp_path, "lists/b_Translation-en", entry)
    assert read(DebianPackageDescriptions(), tmp_path) == dict.fromkeys(("0f", "1f"), "A tool\nIt works.\n\nAlways.\n")


def test_a_bible_book_becomes_plain_paragraphs(tmp_path: Path) -> None:
    book = (
        '<div osisID="Gen" sID="g" type="book"/> <title>Genesis</title> <chapter n="1"/>In the <w lemma="x">beginning'
        "</w><note>a <b>note</b></note>God &amp; all.  <div eID='p'/>And <transChange>then</transChange>"
    )
    packed = zlib.compress(book.encode())
    folder = "usr/share/sword/modules/texts/ztext/engKJV2006eb"
    for testament in ("ot", "nt"):
        put(tmp_path, f"{folder}/{testament}.bzz", packed if testament == "ot" else b"")
        put(tmp_path, f"{folder}/{testament}.bzs", struct.pack("<III", 0, len(packed), 0) if testament == "ot" else b"")
    assert read(KingJames(), tmp_path) == {"Gen": "Genesis\n\nIn the beginning God & all.\n\nAnd then\n"}


def test_pages_are_chosen_and_unpacked(tmp_path: Path) -> None:
    docs = "usr/share/doc/linux-doc-6.1/Documentation"
    put(tmp_path, f"{docs}/mm/big.rst.gz", gzip.compress(b"big"))
    put(tmp_path, f"{docs}/mm/small.rst", b"small")
    put(tmp_path, f"{docs}/translations/it/mm/small.rst", b"piccolo")
    assert read(LinuxDoc(), tmp_path) == {"mm/big.rst.gz": "big", "mm/small.rst": "small"}
    put(tmp_path, "package/data/chapter_1.txt", b"Call me Ishmael.")
    put(tmp_path, "package/data/data.txt", b"Call me Ishmael.")
    assert read(MobyDick(), tmp_path) == {"chapter_1.txt": "Call me Ishmael."}
