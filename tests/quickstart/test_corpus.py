"""The corpus is the same every time, its sides share nothing, and its domains are what they claim."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from mergelab.errors import MergelabError
from mergelab.quickstart.corpus import DOMAINS, Corpus, docstrings, gather, is_held_out, stripped_code

SOURCE = '''\
"""Module."""
import os  # trailing
# whole line

def f(x):
    """Säy
    something.""" ; y = "form feed \f"
    return "# not a comment", x

class Empty:
    """Only this."""

async def g(): "one line"; return 1
'''


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return gather(80_000, 20_000)


def test_the_corpus_is_reproducible(corpus: Corpus) -> None:
    assert gather(80_000, 20_000).digest == corpus.digest
    assert gather(80_000, 25_000).digest != corpus.digest


def test_no_source_is_on_both_sides(corpus: Corpus) -> None:
    trained = {document.source for documents in corpus.train.values() for document in documents}
    held_out = {document.source for documents in corpus.held_out.values() for document in documents}
    assert trained and held_out and not trained & held_out
    assert not any(map(is_held_out, trained)) and all(map(is_held_out, held_out))


def test_no_text_is_on_both_sides(corpus: Corpus) -> None:
    for domain in DOMAINS:
        trained = {document.text for document in corpus.train[domain]}
        assert not trained & {document.text for document in corpus.held_out[domain]}


def test_each_domain_reaches_its_size_and_no_more_than_a_document_over(corpus: Corpus) -> None:
    for documents, limit in ((corpus.train, 80_000), (corpus.held_out, 20_000)):
        for domain in DOMAINS:
            sizes = [document.num_bytes for document in documents[domain]]
            assert sum(sizes) >= limit > sum(sizes[:-1])
            assert max(sizes) <= limit / 4


def test_the_domains_are_what_they_claim(corpus: Corpus) -> None:
    for document in (*corpus.train["code"], *corpus.held_out["code"]):
        assert "#!" not in document.text.splitlines()[0]
    names = "".join(document.text for document in corpus.train["names"])
    assert re.fullmatch(r"[A-Z\-\n ]+", names)
    assert "HANGUL SYLLABLE" not in names


def test_stripped_code_keeps_the_code() -> None:
    code = stripped_code(SOURCE)
    assert code.rstrip("\n").split("\n") == [
        "import os",
        "def f(x):",
        '     ; y = "form feed \f"',
        '    return "# not a comment", x',
        "class Empty:",
        "async def g(): ; return 1",
    ]
    assert docstrings(SOURCE) == "Module.\n\nSäy\nsomething.\n\nOnly this.\n\none line"


def test_stripping_real_code_loses_no_string_but_docstrings(corpus: Corpus) -> None:
    source = Path(ast.__file__).read_text(encoding="utf-8")
    code = stripped_code(source)
    openings = [
        line for text in docstrings(source).split("\n\n") if len(line := text.partition("\n")[0]) > 40
    ]
    assert len(openings) > 10 and all(line in source and line not in code for line in openings)
    assert [line for line in code.splitlines() if line.lstrip().startswith("#")] == []


def test_a_file_of_another_python_is_left_out_and_too_little_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("print 'python two'\n")
    with pytest.raises(MergelabError, match="too little code"):
        gather(1000, 1000, stdlib=tmp_path)
