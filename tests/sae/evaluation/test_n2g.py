"""N2G finds planted patterns, matches them where they are, and explains a trained SAE's latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.activations.model_activations import ModelActivations
from mergelab.sae.evaluation.explanation_loss import score_explanations
from mergelab.sae.features.explanations import LatentExplanation, Pattern, judge_explanation
from mergelab.sae.features.n2g import AlteredText, explain, find_patterns, match_explanations
from mergelab.sae.features.survey import Example, survey
from mergelab.sae.sae import SAE, SAEConfig
from tests.sae.evaluation.tiny_encoder import Encoder
from tests.sae.evaluation.trained_model import LENGTH, SubjectModel


def test_the_longest_pattern_that_matches_counts() -> None:
    explanation = LatentExplanation(
        0, (Pattern((7,), 1.0), Pattern((3, None, 7), 5.0), Pattern((4, None, 7), 4.0), Pattern((9, 7), 2.0))
    )
    np.testing.assert_array_equal(explanation.simulate([7, 3, 9, 7, 8, 9, 7]), [1, 0, 0, 5, 0, 0, 2])
    np.testing.assert_array_equal(explanation.simulate([3, 4, 1, 7, 7]), [0, 0, 0, 4, 1])
    np.testing.assert_array_equal(LatentExplanation(0, ()).simulate([7, 7]), [0, 0])


def test_precision_and_recall() -> None:
    match = judge_explanation(np.array([[1, 1, 0, 2.0]]), np.array([[3, 0, 1, 0.5]]))
    assert (match.precision, match.recall, match.active) == (2 / 3, 2 / 3, 3)
    none = judge_explanation(np.zeros(3), np.zeros(3))
    assert np.isnan(none.precision) and np.isnan(none.recall)


def _token_latents(source: ModelActivations, tokens: list[int]) -> SAE:
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
    return SAE(*arrays, config=SAEConfig(activation="relu")).checked()


def test_a_token_detector_is_explained_by_its_token(subject: SubjectModel) -> None:
    source = replace(subject.source, sites=("embed",))
    counted = (np.arange(LENGTH)[None] > 0) & ~np.isin(source.tokens, source.special_ids)
    counts = np.bincount(source.tokens[counted], minlength=384)
    common = np.argsort(-counts)[:20]
    sae = _token_latents(source, common.tolist())
    found = survey(sae, source, count=3)
    working = [i for i in range(20) if found.density[i] == counts[common[i]] / counted.sum()]
    assert len(working) >= 5  # of some tokens a longer embedding hides the direction
    examples = {i: found.examples[i] for i in working}
    explained = explain(sae, source, examples, mask_token=383)
    for latent, explanation in explained.items():
        assert [pattern.tokens for pattern in explanation.patterns] == [(int(common[latent]),)]
        assert explanation.patterns[0].activation == pytest.approx(found.peak[latent], rel=1e-4)
    score = score_explanations(sae, source, list(explained.values()))
    assert score.precision == score.recall == 1
    effect = abs(score.ce_ablated - score.ce)
    assert score.recovered == pytest.approx(1, abs=0.01) and effect > 1e-4
    wrong = [replace(e, latent=working[(i + 1) % len(working)]) for i, e in enumerate(explained.values())]
    bad = score_explanations(sae, source, wrong)
    assert bad.precision == bad.recall == 0 and abs(bad.delta_ce) > 0.3 * effect


def _rule(variants: Sequence[AlteredText]) -> np.ndarray:
    """A latent that is active on 7, twice as much if 3 follows two tokens later, and not at all after 9."""
    found = []
    for variant in variants:
        before, here, after = np.split(np.array(variant.tokens), [variant.at, variant.at + 1])
        value = 2.0 if len(after) > 1 and after[1] == 3 else 0.4
        found.append(value if here == 7 and 9 not in before[-1:] else 0.0)
    return np.array(found, np.float32)


def _example(tokens: Sequence[int], at: int) -> Example:
    return Example(0, tuple(tokens), tuple(float(i == at) for i in range(len(tokens))))


def test_an_encoders_patterns_reach_beyond_the_active_token() -> None:
    examples = {4: [_example([1, 5, 7, 8, 3, 6, 2], 2)]}
    found = find_patterns(examples, _rule, mask_token=0, causal=False, framed=True)
    assert found[4].patterns == (Pattern((7,), 2.0, (None, 3)),)
    np.testing.assert_array_equal(found[4].simulate([7, 4, 3, 7, 7, 3]), [2, 0, 0, 2, 0, 0])
    causal = find_patterns(examples, _rule, mask_token=0)
    assert causal[4].patterns == (Pattern((7,), np.float32(0.4)),)


def test_a_frame_stays_and_may_be_what_is_active() -> None:
    seen: list[AlteredText] = []

    def first(variants: Sequence[AlteredText]) -> np.ndarray:
        """Active on the frame's first token where an 8 is anywhere."""
        seen.extend(variants)
        return np.array([float(v.at == 0 and 8 in v.tokens) for v in variants], np.float32)

    found = find_patterns({0: [_example([1, 5, 8, 6, 2], 0)]}, first, mask_token=0, causal=False, framed=True)
    assert all(variant.tokens[0] in (1, 0) and variant.tokens[-1] == 2 for variant in seen)
    assert found[0].patterns == (Pattern((None,), 1.0, (None, 8)),)

    def last(variants: Sequence[AlteredText]) -> np.ndarray:
        return np.array([float(v.at == len(v.tokens) - 1 and 5 in v.tokens) for v in variants], np.float32)

    found = find_patterns({0: [_example([1, 5, 8, 6, 2], 4)]}, last, mask_token=0, causal=False, framed=True)
    assert found[0].patterns == (Pattern((5, None, None, None), 1.0),)


