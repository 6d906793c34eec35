"""A draft changes how many passes a text takes, and nothing about its distribution."""

from __future__ import annotations

import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.decoding import (
    Temperature,
    TopKFilter,
    generate,
    greedy,
    pad_prompts,
    promote,
    row_keys,
    sample,
    speculate,
    stop_at,
)
from mergelab.errors import DecodingError
from mergelab.models.families import model_from_config
from mergelab.models.model import Model, Params
from tests.decoding.tiny import PROMPTS, tiny
from tests.decoding.vocabulary_of_five import CONFIG, VOCAB, five

PROMPT, NEW, SAMPLES = [1, 4, 2, 0], 3, 4000
KEPT = sample(Temperature(1.3), TopKFilter(4))


def probabilities(loaded: tuple[Model, Params]) -> dict[tuple[int, ...], float]:
    """What `KEPT` draws from a model: the probability of every text of three tokens, in float64."""
    model, params = loaded
    texts = np.array(list(itertools.product(range(VOCAB), repeat=NEW)), np.int32)
    whole = np.concatenate([np.tile(np.array(PROMPT, np.int32), (len(texts), 1)), texts], axis=1)
    logits = np.asarray(jax.jit(lambda p, t: model.apply(p, t).logits)(params, jnp.asarray(whole)))
    logits = logits[:, len(PROMPT) - 1 : -1].astype(np.float64) / 1.3
    logits[logits <= np.sort(logits, axis=2)[..., :1]] = -np.inf
    weights = np.exp(logits - logits.max(axis=2, keepdims=True))
    chosen = np.take_along_axis(weights / weights.sum(axis=2, keepdims=True), texts[..., None], axis=2)
    return dict(zip(map(tuple, texts.tolist()), chosen[..., 0].prod(axis=1).tolist(), strict=True))


def chi_square(counts: Counter[tuple[int, ...]], known: dict[tuple[int, ...], float]) -> float:
    """Pearson's statistic over its degrees of freedom; texts that are expected less than 5 times are one."""
    total = sum(counts.values())
    common = [text for text in known if known[text] * total >= 5]
    pairs = [(counts[text], known[text] * total) for text in common]
    rest = (total - sum(n for n, _ in pairs), total - sum(e for _, e in pairs))
    return sum((n - e) ** 2 / e for n, e in [*pairs, rest]) / len(common)


def test_samples_have_the_models_distribution_and_not_the_drafts() -> None:
    model, draft = five(0), five(1)
    found = speculate(
        *model, *draft, [PROMPT], max_new_tokens=NEW, ahead=2, sampler=KEPT, key=3, samples=SAMPLES
    )
    counts = Counter(map(tuple, found.generated.rows()))
    assert sum(counts.values()) == SAMPLES
    own, other = probabilities(model), probabilities(draft)
    assert chi_square(counts, own) < 1.5  # 1 is expected; beyond 1.5 lies one of ten thousand
    assert chi_square(counts, other) > 20  # the same count would see the draft's distribution
    assert 0 < found.accepted.mean() < 2


def test_rows_that_fill_a_drafts_vocabulary_change_nothing() -> None:
    draft, params = five(1)
    filled = model_from_config({**CONFIG, "vocab_size": VOCAB + 2})
    rows = jnp.full((2, params["embed"]["embedding"].shape[1]), 9.0)
    more = params | {
        "embed": {"embedding": jnp.concatenate([params["embed"]["embedding"], rows])},
        "unembed": {"kernel": jnp.concatenate([params["unembed"]["kernel"], rows.T], axis=1)},
    }
    options = {"max_new_tokens": NEW, "ahead": 2, "sampler": KEPT, "key": 3, "samples": 8}
    own = speculate(*five(0), draft, params, [PROMPT], **options)
    found = speculate(*five(0), filled, more, [PROMPT], shared=VOCAB, **options)
    np.testing.assert_array_equal(found.generated.tokens, own.generated.tokens)
    np.testing.assert_array_equal(found.accepted, own.accepted)
    # The other way round the model says what the draft cannot: it reads another token there, and is judged.
    few = speculate(filled, more, draft, params, [[*PROMPT, 6]], max_new_tokens=NEW, shared=VOCAB)
    alone = generate(filled, more, [[*PROMPT, 6]], max_new_tokens=NEW)
    np.testing.assert_array_equal(few.generated.tokens, alone.tokens)
    assert alone.tokens.max() >= VOCAB


def test_greedy_tokens_are_those_of_the_model_alone() -> None:
    model, params = tiny("llama")
    draft = jax.tree.map(lambda x: x * 1.02, params)  # often, but not always, of the same opinion
    options = {"max_new_tokens": 10, "sampler": greedy(promote([[5, 9]], 0.5)), "log_probs": True}
    alone = generate(model, params, *pad_prompts(PROMPTS), **options)
    found = speculate(model, params, model, draft, *pad_prompts(PROMPTS), ahead=3, **options)
    np.testing.assert_array_equal(found.generated.tokens, alone.tokens)
    assert found.generated.log_probs is not None and alone.log_probs is not None
    np.testing.assert_allclose(found.generated.log_probs, alone.log_probs, atol=1e-4)
    assert 10 > found.rounds.max() >= 3  # fewer passes than tokens
    own = speculate(model, params, model, params, *pad_prompts(PROMPTS), ahead=3, **options)
    assert own.rounds.tolist() == [3] * 3 and own.accepted.tolist() == [8] * 3
    # Rows end where they would alone, though more was drafted.
    stop = stop_at([alone.rows()[0][2]], [alone.rows()[1][3:5]])
    ended = speculate(model, params, model, draft, *pad_prompts(PROMPTS), ahead=3, stop=stop, **options)
    expected = generate(model, params, *pad_prompts(PROMPTS), stop=stop, **options)
    np.testing.assert_array_equal(ended.generated.tokens, expected.tokens)
    np.testing.assert_array_equal(ended.generated.finished, expected.finished)


@pytest.mark.slow
def test_a_row_is_drawn_as_it_would_be_alone() -> None:
    model, params = tiny("llama")
    draft = jax.tree.map(lambda x: x * 0.9, params)
    keys, options = row_keys(7, 3), {"max_new_tokens": 10, "ahead": 3, "sampler": sample(Temperature(1.5))}
    together = speculate(model, params, model, draft, *pad_prompts(PROMPTS), key=keys, **options)
    alone = speculate(model, params, model, draft, [PROMPTS[1]], key=keys[1:2], **options)
    assert alone.generated.rows() == together.generated.rows()[1:2]


def test_what_a_draft_must_be() -> None:
    with pytest.raises(DecodingError, match=r"vocabulary of 61 tokens and the model one of 5; .*own\.$"):
        speculate(*five(0), *tiny("llama"), [[1]], max_new_tokens=2)
    with pytest.raises(DecodingError, match=r"shared\) was given 6, but needs 1 to 5"):
        speculate(*five(0), *tiny("llama"), [[1]], max_new_tokens=2, shared=6)
    with pytest.raises(DecodingError, match=r"ahead\) was given 0"):
        speculate(*five(0), *five(1), [[1]], max_new_tokens=2, ahead=0)
