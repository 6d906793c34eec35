"""Bytes per token, numbers, whitespace and byte fallback of small tokenizers, counted by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from mergelab.cli.main import cli
from mergelab.errors import MergelabError
from mergelab.text.segmentation import Segmentation, segment
from mergelab.text.tokenizer import load_tokenizer

BYTES = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def byte_level(digits: str | None = None) -> Tokenizer:
    """A byte-level vocabulary with a few merges; numbers are cut where `digits` matches, or by the merges."""
    merges = [("Ġ", "Ġ"), ("ĠĠ", "ĠĠ"), ("a", "b"), ("Ġ", "ab"), ("1", "2"), ("12", "3"), ("4", "5")]
    merges += [("45", "6"), ("2", "3"), ("23", "4"), ("5", "6"), ("56", "7")]
    vocab = BYTES | {a + b: len(BYTES) + i for i, (a, b) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=digits is None)
    parts = [] if digits is None else [pre_tokenizers.Split(Regex(digits), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*parts, plain])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentence_piece() -> Tokenizer:
    """Characters with `▁` for the space, and bytes for what is not among them."""
    letters = ["<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz", *"1234567", "▁t", "w", "\n"]
    vocab = {letter: i for i, letter in enumerate(dict.fromkeys(letters))}
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    model = models.BPE(vocab, [("▁", "t")], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def words() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "one": 1, "two": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def cut(tokenizer: Tokenizer, folder: Path, text: str) -> Segmentation:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return segment(load_tokenizer(folder), text)


def test_bytes_and_their_tokens_are_counted(tmp_path: Path) -> None:
    found = cut(byte_level(), tmp_path, "ab ab é 漢 é")
    # ab, Ġab, Ġ and the two bytes of é, Ġ and three bytes, Ġ and two.
    assert (found.tokens, found.bytes, found.characters) == (12, 15, 11)
    assert found.bytes_per_token == 15 / 12
    assert found.byte_fallback == 7 and found.fallback_text == {"é": 2, "漢": 1}
    assert found.whitespace_tokens == 3 and found.unknown == 0 and found.lossless
    assert found.vocab_size == 268 and found.used == 8


@pytest.mark.parametrize(
    ("digits", "words_for_it", "number"),
    [
        (None, "by 3 from the left", ("123", "456", "7")),
        (r"\d", "one by one", tuple("1234567")),
        (r"\d{1,3}(?=(?:\d{3})*(?!\d))", "by 3 from the right", ("1", "234", "567")),
        (r"\d{4}", "as the vocabulary has them", ("123", "4", "567")),
    ],
)
def test_numbers_are_cut_in_one_of_these_ways(
    tmp_path: Path, digits: str | None, words_for_it: str, number: tuple[str, ...]
) -> None:
    found = cut(byte_level(digits), tmp_path, "1234567 7")
    assert (found.digits, found.number) == (words_for_it, number)
    assert sum(size * count for size, count in found.digits_per_token.items()) == 8


def test_whitespace_goes_where_the_vocabulary_puts_it(tmp_path: Path) -> None:
    joined = cut(sentence_piece(), tmp_path / "a", "one two")
    assert joined.space == "joins the word" and joined.lossless and joined.tokens == 6
    assert joined.indents == {2: 2, 4: 4, 8: 8}
    own = cut(byte_level(), tmp_path / "b", "one two")
    assert own.space == "own token"
    dropped = cut(words(), tmp_path / "c", "one two three")
    assert (dropped.space, dropped.unknown, dropped.digits) == ("dropped", 1, "not kept")
    assert dropped.indents == {2: 0, 4: 0, 8: 0} and not dropped.lossless


def test_bytes_that_sentence_piece_falls_back_to_are_counted(tmp_path: Path) -> None:
    found = cut(sentence_piece(), tmp_path, "a é 漢 é")
    assert found.byte_fallback == 7 and found.fallback_text == {"é": 2, "漢": 1} and found.unknown == 0


def test_two_tokenizers_stand_side_by_side(tmp_path: Path) -> None:
    for name, tokenizer in (("a", byte_level()), ("b", words())):
        (tmp_path / name).mkdir()
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
    (tmp_path / "t.txt").write_text("one two")
    arguments = ["inspect", str(tmp_path / "a"), "--text", str(tmp_path / "t.txt")]
    both = [*arguments, "--against", str(tmp_path / "b")]
    shown = CliRunner().invoke(cli, both)
    assert shown.exit_code == 0 and "needs 0.286 times the tokens of" in shown.stdout
    assert ["tokens", "7", "2"] in [line.split() for line in shown.stdout.splitlines()]
    report = json.loads(CliRunner().invoke(cli, [*both, "--json"]).stdout)
    assert [one["bytes_per_token"] for one in report["tokenizers"]] == [1.0, 3.5]
    assert len(json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).stdout)["tokenizers"]) == 1


def test_what_has_no_meaning_is_refused(tmp_path: Path) -> None:
    words().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "empty.txt").write_text("")
    text = ["--text", str(tmp_path / "empty.txt")]
    for more, message in (
        (text, "is empty"),
        ([*text, "--sites"], "--text looks at the tokenizer alone"),
        (["--against", str(tmp_path)], "give one with --text"),
        (["--text", str(tmp_path / "none.txt")], "none.txt"),
    ):
        result = CliRunner().invoke(cli, ["inspect", str(tmp_path), *more])
        assert result.exit_code == 2 and message in result.stderr
    with pytest.raises(MergelabError, match="no tokens"):
        segment(load_tokenizer(tmp_path), " ")
