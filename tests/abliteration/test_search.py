"""The search reports refusal, KL and loss of every trial truly, finds what is better, and repeats itself."""

from __future__ import annotations

from dataclasses import asdict

import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.abliteration.ablation import Ablation, Space
from mergelab.abliteration.behavior import measure_behavior, text_loss, text_windows
from mergelab.abliteration.directions import Directions
from mergelab.abliteration.removal import ablate, abliterate_params
from mergelab.abliteration.trial_search import search_ablation
from mergelab.abliteration.trials import SearchResult, Trial, frontier
from mergelab.errors import MergelabError
from tests.abliteration.planted import REFUSE, Planted, prompt_set, prompts

HARMFUL, HARMLESS = prompt_set(64, 30, True), prompt_set(64, 31, False)
IDS = np.array([REFUSE], np.int32)


def text() -> list[int]:
    tokens, answers = prompts(8, 32, False)
    return np.concatenate([tokens, answers[:, None]], axis=1).reshape(-1).tolist()


@pytest.fixture(scope="module")
def space(directions: Directions) -> Space:
    return Space.of(directions)


@pytest.fixture(scope="module")
def found(planted: Planted, space: Space) -> SearchResult:
    return search_ablation(
        planted.model,
        planted.params,
        space,
        HARMFUL,
        HARMLESS,
        [REFUSE],
        trials=24,
        rounds=2,
        windows=text_windows(text(), 0, 9),
        batch=64,
        at_once=4,
    )


@pytest.mark.slow
def test_the_best_trial_ends_refusals_at_little_cost(found: SearchResult) -> None:
    assert found.baseline.refusal > 0.95 and found.baseline.kl < 1e-5
    best = found.best(max_kl=0.05)
    assert best.refusal < 0.02 and best.kl <= 0.05 and best in found.trials
    assert len(found.trials) == 24 + 2 * 2 * 11
    assert all(t.loss is not None for t in found.frontier)
    refusals = [trial.refusal for trial in found.frontier]
    assert refusals == sorted(refusals) and best.refusal <= min(
        t.refusal for t in found.trials if t.kl <= 0.05
    )
    with pytest.raises(MergelabError, match="no trial has a KL of at most"):
        found.best(max_kl=-1.0)


def test_figures_are_those_of_the_edited_weights(planted: Planted, space: Space, found: SearchResult) -> None:
    model, params = planted.model, planted.params
    before = measure_behavior(model, params, HARMFUL, HARMLESS, IDS, batch=64)[1]
    windows = text_windows(text(), 0, 9)
    for trial in (found.trials[0], found.trials[5], found.trials[-1]):
        ablation = space.ablation(jnp.asarray(list(trial.parameters.values()), jnp.float32))
        edited = abliterate_params(model, params, ablation)
        after, _ = measure_behavior(
            model, edited, HARMFUL, HARMLESS, IDS, before=before, windows=windows, batch=64
        )
        assert trial.kl == pytest.approx(after.kl, abs=1e-4)
        assert trial.loss == pytest.approx(after.loss, abs=1e-4)
        edit = ablate(model, params, ablation)
        hooked, _ = measure_behavior(
            model, params, HARMFUL, HARMLESS, IDS, edit=edit, before=before, windows=windows, batch=64
        )
        assert asdict(hooked) == pytest.approx(asdict(after), abs=1e-4)
    assert after.harmful_refusals is None
    assert after.loss == pytest.approx(text_loss(model, edited, windows, batch=3), abs=1e-5)


def test_the_same_search_finds_the_same_and_kept_norms_are_searched_as_they_are_written(
    planted: Planted, space: Space
) -> None:
    def run(seed: int) -> list[tuple[float, ...]]:
        result = search_ablation(
            planted.model,
            planted.params,
            space,
            HARMFUL,
            HARMLESS,
            [REFUSE],
            trials=2,
            rounds=0,
            keep_norms="written",
            batch=64,
            seed=seed,
        )
        return [trial.figures for trial in result.trials]

    one = run(0)
    assert run(0) == one and run(1)[1] != one[1] and run(1)[0] == one[0]
    ablation = space.ablation(jnp.asarray(space.plain(), jnp.float32))
    edited = abliterate_params(planted.model, planted.params, ablation, keep_norms="written")
    before = measure_behavior(planted.model, planted.params, HARMFUL, HARMLESS, IDS, batch=64)[1]
    after, _ = measure_behavior(planted.model, edited, HARMFUL, HARMLESS, IDS, before=before, batch=64)
    assert one[0][1] == pytest.approx(after.kl, abs=1e-4)


def test_points_make_ablations(space: Space) -> None:
    plain = space.ablation(jnp.asarray(space.plain(source=2.0), jnp.float32))
    expected = Ablation.everywhere(jnp.asarray(space.directions[2]), 4)
    for mine, theirs in zip(
        (plain.directions, plain.embeddings, plain.attention, plain.mlp),
        (expected.directions, expected.embeddings, expected.attention, expected.mlp),
        strict=True,
    ):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)
    nothing = space.ablation(jnp.asarray(space.nothing(), jnp.float32))
    assert not nothing.attention.any() and not nothing.mlp.any() and not nothing.embeddings
    drawn = space.draw(50, 0)
    assert (drawn >= space.low).all() and (drawn <= space.high).all()
    stack = space.ablation(jnp.asarray(drawn, jnp.float32))
    lengths = np.linalg.norm(stack.directions, axis=-1)
    assert np.all((np.abs(lengths - 1) < 1e-5) | (lengths == 0))
    point = dict(zip(space.names, space.plain(source=1.5), strict=True)) | {"own": 1.0}
    own = space.ablation(jnp.asarray(list(point.values()), jnp.float32))
    np.testing.assert_allclose(own.directions[1:], space.directions, atol=1e-6)
    halfway = space.directions[1] + space.directions[2]
    np.testing.assert_allclose(own.directions[0], halfway / np.linalg.norm(halfway), atol=1e-6)


def test_the_frontier_is_what_nothing_beats() -> None:
    def trial(*figures: float) -> Trial:
        return Trial({}, figures[0], figures[1], None)

    trials = (trial(0.5, 0.1), trial(0.1, 0.5), trial(0.5, 0.2), trial(0.3, 0.3), trial(0.1, 0.6))
    assert [t.figures for t in frontier(trials)] == [(0.1, 0.5), (0.3, 0.3), (0.5, 0.1)]
