"""Patterns of module names: PEFT's answers, in bounded time whatever the pattern."""

from __future__ import annotations

import contextlib
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergelab.checkpoints.name_pattern import matches_name

NAMES = [
    "q_proj", "k_proj", "model.layers.0.q_proj", "model.layers.12.q_proj", "model.layers.1.v_proj",
    "a.q_projx", "layersx1.q_proj", "ab", "a.ba", "-x", "",
]  # fmt: skip
KEYS = [
    "q_proj", "layers.1.q", "model.layers.0.q_proj", r"layers\.1\.v_proj", ".*q_proj", "(q|k)_proj",
    "^q_proj",
    r"^model\.layers\.[0-9]+\.q_proj", r"layers\.\d{1,2}\.(?:q|v)_proj$", "q_proj|k_proj", r"[^.]*_proj",
    "a|b$",
    "(([a-z_.0-9])+)+", "[]a-]x", "[a-c-]x", "layers.*?q_proj", "(a|b){2,3}", "(a*)*b", "", r"\w+",
    "q_proj{1}",
]  # fmt: skip


def by_peft(key: str, name: str) -> bool:
    return bool(re.match(rf"(.*\.)?({key})$", name))


@pytest.mark.parametrize("key", KEYS)
def test_keys_match_as_in_peft(key: str) -> None:
    assert [matches_name(key, name) for name in NAMES] == [by_peft(key, name) for name in NAMES]


PIECES = ["a", "b", ".", r"\.", "(", ")", "|", "*", "+", "?", "[ab]", "[^a]", "{1,2}", "{2}", r"\d", "(?:"]


@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join), st.text("ab.1", max_size=7))
def test_drawn_keys_match_as_in_peft_or_are_refused(key: str, name: str) -> None:
    try:
        expected = by_peft(key, name)
        re.compile(key)
    except re.error:
        return
    with contextlib.suppress(ValueError):
        assert matches_name(key, name) == expected


@pytest.mark.parametrize("key", ["(([a-z_.0-9])+)+!", "(a*)*b", "(.*)*(.*)*(.*)*x", "(a|aa)+!"])
def test_keys_that_keep_pythons_matcher_busy_for_ever_are_answered_at_once(key: str) -> None:
    started = time.perf_counter()
    assert not matches_name(key, "model.layers.31." * 20 + "q_proj")
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("(?i)q", r"uses '\(\?i'"), ("(?=a)", r"uses '\(\?='"), (r"(a)\1", r"uses '\\1'"),
        (r"\bq", r"uses '\\b'"),
        ("(", "not closed"), ("a)", "closes nothing"), ("[a", "not closed"), ("*", "where a name"),
        ("a**", "repeats"),
        ("(((a{99}){99}){99})", "too large"), ("(" * 90 + ")" * 90, "too deep"),
        ("a" * 2000, "2000 characters"),
        ("a{3,1}", "fewer times"), ("a\\", "uses"), ("^a|b", "one alternative"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_refused(key: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        matches_name(key, "q_proj")
