"""The documents of a corpus, one after the other: texts and conversations, from files of the usual kinds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from mergelab.checkpoints.json_data import parse_json
from mergelab.errors import CheckpointError, CorpusError, MergelabError, did_you_mean, quoted
from mergelab.text.corpus_files import CorpusFile, corpus_files
from mergelab.text.text_file_pieces import data_package, file_head, text_lines, text_pieces

__all__ = [
    "START",
    "CorpusPosition",
    "Document",
    "TextOptions",
    "corpus_places",
    "documents",
    "documents_of_texts",
    "sections",
]

_TEXT, _CHATS = "text", ("messages", "conversations")
_LONGEST_ARRAY = 1 << 30
_SECTION = 1 << 17
"""Characters of a section, at most; that many are tokenized whole."""
_BATCH_ROWS = 256
_SHAREGPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}


@dataclass(frozen=True)
class TextOptions:
    """How texts become contexts of tokens.

    Attributes:
        field: field of a record that is read; by default `text`, or else `messages` or `conversations`.
        bos: whether a token that begins texts stands before each document and each context; `auto` does as
            the tokenizer does with a single text.
        packing: `packed` joins documents and cuts the stream; `documents` gives each document contexts of its
            own, of which the last is padded.
        roles: tokens of conversations that count: `all`, or those of the `assistant` turns, the token that
            ends each included.
        tokens: number of counted tokens after which no more text is read; None reads all.
        part: number and count: documents `number`, `number + count`, ... are read; for work that is shared.
    """

    field: str | None = None
    bos: bool | Literal["auto"] = "auto"
    packing: Literal["packed", "documents"] = "packed"
    roles: Literal["all", "assistant"] = "all"
    tokens: int | None = None
    part: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        number, count = self.part
        if not 0 <= number < count:
            raise CorpusError(f"part {number} of {count} does not exist; parts are counted from 0.")


@dataclass(frozen=True)
class CorpusPosition:
    """A place in a corpus from which its documents can be read on: whole numbers, that is plain JSON.

    Attributes:
        file: files that are done.
        record: records of the next file that are done.
        index: documents that are done, of all parts.
        units: documents or sections that were given.
        characters: characters that are done of the next document, where it is a long text.
        tokens: tokens behind them that are done too.
    """

    file: int = 0
    record: int = 0
    index: int = 0
    units: int = 0
    characters: int = 0
    tokens: int = 0


START = CorpusPosition()


@dataclass(frozen=True)
class Document:
    """A text, or a conversation.

    Attributes:
        place: where it stands, for messages: a file, and the number of the record in it.
        pieces: the text, to be read once; a large file comes in several pieces.
        messages: turns of a conversation, oldest first; None for a text.
        path: the file on this machine; None for a text from memory.
        before: position at which it, or the rest of it, begins.
        after: position behind it.
        begun: whether `pieces` are the rest of a text of which the characters of `before` are done.
    """

    place: str
    pieces: Iterable[str] = ()
    messages: Sequence[Mapping[str, Any]] | None = None
    path: Path | None = None
    before: CorpusPosition = START
    after: CorpusPosition = START
    begun: bool = False


def documents(
    places: str | Path | Sequence[str | Path] | Sequence[CorpusFile],
    options: TextOptions | None = None,
    start: CorpusPosition | None = None,
) -> Iterator[Document]:
    """The documents that places hold, in a fixed order; only the one under way is in memory.

    A plain text is one document. Of JSON lines, parquet and arrow files (told by how they begin; JSON lines
    by their name) each record is one.

    Args:
        places: what `mergelab.text.corpus_files.corpus_files` takes, or gives.
        options: field and part that are read.
        start: position of an earlier reading of the same places, from which it goes on: files before it are
            not opened, records before it not taken apart.

    Raises:
        CorpusError: a file cannot be read, or a record lacks the field.
        DependencyError: a package that reads such files is missing.
    """
    options, at = options or TextOptions(), start or START
    number, count = options.part
    for n, file in enumerate(corpus_places(places)):
        if n < at.file:
            continue
        for record, document in _of_file(file.local(), options, at.record):
            if at.index % count != number:
                at = CorpusPosition(n, record, at.index + 1, at.units)
                continue
            after = CorpusPosition(n, record, at.index + 1, at.units + 1)
            pieces = document.pieces
            if at.characters:
                pieces = _without_first(pieces, at.characters)
            yield replace(document, pieces=pieces, before=at, after=after, begun=at.characters > 0)
            at = after
        at = CorpusPosition(n + 1, 0, at.index, at.units)


def _without_first(pieces: Iterable[str], characters: int) -> Iterator[str]:
    """A text without its first characters."""
    for piece in pieces:
        if len(piece) > characters:
            yield piece[characters:]
        characters = max(characters - len(piece), 0)


def sections(read: Iterable[Document]) -> Iterator[Document]:
    """The documents, of which long ones are cut into sections: documents of at most 131,072 characters.

    They end with a line. Where documents are dealt out, one long text is dealt out too.

    Args:
        read: what `documents` gives, from its beginning or from the position of a section.
    """
    units = None
    for document in read:
        units = document.before.units if units is None else units
        before, text = replace(document.before, units=units), ""
        for piece in document.pieces:
            text += piece
            begin = 0
            while len(text) - begin > _SECTION:
                end = _line_end(text, begin)
                units += 1
                after = replace(before, units=units, characters=before.characters + end - begin)
                section = [text[begin:end]]
                yield replace(document, pieces=section, before=before, after=after, begun=False)
                before, begin = after, end
            text = text[begin:]
        units += 1
        after = replace(document.after, units=units)
        yield replace(document, pieces=[text], before=before, after=after, begun=False)


def _line_end(text: str, begin: int) -> int:
    """Where a section ends: behind a line, else a word, in its second half."""
    for sign in ("\n", " "):
        if (found := text.rfind(sign, begin + _SECTION // 2, begin + _SECTION)) >= 0:
            return found + 1
    return begin + _SECTION


def corpus_places(places: Any) -> list[CorpusFile]:
    """The files of places that `documents` takes."""
    given = [places] if isinstance(places, str | Path) else list(places)
    found: list[CorpusFile] = []
    for place in given:
        found += [place] if isinstance(place, CorpusFile) else corpus_files(place)
    return found


def documents_of_texts(texts: str | Sequence[str]) -> Iterator[Document]:
    """Texts in memory as documents."""
    for number, text in enumerate([texts] if isinstance(texts, str) else texts, 1):
        yield Document(f"text {number}", [text])


def _of_file(path: Path, options: TextOptions, skip: int) -> Iterator[tuple[int, Document]]:
    """The documents of a file behind its first records, each with the number of its record, from 1 on."""
    head = file_head(path)
    ending = next((e for e in _RECORD_READERS if _plain_name(path).endswith(e)), "")
    if head[:4] == b"PAR1":
        read = _parquet
    elif head[:6] == b"ARROW1" or head[:4] == b"\xff\xff\xff\xff":
        read = _arrow
    elif ending in (".parquet", ".arrow"):
        raise CorpusError(f"{path} is not the {ending[1:]} file that its name says; download it again")
    elif ending == ".json" and head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
        read = _json_array
    elif ending:
        read = _json_lines
    else:
        if not skip:
            yield 1, Document(str(path), text_pieces(path), path=path)
        return
    for number, record in enumerate(read(path, options, skip), skip + 1):
        place = f"{path}: record {number}"
        if (found := _document(record, options, place, path)) is not None:
            yield number, found


_RECORD_READERS = (".parquet", ".arrow", ".jsonl", ".ndjson", ".json")


def _plain_name(path: Path) -> str:
    name = path.name.lower()
    return next((name.removesuffix(e) for e in (".gz", ".bz2", ".xz", ".zst") if name.endswith(e)), name)


def _document(record: Any, options: TextOptions, place: str, path: Path) -> Document | None:
    """The document of a record; None for a field that holds nothing."""
    value = record
    if isinstance(record, Mapping):
        value = record[_field(list(record), options, place)]
    if value is None or value == "" or value == []:
        return None
    if isinstance(value, str):
        if options.roles != "all":
            raise CorpusError(
                f"{place} is a text, not a conversation, so it has no assistant turns; name the field with "
                "the messages (field), or count all tokens (roles: all)"
            )
        return Document(place, [value], path=path)
    messages = _messages(value)
    if messages is None:
        raise CorpusError(
            f"{place} holds {quoted(value)} where a text or a list of messages {{role, content}} was "
            "expected; name another field (field)"
        )
    return Document(place, messages=messages, path=path)


def _field(names: Sequence[str], options: TextOptions, place: str) -> str:
    """The field of a record that is read."""
    if options.field is not None:
        if options.field in names:
            return options.field
        raise CorpusError(
            f"{place} has no field {options.field!r}{did_you_mean(options.field, names)}; it has "
            f"{_some(names)}"
        )
    wanted = (*_CHATS, _TEXT) if options.roles != "all" else (_TEXT, *_CHATS)
    for name in wanted:
        if name in names:
            return name
    raise CorpusError(f"{place} has no field 'text' or 'messages' (it has: {_some(names)}); name one (field)")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") or "none"


def _messages(value: Any) -> list[dict[str, Any]] | None:
    """Turns as chat templates read them, also from the keys of ShareGPT; None for what is no conversation."""
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        return None
    found = []
    for turn in value:
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or content is None:
            return None
        others = {k: v for k, v in turn.items() if k not in ("from", "value") and v is not None}
        found.append({**others, "role": _SHAREGPT.get(role, role), "content": content})
    return found


def _json_lines(path: Path, options: TextOptions, skip: int) -> Iterator[Any]:
    filled = (
        (number, line) for number, line in enumerate(text_lines(path), 1) if not line.isspace() and line
    )
    for number, line in islice(filled, skip, None):
        yield _parsed(line, f"{path}: line {number:,}")


def _json_array(path: Path, options: TextOptions, skip: int) -> Iterator[Any]:
    pieces, length = [], 0
    for piece in text_pieces(path):
        pieces.append(piece)
        length += len(piece)
        if length > _LONGEST_ARRAY:
            raise CorpusError(f"{path} is a list of more than {_LONGEST_ARRAY:,} characters; give JSON lines")
    yield from _parsed("".join(pieces), str(path))[skip:]


def _parsed(text: str, place: str) -> Any:
    try:
        return parse_json(text.encode(), place)
    except CheckpointError as error:
        raise CorpusError(str(error)) from None


def _parquet(path: Path, options: TextOptions, skip: int) -> Iterator[Any]:
    package = data_package("pyarrow.parquet", f"{path}, a parquet file,")
    with _arrow_errors(path), package.ParquetFile(str(path), pre_buffer=False) as file:
        name = _field(list(file.schema_arrow.names), options, str(path))
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if skip >= rows:
                skip -= rows
                continue
            for batch in file.iter_batches(
                batch_size=_BATCH_ROWS, row_groups=[group], columns=[name], use_threads=False
            ):
                yield from batch.column(0).slice(skip).to_pylist()
                skip = max(skip - batch.num_rows, 0)


def _arrow(path: Path, options: TextOptions, skip: int) -> Iterator[Any]:
    package = data_package("pyarrow", f"{path}, an arrow file,")
    package = data_package("pyarrow.ipc", f"{path}, an arrow file,")
    stream = file_head(path)[:6] != b"ARROW1"
    with _arrow_errors(path), open(path, "rb") as raw:
        opened = package.open_stream(raw) if stream else package.open_file(raw)
        name = _field(list(opened.schema.names), options, str(path))
        index = opened.schema.get_field_index(name)
        batches = opened if stream else map(opened.get_batch, range(opened.num_record_batches))
        for batch in batches:
            for start in range(min(skip, batch.num_rows), batch.num_rows, _BATCH_ROWS):
                yield from batch.column(index).slice(start, _BATCH_ROWS).to_pylist()
            skip = max(skip - batch.num_rows, 0)


@contextlib.contextmanager
def _arrow_errors(path: Path) -> Iterator[None]:
    """Turns what pyarrow refuses into one sentence."""
    package = data_package("pyarrow", f"{path}, a file of columns,")
    try:
        yield
    except MergelabError:
        raise
    except (package.ArrowException, OSError) as error:
        said = str(error).partition("\n")[0][:200]
        raise CorpusError(f"{path} cannot be read ({said}); download it again") from None
