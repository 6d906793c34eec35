"""Packing loses no token, starts positions afresh with each piece, and fills contexts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergelab.errors import MergelabError
from mergelab.text.packing import Contexts, pack_stream, pack_whole, same_document

documents = st.lists(st.lists(st.integers(1, 99), max_size=23), max_size=8)


def check(contexts: Contexts, docs: list[list[int]], length: int) -> None:
    """What both ways of packing promise."""
    assert {a.shape for a in vars(contexts).values()} == {(len(contexts.tokens), length)}
    assert contexts.mask.any(axis=1).all()  # no empty context
    restored: dict[int, list[int]] = {}
    order = []
    for row in range(len(contexts.tokens)):
        for segment in range(1, contexts.segments[row].max() + 1):
            places = np.flatnonzero(contexts.segments[row] == segment)
            assert (np.diff(places) == 1).all()
            np.testing.assert_array_equal(contexts.positions[row, places], np.arange(len(places)))
            (document,) = set(contexts.documents[row, places].tolist())
            order.append((document, contexts.tokens[row, places].tolist()))
    for document, piece in order:
        restored.setdefault(document, []).append(piece)
    # Pieces of a cut document may lie in any order in pack_whole, where all but one fill a context.
    for index, doc in enumerate(docs):
        pieces = sorted(restored.pop(index, []), key=lambda p: -len(p))
        assert sorted(token for piece in pieces for token in piece) == sorted([*doc, 0])
    assert not restored
    padding = ~contexts.mask
    assert (contexts.tokens[padding] == 77).all() and (contexts.documents[padding] == -1).all()


@given(documents, st.integers(1, 9))
def test_a_stream_is_cut_where_it_lies(docs: list[list[int]], length: int) -> None:
    contexts = pack_stream(docs, length, separator=0, pad_id=77)
    check(contexts, docs, length)
    assert contexts.tokens[contexts.mask].tolist() == [t for doc in docs for t in [*doc, 0]]
    assert contexts.mask.ravel()[: contexts.mask.sum()].all()  # padding at the very end only


@given(documents, st.integers(1, 9))
def test_whole_documents_stay_whole(docs: list[list[int]], length: int) -> None:
    contexts = pack_whole(docs, length, separator=0, pad_id=77)
    check(contexts, docs, length)
    for index, doc in enumerate(docs):
        pieces = (contexts.documents == index).any(axis=1).sum()
        assert pieces == -(-(len(doc) + 1) // length)  # as few as can be
    filled = contexts.mask.sum(axis=1)
    if len(filled) > 1:  # two contexts half empty would have been one
        assert sum(sorted(filled)[:2]) > length


def test_best_fit_by_hand() -> None:
    contexts = pack_whole([[1] * 3, [2] * 5, [3] * 4, [4] * 2, [5] * 2], 8)
    assert contexts.documents.tolist() == [[1, 1, 1, 1, 1, 0, 0, 0], [2, 2, 2, 2, 3, 3, 4, 4]]
    assert contexts.fill == 1.0
    assert pack_stream([], 8).tokens.shape == (0, 8) and pack_stream([], 8).fill == 0.0


def test_documents_do_not_see_each_other() -> None:
    segments = np.array([[1, 1, 2, 0]])
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(same_document(segments)[0], np.array(expected, bool))


@pytest.mark.parametrize("pack", [pack_stream, pack_whole])
def test_lengths_without_meaning_are_refused(pack: object) -> None:
    assert callable(pack)
    with pytest.raises(MergelabError, match="0 tokens long"):
        pack([[1]], 0)
