"""N2G finds planted patterns, matches them where they are, and explains a trained dictionary's latents."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.sae.dictionary import Dictionary, DictionaryConfig
from mergelab.sae.evaluation.examples import survey
from mergelab.sae.evaluation.explanation_loss import score_explanations
from mergelab.sae.evaluation.n2g import Explanation, Pattern, explain, judge_explanation
from mergelab.sae.model_source import ModelActivations
from tests.sae.evaluation.trained_host import Host


def test_the_longest_pattern_that_matches_counts() -> None:
    explanation = Explanation(
        0, (Pattern((7,), 1.0), Pattern((3, None, 7), 5.0), Pattern((4, None, 7), 4.0), Pattern((9, 7), 2.0))
    )
    np.testing.assert_array_equal(explanation.simulate([7, 3, 9, 7, 8, 9, 7]), [1, 0, 0, 5, 0, 0, 2])
    np.testing.assert_array_equal(explanation.simulate([3, 4, 1, 7, 7]), [0, 0, 0, 4, 1])
    np.testing.assert_array_equal(Explanation(0, ()).simulate([7, 7]), [0, 0])


def test_precision_and_recall() -> None:
    match = judge_explanation(np.array([[1, 1, 0, 2.0]]), np.array([[3, 0, 1, 0.5]]))
    assert (match.precision, match.recall, match.active) == (2 / 3, 2 / 3, 3)
    none = judge_explanation(np.zeros(3), np.zeros(3))
    assert np.isnan(none.precision) and np.isnan(none.recall)


def _token_latents(source: ModelActivations, tokens: list[int]) -> Dictionary:
    """Latents at the embedding, each active on one token alone."""
    table = np.asarray(source.params["embed"]["embedding"], np.float64)
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    rows = unit[tokens].T
    others = unit @ rows
    others[tokens, range(len(tokens))] = -1
    size = np.linalg.norm(table, axis=1)
    # Above what any other token of any length gives.
    bias = -(others * size[:, None]).max(axis=0) - 1e-3
    arrays = [jnp.asarray(part, jnp.float32) for part in (rows, bias, rows.T, np.zeros(table.shape[1]))]
    return Dictionary(*arrays, config=DictionaryConfig(activation="relu")).checked()


def test_a_token_detector_is_explained_by_its_token(host: Host) -> None:
    source = replace(host.source, sites=("embed",))
    counts = np.bincount(source.tokens.ravel(), minlength=384)
    common = np.argsort(-counts)[:20]
    dictionary = _token_latents(source, common.tolist())
    found = survey(dictionary, source, count=3)
    working = [i for i in range(20) if found.density[i] == counts[common[i]] / source.rows]
    assert len(working) >= 5  # of some tokens a longer embedding hides the direction
    examples = {i: found.examples[i] for i in working}
    explained = explain(dictionary, source, examples, mask_token=383)
    for latent, explanation in explained.items():
        assert [pattern.tokens for pattern in explanation.patterns] == [(int(common[latent]),)]
        assert explanation.patterns[0].activation == pytest.approx(found.peak[latent], rel=1e-4)
    score = score_explanations(dictionary, source, list(explained.values()))
    assert score.precision == score.recall == 1
    effect = abs(score.ce_ablated - score.ce)
    assert score.recovered == pytest.approx(1, abs=0.01) and effect > 1e-4
    wrong = [replace(e, latent=working[(i + 1) % len(working)]) for i, e in enumerate(explained.values())]
    bad = score_explanations(dictionary, source, wrong)
    assert bad.precision == bad.recall == 0 and abs(bad.delta_ce) > 0.3 * effect


def test_a_trained_dictionarys_latents(host: Host) -> None:
    train = replace(host.source, tokens=host.source.tokens[:24], batch=64)
    test = replace(host.source, tokens=host.source.tokens[24:])
    found = survey(host.dictionary, train, count=4)
    frequent = [int(i) for i in np.argsort(-found.density) if found.density[i] < 0.1][:6]
    explained = explain(host.dictionary, train, {i: found.examples[i] for i in frequent}, mask_token=0)
    for latent, explanation in explained.items():
        assert 1 <= len(explanation.patterns) <= 4
        for pattern in explanation.patterns:
            assert pattern.activation <= found.peak[latent] * 1.001
    # Each example is matched by the pattern made of it, at its strongest token.
    for latent in frequent:
        for example in found.examples[latent]:
            assert explained[latent].simulate(example.tokens)[int(np.argmax(example.codes))] > 0
    score = score_explanations(host.dictionary, test, list(explained.values()))
    assert 0 < score.precision <= 1 and 0 < score.recall <= 1
    assert score.tokens == test.tokens.shape[0] * 31
