"""The text of the quickstart: the documentation and source that every Python carries, and names."""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import sys
import sysconfig
import tokenize
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

from mergelab.errors import MergelabError

__all__ = [
    "DOMAINS",
    "Corpus",
    "TextDocument",
    "docstrings",
    "gather",
    "is_held_out",
    "sources_folder",
    "stripped_code",
]


def docstrings(source: str) -> str:
    """The cleaned docstrings of a module, its classes and functions, in source order, a blank line between.

    Raises:
        SyntaxError: `source` is not Python of the running version.
    """
    return "\n\n".join(inspect.cleandoc(str(node.value)) for node in _docstring_nodes(source))


def stripped_code(source: str) -> str:
    """`source` without docstrings, comments and blank lines; what remains keeps its layout.

    Raises:
        SyntaxError: `source` is not Python of the running version.
    """
    lines = source.split("\n")  # not splitlines(), which also splits at form feeds
    for token in tokenize.generate_tokens(io.StringIO(source + "\n").readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in _docstring_nodes(source):
        first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
        # The columns of a syntax tree count UTF-8 bytes.
        before = lines[first].encode()[: node.col_offset]
        after = lines[last].encode()[node.end_col_offset :]
        lines[first : last + 1] = [(before + after).decode(), *[""] * (last - first)]
    kept = [line.rstrip() for line in lines if line.strip()]
    return "\n".join(kept) + "\n" if kept else ""


def _docstring_nodes(source: str) -> list[ast.Constant]:
    found: list[ast.Constant] = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        match node.body[:1]:
            case [ast.Expr(value=ast.Constant(value=str()) as constant)]:
                found.append(constant)
    return sorted(found, key=lambda constant: constant.lineno)


DOMAINS = ("code", "prose", "names")

# Folders below the standard library that are other people's packages, generated tables or test data.
_SKIPPED = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data"}
    | {"__pycache__", "ensurepip", "lib-dynload", "__phello__"}
)
_HELD_OUT_IN = 8  # one source in so many, chosen by a hash of its name
_PAGE = 256  # code points to a page of character names
_LARGEST = 4  # no source makes up more than a quarter of a side: a score is not that of one file


@dataclass(frozen=True)
class TextDocument:
    """One piece of text that is never divided between training and held-out.

    Attributes:
        source: the file, topic or page it comes from; documents of one source share a side of the split.
        text: the text, not empty.
    """

    source: str
    text: str

    @property
    def num_bytes(self) -> int:
        """Bytes of the text in UTF-8."""
        return len(self.text.encode())


@dataclass(frozen=True)
class Corpus:
    """Training and held-out documents by domain."""

    train: Mapping[str, tuple[TextDocument, ...]]
    held_out: Mapping[str, tuple[TextDocument, ...]]

    @property
    def digest(self) -> str:
        """SHA-256 of all the text and of how it is split."""
        sha = hashlib.sha256()
        for side in (self.train, self.held_out):
            for domain, documents in side.items():
                for document in documents:
                    sha.update("\0".join((domain, document.source, document.text, "")).encode())
        return sha.hexdigest()


@dataclass(frozen=True)
class _Source:
    """Text of one domain that is read only when it is wanted."""

    name: str
    domain: str
    read: Callable[[], str]


class _Side:
    """One side of the split while it fills up."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.documents: dict[str, list[TextDocument]] = {domain: [] for domain in DOMAINS}
        self.size: dict[str, int] = dict.fromkeys(DOMAINS, 0)

    def take(self, source: _Source) -> None:
        """Adds the source's text if its domain is not full."""
        if self.size[source.domain] >= self.limit:
            return
        document = TextDocument(source.name, source.read())
        if document.text.strip() and document.num_bytes * _LARGEST <= self.limit:
            self.documents[source.domain].append(document)
            self.size[source.domain] += document.num_bytes


def gather(train_bytes: int, held_out_bytes: int, stdlib: Path | None = None) -> Corpus:
    """Collects the corpus; the same on every run of one Python version.

    Args:
        train_bytes: stop after this many UTF-8 bytes of training text per domain (whole documents).
        held_out_bytes: the same for held-out text.
        stdlib: the folder of standard-library sources (default: the running Python's).

    Raises:
        MergelabError: the standard library's sources are missing, or too few to hold any out.
    """
    folder = stdlib or sources_folder()
    train, held_out = _Side(train_bytes), _Side(held_out_bytes)
    sources = [*_files(folder), *_topics(), *_pages()]
    for source in sorted(sources, key=lambda s: (_hash("order:" + s.name), s.name)):
        (held_out if is_held_out(source.name) else train).take(source)
    if empty := [d for d in DOMAINS if not train.documents[d] or not held_out.documents[d]]:
        raise MergelabError(
            f"The standard library at {folder} has too little {empty[0]} to train on and to hold out; "
            "install a Python that comes with its .py sources."
        )
    sides = ({d: tuple(found) for d, found in side.documents.items()} for side in (train, held_out))
    return Corpus(*sides)


def is_held_out(source: str) -> bool:
    """True for about one source in eight, decided by its name alone."""
    return _hash(source) % _HELD_OUT_IN == 0


def sources_folder() -> Path:
    """The folder of the running Python's standard-library sources."""
    return Path(sysconfig.get_path("stdlib"))


def _files(stdlib: Path) -> Iterator[_Source]:
    for path in sorted(stdlib.rglob("*.py")):
        relative = path.relative_to(stdlib)
        if not _SKIPPED.intersection(relative.parts) and not relative.name.startswith("_sysconfigdata"):
            yield _Source(relative.as_posix(), "code", partial(_read, path, stripped_code))
            yield _Source(relative.as_posix(), "prose", partial(_read, path, docstrings))


def _read(path: Path, part: Callable[[str], str]) -> str:
    try:
        return part(path.read_text(encoding="utf-8", errors="replace"))
    except SyntaxError:
        return ""  # a file for another Python: not text worth learning from


def _topics() -> Iterator[_Source]:
    for name, text in topics.items():
        yield _Source(f"topic:{name}", "prose", partial(str, text))


def _pages() -> Iterator[_Source]:
    """Character names, one a line, a source per page; numbered series and computed names are left out."""
    pages: dict[int, list[str]] = {}
    for point in range(sys.maxunicode + 1):
        name = unicodedata.name(chr(point), "")
        if name and not name.startswith("HANGUL SYLLABLE") and not any(c.isdigit() for c in name):
            pages.setdefault(point // _PAGE, []).append(name)
    for page, names in pages.items():
        yield _Source(f"U+{page * _PAGE:04X}", "names", partial(str, "\n".join(names) + "\n"))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