def test_an_encoders_latents_are_explained_and_judged(encoder: Encoder) -> None:
    source = replace(encoder.source, tokens=encoder.source.tokens[:12])
    found = survey(encoder.sae, source, count=2)
    chosen = [int(i) for i in np.argsort(-found.density) if found.density[i] < 0.1][:4]
    explained = explain(
        encoder.sae, source, {i: found.examples[i] for i in chosen}, mask_token=encoder.mask_id
    )
    for latent, explanation in explained.items():
        for example in found.examples[latent]:
            assert explanation.simulate(example.tokens)[int(np.argmax(example.codes))] > 0
    matches = match_explanations(encoder.sae, source, list(explained.values()))
    again = match_explanations(encoder.sae, replace(source, batch=5), list(explained.values()))
    assert matches == again and all(match.recall > 0 for match in matches)
    rows = np.asarray(encoder.sae.encode(jnp.asarray(source.read_sites(0, source.rows)[0])))
    counted = ~np.isin(source.tokens, source.special_ids).reshape(-1)  # [CLS], [SEP] and unknown words
    assert not counted.all()
    assert [match.active for match in matches] == (rows[counted][:, chosen] > 0).sum(axis=0).tolist()


def test_a_trained_saes_latents(subject: SubjectModel) -> None:
    train = replace(subject.source, tokens=subject.source.tokens[:24], batch=64)
    test = replace(subject.source, tokens=subject.source.tokens[24:])
    found = survey(subject.sae, train, count=4)
    frequent = [int(i) for i in np.argsort(-found.density) if found.density[i] < 0.1][:6]
    explained = explain(subject.sae, train, {i: found.examples[i] for i in frequent}, mask_token=0)
    for latent, explanation in explained.items():
        assert 1 <= len(explanation.patterns) <= 4
        for pattern in explanation.patterns:
            assert pattern.activation <= found.peak[latent] * 1.001
    # Each example is matched by the pattern made of it, at its strongest token.
    for latent in frequent:
        for example in found.examples[latent]:
            assert explained[latent].simulate(example.tokens)[int(np.argmax(example.codes))] > 0
    score = score_explanations(subject.sae, test, list(explained.values()))
    assert 0 < score.precision <= 1 and 0 < score.recall <= 1
    assert score.tokens == test.tokens.shape[0] * 31
    matches = match_explanations(subject.sae, test, list(explained.values()))
    np.testing.assert_equal([vars(match) for match in matches], [vars(match) for match in score.matches])
