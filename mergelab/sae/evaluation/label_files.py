"""Texts with labels of one's own: one label for each text, or labels of its tokens, words or spans."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergelab.checkpoints.json_data import parse_json
from mergelab.errors import CheckpointError, CorpusError, SAEError, did_you_mean, quoted, shortened
from mergelab.text.text_file_pieces import data_package, text_lines, text_pieces

__all__ = ["LabeledText", "labeled_texts", "read_labeled_texts"]

_TABLES = {".csv": ",", ".tsv": "\t"}
_KINDS = "JSON lines, JSON, CSV, TSV or parquet"
_NOT_A_CLASS = -100  # the usual number of tokens that a loss is to pass over
_MOST_CELL = 1 << 24

Span = tuple[int, int, str]


@dataclass(frozen=True)
class LabeledText:
    """A text with its labels, in one of three forms.

    Attributes:
        text: the text.
        place: where it stands, for messages.
        label: class of the whole text; None where its parts have labels.
        tokens: class of each token of the model, None for those that have none; None in the other forms.
        spans: `(start, end, class)` in characters; the rest of the text is of no class. None in the other
            forms.
    """

    text: str
    place: str
    label: str | None = None
    tokens: tuple[str | None, ...] | None = None
    spans: tuple[Span, ...] | None = None


def read_labeled_texts(
    path: str | Path, *, field: str | None = None, label_field: str | None = None
) -> list[LabeledText]:
    """The labeled texts of a file.

    A record has the field `text`, and `label`, the class of the text (a string, a whole number, true or
    false), or `labels`: a list with one class for each token of the model, or spans `[start, end, class]` or
    `{"start", "end", "label"}` in characters; with a list of words in the field `tokens`, one class for each
    word. null and -100 stand for no class.

    Args:
        path: a file of JSON lines, a JSON list, CSV or TSV with a header, or parquet; packed or not.
        field: field with the text; `text` if None.
        label_field: field with the label or labels; `label` or `labels` if None.

    Raises:
        SAEError: the file is of another kind or cannot be read, or records lack a field or hold something
            else; the first faults are named.
    """
    path = Path(path)
    found, faults = [], []
    for number, record in enumerate(_records(path), 1):
        place = f"{shortened(str(path), 200)}: record {number}"
        try:
            found.append(_labeled(record, place, field, label_field))
        except SAEError as error:
            faults.append(str(error))
    if faults:
        raise SAEError(faults)
    return _of_one_form(found, str(path))


def labeled_texts(texts: str | Sequence[str], labels: Any) -> list[LabeledText]:
    """Texts in memory, one or several, with a label, or a list of labels, for each.

    Raises:
        SAEError: there are more or fewer labels than texts, or a label is not one.
    """
    if isinstance(texts, str):
        texts, labels = [texts], [labels]
    if len(texts) != len(labels):
        raise SAEError(
            f"{len(texts)} texts have {len(labels)} labels; give one label, or one list, for each text."
        )
    found, faults = [], []
    for number, (text, label) in enumerate(zip(texts, labels, strict=True), 1):
        several = isinstance(label, list | tuple)
        try:
            record = {"text": text, "labels" if several else "label": label}
            found.append(_labeled(record, f"text {number}", None, None))
        except SAEError as error:
            faults.append(str(error))
    if faults:
        raise SAEError(faults)
    return _of_one_form(found, "the labels")


def _of_one_form(found: list[LabeledText], place: str) -> list[LabeledText]:
    if not found:
        raise SAEError(f"{place}: holds no text with a label.")
    for one in found:
        if (one.label is None) != (found[0].label is None):
            raise SAEError(
                f"{one.place} is labeled {_form(one)}, but {found[0].place} {_form(found[0])}; give one form."
            )
    return found


def _form(one: LabeledText) -> str:
    return "in its parts" if one.label is None else "as a whole"


def _records(path: Path) -> Iterator[Any]:
    """The records of a file, whatever they hold."""
    name = path.name.lower()
    name = next((name.removesuffix(e) for e in (".gz", ".bz2", ".xz", ".zst") if name.endswith(e)), name)
    ending = Path(name).suffix
    if ending in (".jsonl", ".ndjson"):
        for number, line in enumerate(text_lines(path), 1):
            if line.strip():
                yield _parsed(line, f"{path}: line {number:,}")
    elif ending == ".json":
        records = _parsed("".join(text_pieces(path)), str(path))
        if not isinstance(records, list):
            raise SAEError(f"{path}: holds {quoted(records)}; expected a list of records.")
        yield from records
    elif ending in _TABLES:
        csv.field_size_limit(_MOST_CELL)
        lines = "".join(text_pieces(path)).splitlines(keepends=True)
        try:
            yield from csv.DictReader(lines, delimiter=_TABLES[ending], strict=True)
        except csv.Error as error:
            raise SAEError(f"{path}: cannot be read as a table ({error}).") from None
    elif ending == ".parquet":
        package = data_package("pyarrow.parquet", f"{path}, a parquet file,")
        try:
            yield from package.read_table(str(path)).to_pylist()
        except (OSError, ValueError) as error:  # pyarrow's errors are both
            said = str(error).partition("\n")[0][:200]
            raise SAEError(f"{path} cannot be read ({said}).") from None
    else:
        raise SAEError(f"{path}: labels are read from {_KINDS}; give such a file.")


def _parsed(text: str, place: str) -> Any:
    try:
        return parse_json(text.encode(), place)
    except CheckpointError as error:
        raise CorpusError(str(error)) from None


def _labeled(record: Any, place: str, field: str | None, label_field: str | None) -> LabeledText:
    if not isinstance(record, Mapping):
        raise SAEError(f"{place} is {quoted(record)}; expected fields such as text and label.")
    names = [str(name) for name in record]
    words = record.get("tokens") if isinstance(record.get("tokens"), list) else None
    name = field or "text"
    if name not in record and (words is None or field is not None):
        raise SAEError(_missing(place, name, names, "field"))
    labels = label_field or next((one for one in ("label", "labels") if one in record), None)
    if labels is None or labels not in record:
        raise SAEError(_missing(place, labels or "label", names, "label_field"))
    given, text = record[labels], record.get(name)
    if words is not None and text is None:
        if not all(isinstance(word, str) for word in words):
            raise SAEError(f"{place}: tokens holds {quoted(words)}; expected a list of words.")
        text = " ".join(words)
    if not isinstance(text, str) or not text:
        raise SAEError(f"{place}: {name} is {quoted(text)}; expected a text that is not empty.")
    if not isinstance(given, list | tuple):
        return LabeledText(text, place, label=_class(given, place, labels))
    if not given or any(isinstance(one, list | tuple | Mapping) for one in given):
        return LabeledText(text, place, spans=tuple(_span(one, len(text), place, labels) for one in given))
    if words is None:
        return LabeledText(text, place, tokens=tuple(_class_or_none(one, place, labels) for one in given))
    if len(words) != len(given):
        raise SAEError(f"{place} has {len(given)} {labels}, but {len(words)} words in tokens; give as many.")
    return LabeledText(text, place, spans=tuple(_spans_of_words(text, words, given, place, labels)))


def _missing(place: str, name: str, names: Sequence[str], option: str) -> str:
    there = ", ".join(names[:8]) or "none"
    flag = option.replace("_", "-")
    return f"{place} has no field {name!r}{did_you_mean(name, names)}; it has {there}; name one (--{flag})."


def _spans_of_words(
    text: str, words: Iterable[str], given: Iterable[Any], place: str, labels: str
) -> Iterator[Span]:
    at = 0
    for word, label in zip(words, given, strict=True):
        start = text.find(word, at)
        if start < 0:
            raise SAEError(f"{place}: the word {quoted(word)} of tokens is not in its text, in this order.")
        at = start + len(word)
        found = _class_or_none(label, place, labels)
        # A span without a class says that its tokens are not to be judged.
        yield start, at, "" if found is None else found


def _span(given: Any, length: int, place: str, labels: str) -> Span:
    parts: Any = given
    if isinstance(given, Mapping):
        parts = [given.get("start"), given.get("end"), given.get("label")]
    whole = isinstance(parts, list | tuple) and len(parts) == 3
    if not whole or not all(isinstance(n, int) and not isinstance(n, bool) for n in parts[:2]):
        raise SAEError(f"{place}: {labels} holds {quoted(given)}; expected spans [start, end, class].")
    start, end, label = int(parts[0]), int(parts[1]), parts[2]
    if not 0 <= start < end <= length:
        raise SAEError(f"{place}: the span {quoted(given)} is not within its text of {length} characters.")
    return start, end, _class(label, place, labels)


def _class_or_none(value: Any, place: str, labels: str) -> str | None:
    no_class = value is None or (not isinstance(value, bool) and value == _NOT_A_CLASS)
    return None if no_class else _class(value, place, labels)


def _class(value: Any, place: str, labels: str) -> str:
    """The name of a class."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int | str) and str(value).strip():
        return str(value).strip()
    raise SAEError(
        f"{place}: {labels} is {quoted(value)}; expected the name of a class: a string, a whole number, true "
        "or false."
    )
