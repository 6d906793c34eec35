"""Text in, text out: stop strings cut where they begin, whatever tokens they lie in."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from mergelab.decoding import generate, pad_prompts, sample
from mergelab.decoding.completion import complete, new_text
from mergelab.errors import DecodingError
from mergelab.text.tokenizer import Tokenizer
from tests.decoding.tiny import tiny

# 61 tokens, as the tiny models have: syllables, every fourth of which begins a word.
PIECES = [f"{'▁' if i % 4 == 0 else ''}{'bcdfghjklmnpr'[i // 5]}{'aeiou'[i % 5]}" for i in range(61)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    backend = Backend(models.WordLevel({piece: i for i, piece in enumerate(PIECES)}, PIECES[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    return Tokenizer(backend, {}, (), {}, Path("folder"))


PROMPTS = [[3, 14, 15], [60, 1]]


def test_tokens_are_those_of_generate_and_text_is_theirs(tokenizer: Tokenizer) -> None:
    assert len(set(PIECES)) == 61
    model, params = tiny("llama")
    done = complete(
        model, params, tokenizer, [" ".join(PIECES[i] for i in p) for p in PROMPTS], max_new_tokens=40
    )
    expected = generate(model, params, *pad_prompts(PROMPTS), max_new_tokens=40).rows()
    assert [list(c.token_ids) for c in done] == expected
    assert [c.stop for c in done] == ["length", "length"]
    for prompt, completion in zip(PROMPTS, done, strict=True):
        whole = tokenizer.decode([*prompt, *completion.token_ids])
        assert whole == tokenizer.decode(prompt) + completion.text
        # The text of the new tokens alone lacks the space before a first word.
        begins_word = PIECES[completion.token_ids[0]].startswith("▁")
        assert completion.text.startswith(" ") == begins_word


def test_a_space_between_prompt_and_text_is_kept(tokenizer: Tokenizer) -> None:
    assert PIECES[4].startswith("▁") and not PIECES[1].startswith("▁")
    assert new_text(tokenizer, [1], [4]) == " " + tokenizer.decode([4])


def test_stop_strings_end_texts_at_any_depth(tokenizer: Tokenizer) -> None:
    model, params = tiny("llama")
    options = {"max_new_tokens": 40, "sampler": sample(), "key": 3}
    free = complete(model, params, tokenizer, PROMPTS, **options)  # type: ignore[arg-type]
    for start in (7, len(free[0].text) - 9):
        string = free[0].text[start : start + 4]
        done = complete(model, params, tokenizer, PROMPTS, stop_strings=["never", string], **options)  # type: ignore[arg-type]
        assert done[0].stop == "string"
        assert done[0].text == free[0].text.partition(string)[0]
        count = len(done[0].token_ids)
        assert done[0].token_ids == free[0].token_ids[:count]
        assert string in new_text(tokenizer, PROMPTS[0], done[0].token_ids)
        assert string not in new_text(tokenizer, PROMPTS[0], done[0].token_ids[:-1])
        assert done[1].text == free[1].text.partition(string)[0]


def test_end_ids_end_texts(tokenizer: Tokenizer) -> None:
    model, params = tiny("llama")
    free = complete(model, params, tokenizer, PROMPTS[:1], max_new_tokens=12)
    end = free[0].token_ids[3]
    done = complete(model, params, tokenizer, PROMPTS[:1], max_new_tokens=12, end_ids=[end])
    assert done[0].stop == "token" and done[0].token_ids[-1] == end
    assert done[0].token_ids == free[0].token_ids[: len(done[0].token_ids)]


def test_an_empty_stop_string_is_refused(tokenizer: Tokenizer) -> None:
    model, params = tiny("llama")
    with pytest.raises(DecodingError, match="not empty"):
        complete(model, params, tokenizer, PROMPTS, max_new_tokens=1, stop_strings=[""])
