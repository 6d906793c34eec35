"""A corpus is read whatever it is made of, in a fixed order, or refused by the file and the place in it."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergelab.errors import CheckpointError, CorpusError, DependencyError
from mergelab.text import text_file_pieces
from mergelab.text.corpus import Document, TextOptions, documents
from mergelab.text.corpus_files import corpus_files

TEXT = "Zwölf Boxkämpfer\r\njagen Viktor\nquer über den Sylter Deich. 😀\n" * 3
READ = TEXT.replace("\r\n", "\n")
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


def texts(place: Any, **options: Any) -> list[str]:
    return ["".join(document.pieces) for document in documents(place, TextOptions(**options))]


def lines(*records: Any) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be-mark", "utf-32", "small pieces"]
)
def test_text_is_decoded_by_its_mark(tmp_path: Path, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if encoding == "small pieces":  # characters and line ends that lie across the pieces that are read
        monkeypatch.setattr(text_file_pieces, "_PIECE", 3)
        encoding = "utf-16"
    raw = b"\xfe\xff" + TEXT.encode("utf-16-be") if encoding.endswith("mark") else TEXT.encode(encoding)
    (tmp_path / "a.txt").write_bytes(raw)
    assert texts(tmp_path / "a.txt") == [READ]


@pytest.mark.parametrize(
    ("pack", "name"),
    [
        (gzip.compress, "a.txt.gz"),
        (bz2.compress, "a.bz2"),
        (lzma.compress, "a.txt.xz"),
        (gzip.compress, "a.txt"),  # told by its content, whatever its name
        (lambda raw: gzip.compress(raw[:50], mtime=0) + gzip.compress(raw[50:], mtime=0), "a.gz"),
    ],
)
def test_packed_text_is_unpacked(tmp_path: Path, pack: Callable[[bytes], bytes], name: str) -> None:
    (tmp_path / name).write_bytes(pack(TEXT.encode()))
    assert texts(tmp_path / name) == [READ]


def _zip(raw: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", raw)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "raw", "words"),
    [
        ("a.txt", b"abc\xff\xfedef", r"a\.txt cannot be read as UTF-8 text \(byte 3\)"),
        ("a.txt", "abc".encode("utf-16-le"), r"zero byte \(byte 1\)"),
        ("a.txt", b"\xff\xfe" + "abc".encode("utf-16-le") + b"\0\xd8", r"UTF-16-LE text \(byte 8\)"),
        ("a.txt", "é".encode() * 700_000 + b"\xc3", r"\(byte 1,400,000\)"),
        ("a.txt", _zip(b"text"), "is a zip archive, not a text; unpack it"),
        ("a.gz", gzip.compress(TEXT.encode(), mtime=0)[:-12], r"a\.gz cannot be read"),
        ("a.txt.gz", gzip.compress(b"\xff\0\xff", mtime=0), r"a\.txt\.gz cannot be read as UTF-8"),
        ("a.parquet", b"text", "is not the parquet file that its name says"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', r"a\.jsonl: line 2 is not valid JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1 is nested too deeply"),
        ("a.jsonl", lines({"txt": "a", "id": 1}), r"record 1 has no field 'text' .*it has: txt, id"),
        ("a.jsonl", lines({"text": 3}), "record 1 holds 3 where a text"),
        ("a.jsonl", lines({"messages": [{"a": 1}]}), "where a text or a list of messages"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, raw: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises((CorpusError, CheckpointError), match=words):
        texts(tmp_path / name)


def test_records_are_documents(tmp_path: Path) -> None:
    records = [{"text": "a\n\u2028b", "id": 1}, {"text": ""}, {"text": None}, {"text": "c", "other": "d"}]
    (tmp_path / "a.jsonl").write_bytes(lines(*records) + b"\n")
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines("e", {"text": "f", "other": "g"}), mtime=0))
    (tmp_path / "c.JSONL").write_bytes(lines({"text": "h"})[:-1])
    assert texts(tmp_path / "a.jsonl") == texts(tmp_path / "a.json") == ["a\n\u2028b", "c"]
    assert texts(tmp_path / "b.jsonl.gz") == ["e", "f"]
    assert texts(tmp_path / "c.JSONL") == ["h"]
    with pytest.raises(CorpusError, match=r"no field 'othr' \(did you mean 'other'\?\)"):
        texts(tmp_path / "b.jsonl.gz", field="othr")
    # The same content under a name that does not say JSON is text, keys and all.
    (tmp_path / "a.txt").write_bytes(lines({"text": "h"}))
    assert texts(tmp_path / "a.txt") == ['{"text": "h"}\n']


def test_conversations_are_records_with_turns(tmp_path: Path) -> None:
    shared = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    raw = lines({"messages": CHAT}, {"conversations": shared}, {"text": "t", "messages": CHAT})
    (tmp_path / "a.jsonl").write_bytes(raw)
    assert [found.messages for found in documents(tmp_path / "a.jsonl")] == [CHAT, CHAT, None]
    found = documents(tmp_path / "a.jsonl", TextOptions(roles="assistant"))
    assert [one.messages for one in found] == [CHAT] * 3
    (tmp_path / "b.jsonl").write_bytes(lines({"text": "t"}))
    with pytest.raises(CorpusError, match="has no assistant turns"):
        texts(tmp_path / "b.jsonl", roles="assistant")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.txt", "a.txt", "sub/c.txt", ".hidden/d.txt", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def test_globs_and_folders_have_one_order(folder: Path) -> None:
    assert texts(folder) == ["a.txt", "b.txt", "sub/c.txt"]
    assert texts(f"{folder}/*.txt") == ["a.txt", "b.txt"]
    assert texts(f"{folder}/**/*.txt") == ["a.txt", "b.txt", "sub/c.txt"]
    assert texts([folder / "notes.md", folder / "a.txt"]) == ["notes.md", "a.txt"]
    (folder / "sub" / "e.jsonl").write_bytes(lines("records"))
    assert texts(folder) == ["records"]  # the files beside the data of a data set tell about it
    for place, words in {
        f"{folder}/*.rst": "no file matches",
        str(folder / "none.txt"): "does not exist",
        str(folder / "only"): r"no \.txt, \.jsonl, .*name others by a glob",
    }.items():
        (folder / "only").mkdir(exist_ok=True)
        (folder / "only" / "x.md").write_text("x")
        with pytest.raises(CorpusError, match=words):
            texts(place)


def test_parts_are_disjoint_and_together_all(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(*"abcdefg"))
    (tmp_path / "b.jsonl").write_bytes(lines(*"hijk"))
    parts = [texts(tmp_path, part=(number, 3)) for number in range(3)]
    assert parts[0] == ["a", "d", "g", "j"]
    assert sorted(text for part in parts for text in part) == list("abcdefghijk")
    with pytest.raises(CorpusError, match="part 3 of 3 does not exist"):
        TextOptions(part=(3, 3))


def test_a_missing_package_is_named_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package, name, raw in (
        ("pyarrow.parquet", "a.bin", b"PAR1" + bytes(20)),
        ("pyarrow.ipc", "a.txt", b"ARROW1" + bytes(20)),
        ("zstandard", "a.txt", b"\x28\xb5\x2f\xfd" + bytes(20)),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.setitem(sys.modules, package.partition(".")[0], None)
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(DependencyError, match=rf"{name}.*`pip install {package.partition('.')[0]}`"):
            texts(tmp_path / name)


def test_a_saved_data_set_is_read_in_its_own_order(tmp_path: Path) -> None:
    state = {"_data_files": [{"filename": "data-1.arrow"}, {"filename": "data-0.arrow"}]}
    (tmp_path / "train").mkdir()
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    (tmp_path / "train" / "state.json").write_text(json.dumps(state))
    assert [Path(file.name).name for file in corpus_files(tmp_path)] == ["data-1.arrow", "data-0.arrow"]
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["a", "b"]}')
    with pytest.raises(CorpusError, match=r"holds the splits a, b; name one, as in .*/a"):
        corpus_files(tmp_path)
    for bad, words in (
        ({**state, "_indices_files": [{"filename": "i.arrow"}]}, "flatten_indices"),
        ({"_data_files": [{"filename": "../x.arrow"}]}, "does not list"),
    ):
        (tmp_path / "train" / "state.json").write_text(json.dumps(bad))
        with pytest.raises(CorpusError, match=words):
            corpus_files(tmp_path / "train")


@pytest.mark.extra
def test_columns_are_read_as_their_own_library_wrote_them(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet
    import zstandard

    table = pyarrow.table({"id": [1, 2, 3], "text": ["a", None, "c"], "messages": [CHAT, CHAT[:1], None]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    with pyarrow.ipc.new_stream(tmp_path / "b.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=2)
    with pyarrow.ipc.new_file(tmp_path / "c.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=2)
    (tmp_path / "d").write_bytes((tmp_path / "a.parquet").read_bytes())  # told by its content
    for name in ("a.parquet", "b.arrow", "c.arrow", "d"):
        assert texts(tmp_path / name) == ["a", "c"], name
        found: list[Document] = list(documents(tmp_path / name, TextOptions(field="messages")))
        assert [one.messages for one in found] == [CHAT, CHAT[:1]]
        with pytest.raises(CorpusError, match=rf"{name} has no field 'txt' \(did you mean 'text'\?\)"):
            texts(tmp_path / name, field="txt")
        raw = (tmp_path / name).read_bytes()
        (tmp_path / f"cut-{name}").write_bytes(raw[: len(raw) // 2])
        with pytest.raises(CorpusError, match=f"cut-{name} cannot be read"):
            texts(tmp_path / f"cut-{name}")
    packed = zstandard.compress(lines("a", "b")) + zstandard.compress(lines("c"))
    (tmp_path / "e.jsonl.zst").write_bytes(packed)
    assert texts(tmp_path / "e.jsonl.zst") == ["a", "b", "c"]
    (tmp_path / "f.jsonl.zst").write_bytes(packed[:-5])
    with pytest.raises(CorpusError, match=r"f\.jsonl\.zst cannot be read \(it ends within a frame\)"):
        texts(tmp_path / "f.jsonl.zst")
