"""Docstrings, help and documents in the project's English: a noun phrase first, CONTRIBUTING's words."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PREPOSITIONS = re.compile(
    r"(about|above|after|against|along|among|as|at|before|behind|below|besides?|between|beyond|by|during|for|from"
    r"|in|into|like|near|of|off|onto?|out|over|past|per|since|through|to|towards?|under|until|upon|up|via|with"
    r"|within|without)\b",
    re.IGNORECASE,
)
SECTIONS = frozenset({"Args:", "Attributes:", "Returns:", "Yields:"})
AVOIDED = re.compile(
    r"\b(leav(?:e|es|ing)|left) away\b|\bat most so many\b|\bso-manieth\b|\bforetold\b"
    r"|(?<!there )\bis no (?:name|key|file|site|model|number|regular|tensor|folder)\b",
    re.IGNORECASE,
)


def entries(docstring: str) -> Iterator[str]:
    """The first words of a docstring: those of its summary and of every entry of its sections."""
    yield docstring
    section, depth = "", -1
    for line in docstring.splitlines():
        indent = len(line) - len(line.lstrip())
        if line and not indent:
            section, depth = (line.strip() if line.strip() in SECTIONS else ""), -1
        elif section and line.strip():
            depth = indent if depth < 0 else depth
            if indent == depth:
                named = re.match(r"\s*[\w\[\]., *`]+?:\s+(.*)", line)
                returned = section in ("Returns:", "Yields:")
                yield line if returned or named is None else named.group(1)


def texts(source: str) -> Iterator[tuple[int, str]]:
    """What a file says to its readers: line, and the beginning of each docstring entry and help text."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for entry in entries(ast.get_docstring(node) or ""):
                yield getattr(node, "lineno", 1), entry
        elif isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg == "help" and isinstance(keyword.value, ast.Constant):
                    yield node.lineno, str(keyword.value.value)


def begins_with_preposition(text: str) -> bool:
    return PREPOSITIONS.match(text.strip()) is not None


def test_docstring_entries_and_help_begin_with_a_noun_phrase(repository: Path) -> None:
    found = [
        f"{file.relative_to(repository)}:{line}: {text.strip()[:80]}"
        for file in sorted((repository / "mergelab").rglob("*.py"))
        for line, text in texts(file.read_text(encoding="utf-8"))
        if begins_with_preposition(text)
    ]
    assert not found, "\n".join(found)


def test_documents_avoid_the_words_that_contributing_names(repository: Path) -> None:
    files = [
        *(repository / "mergelab").rglob("*.py"),
        *(repository / "docs").glob("*.md"),
        repository / "README.md",
    ]
    found = [
        f"{file.relative_to(repository)}:{number}: {line.strip()[:80]}"
        for file in sorted(files)
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if AVOIDED.search(line)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        '"""Of everything drawn."""',
        'def f(x):\n    """A map.\n\n    Args:\n        x: at least 1.\n    """',
        'def f(x):\n    """A map.\n\n    Returns:\n        From 0 to 1.\n    """',
        'option("--rows", help="With --data: number of rows.")',
    ],
)
def test_an_entry_without_a_head_noun_is_found(source: str) -> None:
    assert any(begins_with_preposition(text) for _, text in texts(source))
