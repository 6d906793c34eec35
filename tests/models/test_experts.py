"""Mixtures of experts: products with the chosen experts alone are those of the plain form, on a mesh too."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mergelab.models.layers.experts import chosen_experts, every_expert
from mergelab.models.layers.grouped import in_blocks, rows_of_a_block
from mergelab.models.layers.routing import Experts, choose, spread
from mergelab.sharding import make_mesh

SPEC = Experts(8, 3, 10, bias=True, limit=1.0)
BATCH, LENGTH, WIDTH = 4, 6, 12


def drawn(spec: Experts = SPEC) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    shapes = {"gate": (WIDTH, spec.hidden), "up": (WIDTH, spec.hidden), "down": (spec.hidden, WIDTH)}
    kernels = {name: rng.normal(0, 0.4, (spec.count, *shape)) for name, shape in shapes.items()}
    kernels |= {f"{name}_bias": rng.normal(0, 1, (spec.count, shape[1])) for name, shape in shapes.items()}
    x, logits = rng.normal(0, 1, (BATCH, LENGTH, WIDTH)), rng.normal(0, 2, (BATCH, LENGTH, spec.count))
    logits[..., 5] = -50  # an expert that no token chooses
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (x, kernels, logits))


def plain(x: Any, kernels: Any, logits: Any, spec: Experts = SPEC) -> jax.Array:
    return every_expert(x, kernels, spread(*choose(logits, spec), spec.count), spec)


def sparse(x: Any, kernels: Any, logits: Any, spec: Experts = SPEC) -> jax.Array:
    return chosen_experts(x, kernels, *choose(logits, spec), spec)


@pytest.fixture(scope="module")
def found() -> tuple[Any, Any]:
    """Values and gradients of a sum of squares, of both forms."""

    def both(function: Any) -> Any:
        loss = lambda *arguments: (jnp.square(y := function(*arguments)).sum(), y)  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*drawn())

    return both(plain), both(sparse)


def test_chosen_experts_give_what_all_give(found: tuple[Any, Any]) -> None:
    ((_, expected), gradients), ((_, values), ours) = found
    np.testing.assert_allclose(values, expected, rtol=0, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4), ours, gradients)
    assert np.abs(expected).max() > 1
    assert not np.asarray(ours[1]["gate"][5]).any() and np.asarray(ours[1]["gate"][4]).any()
    # Control: with experts exchanged they differ.
    x, kernels, logits = drawn()
    turned = jax.jit(sparse)(x, jax.tree.map(lambda k: jnp.roll(k, 1, axis=0), kernels), logits)
    assert np.abs(np.asarray(turned - expected)).max() > 0.1


@pytest.mark.parametrize(("axis", "devices", "place"), [("expert", 4, 0), ("tensor", 4, 0), ("tensor", 5, 2)])
def test_on_a_mesh_each_device_computes_its_own_experts(
    found: tuple[Any, Any], axis: str, devices: int, place: int
) -> None:
    mesh = make_mesh({"data": 8 // devices, axis: devices}, devices=jax.devices()[: 8 // devices * devices])
    x, kernels, logits = drawn()
    spec = PartitionSpec(*[None] * place, axis)  # five devices divide the ten neurons of each expert
    split = {
        name: jax.device_put(
            k, NamedSharding(mesh, spec if name in ("gate", "up") or not place else PartitionSpec())
        )
        for name, k in kernels.items()
    }
    run = jax.jit(sparse)
    np.testing.assert_allclose(run(x, split, logits), found[0][0][1], rtol=0, atol=2e-5)
    text = run.lower(x, split, logits).compile().as_text() or ""
    # No device gathers experts of another (logits are, to be sorted); what they make of tokens is summed.
    gathered = re.findall(r"= (\S+) all-gather", text)
    assert all(shape.startswith("f32[4,6,8]") for shape in gathered) and "all-reduce" in text


def test_each_choice_has_a_row_of_its_experts_block() -> None:
    rng = np.random.default_rng(1)
    for count, experts, rows in ((17, 5, 4), (1, 5, 1), (40, 3, 8)):
        indices = np.stack([rng.permutation(experts + 1)[:2] for _ in range(count)]).astype(np.int32)
        blocks = jax.jit(in_blocks, static_argnums=(1, 2))(indices, experts, rows)
        tokens, places = np.asarray(blocks.tokens).reshape(-1), np.asarray(blocks.places)
        owner = np.repeat(np.asarray(blocks.owner), rows)
        here = indices < experts
        assert (places[~here] == tokens.size).all()
        assert (tokens[places[here]] == np.nonzero(here)[0]).all()
        assert (owner[places[here]] == indices[here]).all()
        assert len(set(places[here])) == here.sum() == (tokens < count).sum()
        assert (places[here] // rows < int(blocks.used)).all()
    assert [rows_of_a_block(n, 64) for n in (8, 512, 4096, 10**6)] == [1, 4, 32, 128]


@pytest.mark.parametrize("groups", [1, 4])
def test_sigmoids_choose_by_their_corrected_scores_within_the_best_groups(groups: int) -> None:
    spec = replace(
        SPEC, scoring="sigmoid", groups=groups, chosen_groups=max(groups // 2, 1), weight_scale=2.5
    )
    logits = drawn()[2]
    correction = jnp.asarray(np.random.default_rng(2).normal(0, 0.5, 8), jnp.float32)
    weights, indices = map(np.asarray, choose(logits, spec, correction))
    scores = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    ranked = scores + np.asarray(correction)
    for token in np.ndindex(BATCH, LENGTH):
        pairs = np.sort(ranked[token].reshape(groups, -1), axis=-1)[:, -2:].sum(-1)
        best = np.argsort(-pairs)[: spec.chosen_groups]
        allowed = np.repeat(np.isin(np.arange(groups), best), 8 // groups)
        expected = np.argsort(-np.where(allowed, ranked[token], -np.inf))[:3]
        assert set(indices[token]) == set(expected)
        own = scores[token][indices[token]]
        np.testing.assert_allclose(weights[token], 2.5 * own / own.sum(), rtol=1e-4)
