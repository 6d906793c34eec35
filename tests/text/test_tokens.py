"""The tokenizer loses nothing and its files are complete; windows cover every token once."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mergelab.quickstart.family import END_OF_TEXT, END_OF_TEXT_ID, tokenizer_files, train_bpe
from mergelab.text.packing import evaluation_windows, random_windows, token_stream

TEXTS = ["def f(x):\n    return x\n" * 20, "the cat sat on the mat, the cat sat\n" * 20]
TOKENIZER = train_bpe(TEXTS, 280)


@given(st.text())
def test_every_text_decodes_to_itself(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


def test_training_is_deterministic_and_shortens_text() -> None:
    assert train_bpe(TEXTS, 280).to_str() == TOKENIZER.to_str()
    assert TOKENIZER.get_vocab_size() == 280
    assert TOKENIZER.token_to_id(END_OF_TEXT) == END_OF_TEXT_ID
    assert len(TOKENIZER.encode(TEXTS[0]).ids) < 0.6 * len(TEXTS[0])


def test_tokenizer_files_restore_the_tokenizer() -> None:
    files = tokenizer_files(TOKENIZER, 64)
    restored = Tokenizer.from_str(files["tokenizer.json"].decode())
    assert restored.encode(TEXTS[1]).ids == TOKENIZER.encode(TEXTS[1]).ids
    assert json.loads(files["tokenizer_config.json"])["model_max_length"] == 64


@pytest.mark.oracle
def test_transformers_reads_the_tokenizer_files(tmp_path: Path) -> None:
    import transformers

    for name, content in tokenizer_files(TOKENIZER, 64).items():
        (tmp_path / name).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXTS[0])["input_ids"] == TOKENIZER.encode(TEXTS[0]).ids
    assert theirs.decode(theirs(TEXTS[0])["input_ids"]) == TEXTS[0]
    assert theirs.eos_token_id == END_OF_TEXT_ID


documents = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=23), min_size=1, max_size=5)


@given(documents, st.integers(1, 9))
def test_evaluation_counts_every_token_once_after_the_token_before_it(
    docs: list[list[int]], length: int
) -> None:
    windows = evaluation_windows(docs, 0, length, num_bytes=1)
    assert windows.tokens.shape[1] == windows.is_target.shape[1] + 1 == length + 1
    pairs = [
        (int(before), int(token))
        for row, mask in zip(windows.tokens, windows.is_target, strict=True)
        for before, token in zip(row[:-1][mask], row[1:][mask], strict=True)
    ]
    assert pairs == [pair for doc in docs for pair in zip([0, *doc[:-1]], doc, strict=True)]


def test_training_windows_come_from_the_stream_and_follow_the_seed() -> None:
    stream = token_stream([[1, 2, 3], [4, 5]], separator=0)
    assert stream.tolist() == [0, 1, 2, 3, 0, 4, 5, 0]
    first, second, other = (
        np.stack(list(islice(random_windows(stream, 3, 4, seed), 40))) for seed in (7, 7, 8)
    )
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, other)
    seen = {tuple(window) for window in first.reshape(-1, 4).tolist()}
    assert seen == {tuple(stream[i : i + 4].tolist()) for i in range(5)}
