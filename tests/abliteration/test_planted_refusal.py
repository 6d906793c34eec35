"""Removing one direction ends a planted refusal, adding it makes one, and a random direction does neither."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.abliteration.ablation import Ablation
from mergelab.abliteration.behavior import first_token_scores, refusal_score
from mergelab.abliteration.direction_selection import DirectionSelection, Filters, select_direction
from mergelab.abliteration.directions import Directions, find_directions, mean_activations
from mergelab.abliteration.prompts import Prompts
from mergelab.abliteration.removal import ablate, abliterate_params, induce
from mergelab.activations.losses import kl_divergence
from mergelab.errors import EvaluationError, MergelabError
from tests.abliteration.planted import ANSWER, REFUSE, Planted, prompt_set, prompts

HARMFUL, HARMLESS = prompts(256, 10, True), prompts(256, 11, False)


def test_the_refusal_is_there_and_ends(planted: Planted, selection: DirectionSelection) -> None:
    assert planted.shares(*HARMFUL) == (1.0, 0.0)
    assert planted.shares(*HARMLESS) == (0.0, 1.0)
    ablation = Ablation.everywhere(jnp.asarray(selection.direction), 4)
    edited = abliterate_params(planted.model, planted.params, ablation)
    refused, answered = planted.shares_of(edited, *HARMFUL)
    assert refused <= 0.013 and answered > 0.1  # chance is 1 in 96
    assert planted.shares_of(edited, *HARMLESS)[1] >= 0.99


def test_a_random_direction_changes_nothing(planted: Planted) -> None:
    for seed in range(3):
        direction = np.random.default_rng(seed).normal(size=64)
        ablation = Ablation.everywhere(jnp.asarray(direction, jnp.float32), 4)
        edited = abliterate_params(planted.model, planted.params, ablation)
        assert planted.shares_of(edited, *HARMFUL)[0] >= 0.95
        assert planted.shares_of(edited, *HARMLESS)[1] >= 0.95


def test_adding_the_direction_makes_harmless_prompts_refuse(
    planted: Planted, selection: DirectionSelection
) -> None:
    def added(vector: np.ndarray) -> float:
        vectors = np.where(np.arange(4)[:, None] == selection.chosen.layer, vector, np.float32(0))
        return planted.shares(*HARMLESS, edit=induce(jnp.asarray(vectors)))[0]

    assert added(selection.raw) >= 0.95
    random = np.random.default_rng(5).normal(size=64).astype(np.float32)
    assert added(random * np.linalg.norm(selection.raw) / np.linalg.norm(random)) <= 0.5


def test_the_weight_edit_is_the_hook(planted: Planted, selection: DirectionSelection) -> None:
    model, params = planted.model, planted.params
    ablation = Ablation.everywhere(jnp.asarray(selection.direction), 4)
    tokens = prompt_set(64, 3, True)
    edited = abliterate_params(model, params, ablation)
    ids = np.array([REFUSE], np.int32)
    _, _, by_weights = first_token_scores(model, edited, tokens, ids, batch=64)
    nothing = induce(jnp.zeros((4, 64)))  # the sites of the selection's own program
    hooks = ablate(model, params, ablation) | nothing
    _, _, by_hook = first_token_scores(model, params, tokens, ids, edit=hooks, batch=64)
    np.testing.assert_allclose(by_weights, by_hook, atol=1e-4)
    assert np.abs(first_token_scores(model, params, tokens, ids, batch=64)[2] - by_hook).max() > 1.0


def test_the_last_tokens_direction_is_zero_before_block_0_and_nothing_else_is(
    directions: Directions,
) -> None:
    assert directions.valid.tolist() == [[False, True, True, True]] * 2
    assert not directions.raw[:, 0].any() and np.isfinite(directions.unit).all()
    np.testing.assert_allclose(np.linalg.norm(directions.unit[directions.valid], axis=-1), 1, rtol=1e-5)
    orthogonal = replace(directions, orthogonal=True)
    parts = (orthogonal.unit * directions.harmless).sum(-1) / np.linalg.norm(directions.harmless, axis=-1)
    assert np.abs(parts).max() < 1e-5
    plain = (directions.unit * directions.harmless).sum(-1) / np.linalg.norm(directions.harmless, axis=-1)
    assert np.abs(plain).max() > 1e-2


def test_means_are_those_of_the_stream_whatever_the_padding_and_the_batch(planted: Planted) -> None:
    tokens, _ = prompts(3, 20, True)
    rows = [tokens[0].tolist(), tokens[1, 1:].tolist(), tokens[2, 1:].tolist()]
    found = mean_activations(planted.model, planted.params, Prompts.of(rows), positions=2, batch=2)
    read = jax.jit(partial(planted.model.apply, capture=["blocks.*.resid_pre"], logits=False))
    each = [read(planted.params, jnp.asarray([row])).captured for row in rows]
    expected = np.mean([[x[0, -2:] for x in seen.values()] for seen in each], axis=0).transpose(1, 0, 2)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    clipped = mean_activations(
        planted.model, planted.params, Prompts.of(rows[:1]), positions=1, winsorize=0.9
    )
    one = np.stack([x[0, -1:] for x in each[0].values()], axis=1)
    bound = np.quantile(np.abs(one), 0.9, axis=-1, keepdims=True)
    np.testing.assert_allclose(clipped, np.clip(one, -bound, bound), atol=2e-5)
    assert np.abs(clipped - one).max() > 0.1


def test_every_candidate_is_recorded_and_the_filters_decide(
    planted: Planted, directions: Directions, selection: DirectionSelection
) -> None:
    places = [(c.position, c.layer) for c in selection.trace]
    assert places == [(p, layer) for p in (-2, -1) for layer in (1, 2, 3)]
    passing = [c for c in selection.trace if c.rejected is None]
    assert selection.chosen in passing
    assert all(c.kl <= 0.1 and c.induced >= 0 and c.refusal >= selection.chosen.refusal for c in passing)
    assert selection.refusal_before > 4 > -4 > selection.harmless_before
    assert len(selection.to_json()["trace"]) == 6
    sets = prompt_set(64, 3, True), prompt_set(64, 4, False)
    few = select_direction(
        planted.model,
        planted.params,
        directions,
        *sets,
        [REFUSE],
        filters=Filters(max_depth=0.75, max_kl=9),
        batch=64,
    )
    assert max(c.layer for c in few.trace) == 2
    with pytest.raises(EvaluationError, match=r"none of 6 directions passes the filters.*rejected: induced"):
        select_direction(
            planted.model,
            planted.params,
            directions,
            *sets,
            [REFUSE],
            filters=Filters(min_induced=99.0, max_kl=99.0, max_depth=1.0),
            batch=64,
        )


def test_the_kl_filter_rejects_a_direction_that_harmless_answers_need(
    planted: Planted, directions: Directions, selection: DirectionSelection
) -> None:
    # The token after which answers begin: without its embedding there are neither refusals nor answers.
    harmful = directions.harmful.copy()
    needed = np.asarray(planted.params["embed"]["embedding"])[ANSWER]
    harmful[0, 2] = directions.harmless[0, 2] + 10 * needed / np.linalg.norm(needed)
    sets = prompt_set(64, 3, True), prompt_set(64, 4, False)
    damaging = replace(directions, harmful=harmful)
    found = select_direction(
        planted.model, planted.params, damaging, *sets, [REFUSE], filters=Filters(max_depth=1.0), batch=64
    )
    candidate = next(c for c in found.trace if (c.position, c.layer) == (-2, 2))
    assert candidate.kl > 0.5 and candidate.rejected is not None and candidate.rejected.startswith("KL")
    assert found.chosen == selection.chosen


def test_scores_are_log_odds_and_divergences() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 7)).astype(np.float32)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    refusing = p[:, [1, 4]].sum(-1)
    expected = np.log(refusing) - np.log(1 - refusing)
    np.testing.assert_allclose(refusal_score(jnp.asarray(logits), jnp.asarray([1, 4])), expected, rtol=1e-5)
    q = np.roll(p, 1, axis=0)
    found = kl_divergence(jnp.asarray(logits), jnp.asarray(np.roll(logits, 1, axis=0)))
    np.testing.assert_allclose(found, (p * np.log(p / q)).sum(-1), rtol=1e-5)


def test_faults_are_named(planted: Planted, directions: Directions) -> None:
    model, params = planted.model, planted.params
    short = Prompts.of([[1, 2], [1]])
    with pytest.raises(MergelabError, match="shortest prompt has 1"):
        find_directions(model, params, short, short, positions=2)
    for positions in (1, 2):  # the first token of a prompt is a sink of attention, and no part of a mean
        longer = Prompts.of([[1, 2, 3], [1, 2][:positions]])
        with pytest.raises(MergelabError, match=rf"shortest prompt has {positions}, of which the first"):
            mean_activations(model, params, longer, positions=positions)
    with pytest.raises(MergelabError, match="winsorize is 2"):
        mean_activations(model, params, Prompts.of([[1, 2]]), winsorize=2.0)
    with pytest.raises(MergelabError, match="some, but not all, of the ids below 96"):
        select_direction(model, params, directions, short, short, [96])
    with pytest.raises(MergelabError, match="find them with this model"):
        select_direction(
            model, params, Directions(np.zeros((1, 3, 64)), np.ones((1, 3, 64))), short, short, [REFUSE]
        )
