"""Matching finds permuted features, splits their children; absorption and sparsity are seen where planted."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.errors import SAEError
from mergelab.sae.evaluation.absorption import absorption
from mergelab.sae.evaluation.progressive import (
    progressive_recovery,
    recall_against_sparsity,
    with_threshold,
    with_top_k,
)
from mergelab.sae.features import matching
from mergelab.sae.features.matching import feature_splits, match_features, shared_features
from mergelab.sae.sae import SAE, SAEConfig

RNG = np.random.default_rng(0)


def _sae(rows: np.ndarray, k: int | None = None) -> SAE:
    config = SAEConfig("topk", k=k) if k else SAEConfig("relu")
    arrays = (rows.T, np.zeros(len(rows)), rows, np.zeros(rows.shape[1]))
    return SAE(*(jnp.asarray(a, jnp.float32) for a in arrays), config=config).checked()


def _directions(n: int, d: int) -> np.ndarray:
    rows = np.random.default_rng(n).standard_normal((n, d))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_the_opposite_direction_is_the_same_latent_where_codes_are_signed() -> None:
    rows = _directions(30, 24)
    turned = rows[::-1] * np.where(np.arange(30) % 2, -1, 1)[:, None]
    plain, other = _sae(rows, 3), _sae(turned, 3)
    assert shared_features(plain, other).shared == pytest.approx(0.5, abs=0.1)
    signed = [replace(sae, config=SAEConfig("abs_topk", k=3)) for sae in (plain, other)]
    assert shared_features(*signed).shared == 1.0
    assert match_features(*signed).latent.tolist() == list(range(29, -1, -1))
    assert shared_features(signed[0], other).shared == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("exact", [4096, 8])
def test_a_permutation_is_undone(exact: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "_EXACT", exact)  # 8: the greedy rule of large SAEs
    rows = _directions(60, 24)
    order = RNG.permutation(60)
    found = match_features(_sae(rows), _sae(3 * rows[order]))
    np.testing.assert_array_equal(order[found.latent], np.arange(60))
    np.testing.assert_allclose(found.cosine, 1, atol=1e-5)
    fewer = match_features(_sae(rows), _sae(rows[:10]))
    assert (fewer.latent >= 0).sum() == 10 and set(fewer.latent[:10]) <= set(range(10))
    strangers = shared_features(_sae(rows), _sae(_directions(61, 24)))
    assert strangers.shared < 0.2 < 0.99 < shared_features(_sae(rows), _sae(rows)).shared


def test_one_to_one_is_the_best_assignment() -> None:
    a = np.array([[1.0, 0.0], [0.9, np.sqrt(1 - 0.81)]])
    b = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert match_features(_sae(a), _sae(b), one_to_one=False).latent.tolist() == [0, 0]
    assert match_features(_sae(a), _sae(b)).latent.tolist() == [0, 1]
    with pytest.raises(SAEError, match="2 and 24 wide"):
        match_features(_sae(a), _sae(_directions(5, 24)))


def test_children_of_a_split_feature() -> None:
    parents = np.eye(6)[:4]
    children = np.concatenate(
        [parents[:1] + 0.5 * np.eye(6)[4:5], parents[:1] - 0.4 * np.eye(6)[5:], parents[1:3]]
    )
    found = feature_splits(_sae(parents), _sae(np.concatenate([children, np.eye(6)[4:5]])))
    assert found == {0: [1, 0], 1: [2], 2: [3]}


def test_absorption_is_seen_where_it_was_planted() -> None:
    rng = np.random.default_rng(3)
    rows, eye = 4000, np.eye(16)
    animal = rng.random(rows) < 0.3
    cat = animal & (rng.random(rows) < 0.25)
    noise = np.where(rng.random((rows, 14)) < 0.15, rng.exponential(1.0, (rows, 14)), 0)
    x = np.concatenate([np.stack([animal, cat], axis=1), noise], axis=1).astype(np.float32)
    honest = _sae(eye)
    assert absorption(honest, x, animal).rate == 0
    # The latent of cats writes the animal too, and the latent of animals is silent on cats.
    absorbing = replace(
        honest,
        W_enc=jnp.asarray(eye.astype(np.float32)).at[1, 0].set(-1),
        W_dec=jnp.asarray(eye.astype(np.float32)).at[1, 0].set(1),
    )
    found = absorption(absorbing, x, animal, max_main=1)
    assert found.main == (0,) and found.absorbing == (1,)
    assert found.rate == found.missed == pytest.approx(cat.sum() / animal.sum())
    split = absorption(absorbing, x, animal)
    assert split.main == (0, 1) and split.rate == 0  # two latents together stand for the class


def test_other_sparsities_of_a_trained_sae() -> None:
    rng = np.random.default_rng(4)
    features = _directions(40, 32)
    present = np.argsort(rng.random((500, 40)), axis=1) < 4
    x = ((present * (0.5 + rng.random((500, 40)))) @ features).astype(np.float32)
    shuffled = rng.permutation(40)
    sae = _sae(features[shuffled], k=4)
    points = progressive_recovery(sae, x, ks=[1, 2, 4], thresholds=[0.9, 1e9])
    errors = [point.nmse for point in points]
    assert errors[0] > errors[1] > errors[2] and [point.l0 for point in points[:3]] == [1, 2, 4]
    assert points[4].l0 == 0 and errors[3] < 0.9 * errors[4]
    recall = recall_against_sparsity(sae, x, features, present, [1, 4, 12])
    assert recall[0].recall == pytest.approx(0.25, abs=0.02) and recall[0].precision > 0.95
    assert recall[0].recall < recall[1].recall < recall[2].recall
    assert recall[0].precision > recall[1].precision > recall[2].precision
    strange = recall_against_sparsity(_sae(_directions(41, 32), k=4), x, features, present, [4])
    assert strange[0].recall < 0.6 * recall[1].recall
    np.testing.assert_array_equal(with_top_k(sae, 4).encode(jnp.asarray(x)), sae.encode(jnp.asarray(x)))
    with pytest.raises(SAEError, match="gated"):
        with_threshold(replace(sae, config=SAEConfig("gated")), 1.0)
