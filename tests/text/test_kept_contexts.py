"""A corpus read into contexts goes on where it was killed, and is shared by processes in lanes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergelab.errors import CorpusError
from mergelab.quickstart.family import train_bpe
from mergelab.text import corpus, corpus_tokens, kept_contexts
from mergelab.text.contexts import TextContexts, text_contexts
from mergelab.text.corpus import TextOptions, documents, sections
from mergelab.text.kept_contexts import Share, corpus_contexts, lane_contexts
from mergelab.text.tokenizer import Tokenizer

PROSE = Path(__file__).with_name("test_chat.py").read_text("utf-8")
LENGTH = 8


class Killed(Exception):
    """What ends a reading in the middle."""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    backend = train_bpe([PROSE], 300)
    backend.add_special_tokens(["</s>"])
    template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    end = backend.token_to_id("</s>")
    assert end is not None
    return Tokenizer(backend, {"eos_token": "</s>"}, (end,), {"default": template}, Path("model"))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves after each piece, and windows and sections of a few hundred characters."""
    monkeypatch.setattr(kept_contexts, "_SAVE_EVERY", 0.0)
    monkeypatch.setattr("os.fsync", lambda number: None)  # on a busy disk some thousand take minutes
    monkeypatch.setattr(corpus_tokens, "WINDOW", 600)
    monkeypatch.setattr(corpus_tokens, "_OVERLAP", 256)
    monkeypatch.setattr(corpus_tokens, "_BATCH", 600)
    monkeypatch.setattr(corpus, "_SECTION", 300)


def records(count: int) -> list[dict[str, Any]]:
    """Texts of several lengths, empty ones among them."""
    return [{"text": PROSE[40 * n : 40 * n + 30 * (n % 5)]} for n in range(count)]


def written(folder: Path, kind: str) -> Path:
    folder.mkdir(exist_ok=True)
    if kind == "text":
        (folder / "a.txt").write_text(PROSE[:9000])
    elif kind == "chats":
        chats = [{"messages": [{"role": "assistant", "content": one["text"]}]} for one in records(60)]
        (folder / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in chats))
    else:
        for number in range(3):
            lines = "".join(json.dumps(one) + "\n\n" for one in records(40)).encode()
            packed = gzip.compress(lines, mtime=0) if kind == "gzip" else lines
            (folder / f"{number}.jsonl{'.gz' if kind == 'gzip' else ''}").write_bytes(packed)
    return folder


def same(found: TextContexts, expected: TextContexts) -> bool:
    def counted(one: TextContexts) -> np.ndarray:
        return np.ones(one.tokens.shape, bool) if one.counted is None else one.counted

    return np.array_equal(found.tokens, expected.tokens) and np.array_equal(counted(found), counted(expected))


