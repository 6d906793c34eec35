"""Whole answers: phrases as whole words, reasoning looked past, openings that all answers share."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from mergelab.abliteration import answers
from mergelab.abliteration.answers import (
    REFUSAL_PHRASES,
    Refusals,
    count_refusals,
    final_answer,
    is_refusal,
    reasoning_begun,
    shared_opening,
)
from mergelab.abliteration.prompts import Prompts
from mergelab.text.tokenizer import Tokenizer

VOCAB = ["<bos>", "<think>", "</think>", "<end>", "Okay", "so", "I", "can't", "Sure", "do", "that", "Hm"]
BOS, THINK, DONE, END, OKAY, SO, ME, CANT, SURE, DO, THAT, HM = range(12)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Words, with tags of reasoning that are special tokens."""
    backend = tokenizers.Tokenizer(WordLevel({word: n for n, word in enumerate(VOCAB)}, unk_token="Hm"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.add_special_tokens(VOCAB[:4])
    return Tokenizer(backend, {}, (END,), {}, Path("words"))


@pytest.mark.parametrize("phrase", REFUSAL_PHRASES)
def test_every_listed_phrase_is_found_however_it_is_typeset(phrase: str) -> None:
    curly = phrase.replace("'", "\N{RIGHT SINGLE QUOTATION MARK}")
    for text in (f"{phrase} do that.", f"\n\n**{curly.upper()}**, friend", f"Well. {phrase.lower()}  ..."):
        assert is_refusal(text), text


@pytest.mark.parametrize(
    "answer",
    [
        "Hawaii can't be reached by train.",
        "The shop has an aim: to sell.",
        "Sure! Here is how to do it.",
        "I cannoli.",
        "",
        f"Here is a story. {'It rained. ' * 20} 'I'm sorry,' she said.",
    ],
)
def test_other_answers_are_no_refusals(answer: str) -> None:
    assert not is_refusal(answer)


def test_white_space_quotes_and_scripts_do_not_matter() -> None:
    assert is_refusal("I\u00a0am\n sorry") and is_refusal("I canʼt") and is_refusal("I can`t")
    assert is_refusal("很抱歉,我不能帮助你。", ["我不能"]) and is_refusal(
        "Das KANN ich nicht.", ["kann ich nicht"]
    )
    assert not is_refusal("Niemand kann ich nicht.", ["mand kann"])


@pytest.mark.parametrize(
    ("text", "before", "answer"),
    [
        ("Yes.", "", "Yes."),
        ("<think>I'm sorry for them.</think>Yes.", "", "Yes."),
        ("\n<think>I can't decide", "", None),
        ("they ask</think> No.", "user: ?\n<think>\n", " No."),
        ("they ask", "user: ?\n<think>\n", None),
        ("Yes.", "<think>\n\n</think>\n\n", "Yes."),
        ("[THINK]hm[/THINK]No.", "", "No."),
        (
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>No.",
            "",
            "No.",
        ),
        ("<|channel|>final<|message|>No.", "", "<|channel|>final<|message|>No."),
        ("What </think> means.", "", "What </think> means."),
    ],
)
def test_reasoning_is_looked_past(text: str, before: str, answer: str | None) -> None:
    assert final_answer(text, before) == answer


def test_refusals_behind_reasoning_are_counted_and_unfinished_reasoning_is_told(tokenizer: Tokenizer) -> None:
    prompts = Prompts.of([[BOS, HM, DO], [BOS, SO, SO, DO]])
    texts = [[THINK, ME, CANT, DONE, SURE, END], [THINK, SO, DONE, ME, CANT, DO, THAT], [THINK, ME, CANT, DO]]
    assert count_refusals(tokenizer, prompts, texts) == Refusals(refused=1, unfinished=1, total=3)
    # The same where the template had begun the reasoning.
    begun = Prompts.of([[BOS, HM, THINK], [BOS, SO, SO, THINK]])
    assert reasoning_begun(tokenizer, begun) == "<think>" and not reasoning_begun(tokenizer, prompts)
    assert count_refusals(tokenizer, begun, [text[1:] for text in texts]) == Refusals(1, 1, 3)
    assert count_refusals(tokenizer, prompts, [text[1:] for text in texts]) == Refusals(3, 0, 3)


@pytest.mark.parametrize(
    ("openings", "expected"),
    [
        ([[THINK, OKAY, n] for n in range(8)], "<think>\n\n</think>\n\n"),
        ([[OKAY, SO, n] for n in range(8)], "Okay so"),
        ([[n, SO, SO] for n in range(8)], ""),  # nothing is shared
        ([[ME, CANT, n] for n in range(8)], ""),  # a model that refuses everything
        ([[OKAY, SO, END]] * 8, ""),  # a model that says one thing
        ([[OKAY, SO, n] for n in range(7)], ""),  # too few to say "all"
    ],
)
def test_an_opening_that_all_answers_share_is_found(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, openings: list[list[int]], expected: str
) -> None:
    monkeypatch.setattr(answers, "generate_answers", lambda *given, **options: list(map(tuple, openings)))
    prompts = Prompts.of([[BOS, HM, n % 12] for n in range(len(openings))])
    model = cast(Any, None)
    assert shared_opening(model, {}, tokenizer, prompts, np.array([ME])) == expected


def test_reasoning_that_the_template_begins_is_ended(tokenizer: Tokenizer) -> None:
    prompts = Prompts.of([[BOS, n, THINK] for n in range(4, 12)])
    assert shared_opening(cast(Any, None), {}, tokenizer, prompts, np.array([ME])) == "\n\n</think>\n\n"
