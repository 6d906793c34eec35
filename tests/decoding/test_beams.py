"""Beam search finds what an exhaustive search finds, and what transformers finds."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.decoding import beam_search, generate, pad_prompts, stop_at, suppress
from mergelab.errors import DecodingError
from mergelab.models.model import Model, Params
from tests.decoding.tiny import PROMPTS, tiny, write_folder
from tests.decoding.vocabulary_of_five import VOCAB, five

NEW = 3


def every_text(loaded: tuple[Model, Params], prompt: list[int]) -> dict[tuple[int, ...], float]:
    """The log-probability of every continuation of `NEW` tokens, by whole passes."""
    model, params = loaded
    texts = np.array(list(itertools.product(range(VOCAB), repeat=NEW)), np.int32)
    whole = np.concatenate([np.tile(np.array(prompt, np.int32), (len(texts), 1)), texts], axis=1)
    logits = jax.jit(lambda p, t: model.apply(p, t).logits)(params, jnp.asarray(whole))
    log_probs = np.asarray(jax.nn.log_softmax(logits), np.float64)[:, len(prompt) - 1 : -1]
    chosen = np.take_along_axis(log_probs, texts[..., None], axis=2)[..., 0].sum(axis=1)
    return dict(zip(map(tuple, texts.tolist()), chosen.tolist(), strict=True))


def test_as_many_beams_as_beginnings_find_what_an_exhaustive_search_finds() -> None:
    loaded, prompt = five(0), [1, 4, 2, 0]
    known = every_text(loaded, prompt)
    best = sorted(known, key=lambda text: -known[text])[:5]
    found = beam_search(*loaded, [prompt], max_new_tokens=NEW, beams=VOCAB**2, length_penalty=0.0)
    assert [tuple(row) for row in found.rows()[:5]] == best
    np.testing.assert_allclose(found.scores[0, :5], [known[text] for text in best], atol=1e-4)
    assert len({tuple(row) for row in found.rows()}) == VOCAB**2
    # The likeliest text is not that of the likeliest tokens, and one beam is greedy search.
    alone = beam_search(*loaded, [prompt], max_new_tokens=NEW, beams=1)
    assert alone.rows() == generate(*loaded, [prompt], max_new_tokens=NEW).rows()
    assert tuple(alone.rows()[0]) != best[0]


def test_prompts_of_a_batch_are_searched_each_by_itself_and_banned_tokens_stay_out() -> None:
    model, params = tiny("llama")
    options = {"max_new_tokens": 6, "beams": 3, "stop": stop_at([7, 30])}
    together = beam_search(model, params, *pad_prompts(PROMPTS[:2]), **options)
    for number, prompt in enumerate(PROMPTS[:2]):
        alone = beam_search(model, params, *pad_prompts([prompt]), **options)
        assert together.rows(number) == alone.rows()
    banned = suppress([together.rows(0)[0][0]])
    other = beam_search(model, params, *pad_prompts(PROMPTS[:2]), transforms=banned, **options)
    assert all(together.rows(0)[0][0] not in row for row in other.rows(0))


def test_what_beam_search_refuses() -> None:
    model, params = five(0)
    with pytest.raises(DecodingError, match=r"beam_search\(beams\) was given 0"):
        beam_search(model, params, [[1]], max_new_tokens=2, beams=0)
    with pytest.raises(DecodingError, match="length_penalty"):
        beam_search(model, params, [[1]], max_new_tokens=2, beams=2, length_penalty=float("nan"))


@pytest.mark.oracle
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("length_penalty", [1.0, -0.5, 2.0])
@pytest.mark.parametrize("ends", [[], [2], [2, 7, 30]], ids=str)
def test_beams_are_those_of_transformers(ends: list[int], length_penalty: float, early: bool) -> None:
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        path = write_folder("mistral", Path(folder))
        peer = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokens, mask = pad_prompts(PROMPTS, pad_id=PROMPTS[1][0])
    options = transformers.GenerationConfig(
        max_new_tokens=10,
        num_beams=4,
        num_return_sequences=4,
        do_sample=False,
        length_penalty=length_penalty,
        early_stopping=early,
        eos_token_id=ends or None,
        pad_token_id=1,
        output_scores=True,
        return_dict_in_generate=True,
    )
    with torch.no_grad():
        out = peer.generate(
            torch.from_numpy(tokens).long(),
            attention_mask=torch.from_numpy(mask).long(),
            generation_config=options,
        )
    expected = out.sequences[:, tokens.shape[1] :].numpy()
    model, params = tiny("mistral")
    found = beam_search(
        model,
        params,
        tokens,
        mask,
        max_new_tokens=10,
        beams=4,
        length_penalty=length_penalty,
        early_stopping=early,
        stop=stop_at(ends),
        pad_id=1,
    )
    ours = found.tokens.reshape(-1, 10)[:, : expected.shape[1]]
    if not ends:  # there transformers pads with -1
        assert (found.lengths == 10).all()
    np.testing.assert_array_equal(ours, expected)
    np.testing.assert_allclose(found.scores.reshape(-1), out.sequences_scores.numpy(), atol=1e-4)
