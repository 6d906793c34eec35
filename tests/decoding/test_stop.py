"""Rows end at their tokens and sequences, wherever these begin, and texts at their strings."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergelab.decoding import Stop, cut_at_strings, stop_at
from mergelab.errors import DecodingError

tokens = st.integers(0, 3)


def ends_at(stop: Stop, row: list[int]) -> int | None:
    """How many tokens of `row` are generated when it ends."""
    recent = stop.no_recent(1)
    for count, token in enumerate(row, 1):
        recent = stop.push(recent, jnp.array([token], jnp.int32))
        if bool(stop(recent, jnp.array([token], jnp.int32))[0]):
            return count
    return None


@given(
    st.lists(tokens, max_size=8),
    st.lists(tokens, max_size=1),
    st.lists(st.lists(tokens, min_size=1, max_size=3), max_size=3),
)
def test_a_row_ends_with_the_first_token_or_sequence_of_the_rule(
    row: list[int], ids: list[int], sequences: list[list[int]]
) -> None:
    def ended(prefix: list[int]) -> bool:
        return prefix[-1] in ids or any(prefix[-len(s) :] == s for s in sequences)

    expected = next((n for n in range(1, len(row) + 1) if ended(row[:n])), None)
    assert ends_at(stop_at(ids, sequences), row) == expected


def test_rows_end_on_their_own() -> None:
    stop = stop_at([9], [[1, 2]])
    recent = jnp.array([[1, 2], [2, 1], [0, 9]], jnp.int32)
    assert stop(recent, recent[:, -1]).tolist() == [True, False, True]
    assert stop_at()(stop_at().no_recent(2), jnp.zeros(2, jnp.int32)).tolist() == [False, False]


@pytest.mark.parametrize(
    ("text", "strings", "expected"),
    [
        ("a.b.c", ["."], ("a", ".")),
        ("a.b.c", [], ("a.b.c", None)),
        ("one two", ["two", "ne"], ("o", "ne")),
        ("xyz", ["y", "yz"], ("x", "yz")),
        ("xyz", ["Z"], ("xyz", None)),
    ],
)
def test_text_is_cut_at_the_first_string(
    text: str, strings: list[str], expected: tuple[str, str | None]
) -> None:
    assert cut_at_strings(text, strings) == expected


def test_empty_stops_are_refused() -> None:
    with pytest.raises(DecodingError, match="at least one token"):
        stop_at(sequences=[[1], []])
    with pytest.raises(DecodingError, match="not empty"):
        cut_at_strings("text", [""])
    with pytest.raises(DecodingError, match="at least 0"):
        stop_at(ids=[-1])