def killed_after(tokens: int) -> Any:
    """A `progress` that ends the reading."""

    def progress(done: int) -> None:
        if done >= tokens:
            raise Killed

    return progress


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("lines", TextOptions()),
        ("gzip", TextOptions(part=(1, 3), packing="documents")),
        ("text", TextOptions(tokens=3000)),
        ("chats", TextOptions(roles="assistant")),
    ],
    ids=["lines", "gzip, a part", "one long text", "chats"],
)
def test_a_reading_that_was_killed_goes_on(
    kind: str, options: TextOptions, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, folder = written(tmp_path / "in", kind), tmp_path / "kept"
    expected = text_contexts(tokenizer, documents(place, options), LENGTH, options)
    total, given = expected.tokens.size, []

    def check(ids: np.ndarray) -> None:
        given.append(ids.size)

    for share in (0.2, 0.5, 0.8):
        with pytest.raises(Killed):
            corpus_contexts(
                tokenizer,
                place,
                LENGTH,
                options,
                folder=folder,
                check=check,
                progress=killed_after(int(share * total)),
            )
    found = corpus_contexts(tokenizer, place, LENGTH, options, folder=folder, check=check)
    assert same(found, expected) and found.exhausted == expected.exhausted
    # Of each kill no more than the piece under way was made twice; the control begins anew each time.
    assert sum(given) < 1.5 * total
    monkeypatch.setattr(corpus_tokens, "_whole", None)
    monkeypatch.setattr(corpus_tokens, "_long", None)
    assert same(corpus_contexts(tokenizer, place, LENGTH, options, folder=folder), expected)  # reads no text


def test_what_is_kept_of_other_texts_or_damaged_is_not_taken(tokenizer: Tokenizer, tmp_path: Path) -> None:
    place, folder = written(tmp_path / "in", "lines"), tmp_path / "kept"

    def read(length: int = LENGTH) -> TextContexts:
        return corpus_contexts(tokenizer, place, length, folder=folder)

    expected = read()
    assert read(16).tokens.shape[1] == 16  # other settings
    (place / "2.jsonl").write_text(json.dumps({"text": PROSE[:900]}))
    other = read()
    assert other.tokens.shape != expected.tokens.shape
    for name, content in (("state.json", b"{"), ("state.json", b'{"identity": 3}'), ("tokens", b"\0" * 7)):
        (folder / "00000" / name).write_bytes(content)
        assert same(read(), other)


def test_files_and_records_that_are_done_are_not_taken_apart(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = written(tmp_path / "in", "lines")
    read = list(documents(place))
    (place / "0.jsonl").write_text("damaged")
    rest = read[60]
    parsed: list[str] = []
    original = corpus._parsed
    monkeypatch.setattr(corpus, "_parsed", lambda line, at: parsed.append(line) or original(line, at))
    found = list(documents(place, start=rest.before))
    assert [one.place for one in found] == [one.place for one in read[60:]]
    assert [one.after for one in found] == [one.after for one in read[60:]]
    assert len(parsed) == 120 - 40 - rest.before.record < 70


@pytest.mark.parametrize("kind", ["lines", "text"])
def test_lanes_hold_the_same_for_any_number_of_processes(
    kind: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    place, lanes = written(tmp_path / "in", kind), 3
    alone = lane_contexts(tokenizer, place, LENGTH, share=Share(lanes=lanes))
    seen: list[int] = []
    for count in (2, 3):
        shared: dict[int, TextContexts] = {}
        for index in range(count):
            tokenized: list[int] = []
            shared |= lane_contexts(
                tokenizer, place, LENGTH, share=Share(index, count, lanes), progress=tokenized.append
            )
            seen.append(tokenized[-1])
        assert sorted(shared) == [0, 1, 2] and all(same(shared[lane], alone[lane]) for lane in shared)
    # Each tokenized its own: together what is there, but for what a lane's last context lacks.
    total = sum(one.tokens.size for one in alone.values())
    assert sum(seen[:2]) == sum(seen[2:]) == total and max(seen) < 0.8 * total
    # A lane is what the documents dealt to it give.
    dealt = [one for one in sections(documents(place)) if one.before.units % lanes == 1]
    assert same(alone[1], text_contexts(tokenizer, dealt, LENGTH))


def test_lanes_go_on_with_another_number_of_processes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    place, folder, lanes = written(tmp_path / "in", "text"), tmp_path / "kept", 4
    options = TextOptions(tokens=3000)
    expected = lane_contexts(tokenizer, place, LENGTH, options, share=Share(lanes=lanes))
    assert all(750 <= one.tokens.size < 1000 and not one.exhausted for one in expected.values())
    for index, tokens in ((0, 500), (1, 1200)):  # which get differently far
        with pytest.raises(Killed):
            lane_contexts(
                tokenizer, place, LENGTH, options,
                share=Share(index, 2, lanes), folder=folder, progress=killed_after(tokens),
            )  # fmt: skip
    made: list[int] = []

    def check(ids: np.ndarray) -> None:
        made.append(ids.size)

    found: dict[int, TextContexts] = {}
    for index in range(3):
        share = Share(index, 3, lanes)
        found |= lane_contexts(tokenizer, place, LENGTH, options, share=share, folder=folder, check=check)
    assert sorted(found) == [0, 1, 2, 3] and all(same(found[lane], expected[lane]) for lane in found)
    assert 0 < sum(made) < 2300  # of 3,000


def test_the_contexts_of_a_small_corpus_are_dealt_out(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(PROSE[:500])
    whole = corpus_contexts(tokenizer, tmp_path / "a.txt", LENGTH).tokens
    found = lane_contexts(tokenizer, tmp_path / "a.txt", LENGTH, share=Share(1, 2, 4))
    assert sorted(found) == [2, 3]
    np.testing.assert_array_equal(found[3].tokens, whole[3::4])
    with pytest.raises(CorpusError, match=r"fill \d+ contexts of 8 tokens, fewer than the 1000 lanes"):
        lane_contexts(tokenizer, tmp_path / "a.txt", LENGTH, share=Share(1, 2, 1000))
    with pytest.raises(CorpusError, match="share 2 of 2 of 64 lanes does not exist"):
        Share(2, 2)


def test_sections_of_a_long_text_are_all_of_it_and_can_be_gone_to(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(PROSE[:2000] + "x" * 700)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": PROSE[:700]}) + "\n" + json.dumps({"text": "end"}))
    places = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    read = [(one.before, one.after, "".join(one.pieces)) for one in sections(documents(places))]
    texts = [text for *_, text in read]
    assert "".join(texts) == PROSE[:2000] + "x" * 700 + PROSE[:700] + "end"
    assert (
        max(map(len, texts)) == 300
        and texts[0].endswith("\n")
        and not any(one.begun for one in sections(documents(places)))
    )
    assert [before.units for before, *_ in read] == list(range(len(read)))
    for number, (before, *_) in enumerate(read):
        again = [
            (one.before, one.after, "".join(one.pieces)) for one in sections(documents(places, start=before))
        ]
        assert again == read[number:]
