"""An SAE from elsewhere meets a model: right site, wrong site, another model, and missing BOS."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.activations.model_activations import ModelActivations
from mergelab.models.families import model_from_config
from mergelab.sae import check_belongs
from mergelab.sae.belonging import warn_where_foreign
from mergelab.sae.sae import SAE, SAEConfig, at_sites

D, LENGTH, BOS = 32, 16, 1
SITE = "blocks.0.mlp.out"
NAMES = ("resid_pre", "attn.out", "resid_mid", "mlp.input", "mlp.out", "resid_post")
SITES = tuple(f"blocks.0.{name}" for name in NAMES)
CONFIG = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": D, "intermediate_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Stored(ModelActivations):
    """A model's activations, computed once; what `change` adds depends on the contexts."""

    arrays: Any = field(default_factory=dict)
    change: Any = None

    def _compute(self, start: int, stop: int) -> tuple[np.ndarray, ...]:
        found = [self.arrays[site][start:stop] for site in self.sites]
        return tuple(found if self.change is None else (self.change(x, self.tokens) for x in found))


@pytest.fixture(scope="module")
def source() -> Stored:
    """A model whose MLP writes a plane of the stream."""
    model = model_from_config(CONFIG)
    params: Any = jax.tree.map(lambda x: 3 * x if x.ndim == 2 else x, model.init(0))
    mlp = params["blocks_0"]["mlp"]
    left, scale, right = np.linalg.svd(np.asarray(mlp["down"]["kernel"]), full_matrices=False)
    plane = jnp.asarray((left[:, :2] * scale[:2]) @ right[:2])
    params["blocks_0"]["mlp"] = {**mlp, "down": {**mlp["down"], "kernel": plane}}
    tokens = np.random.default_rng(0).integers(2, 96, (40, LENGTH)).astype(np.int32)
    real = ModelActivations(model, params, tokens, SITES)
    arrays = dict(zip(SITES, real.read_sites(0, real.rows), strict=True))
    return Stored(model, params, tokens, (SITE,), arrays=arrays)


def _sae(x: np.ndarray) -> SAE:
    """An SAE that is exact where activations lie in the plane of the first two components of `x`."""
    mean = x.mean(axis=0)
    axes = np.linalg.svd(x - mean, full_matrices=False)[2][:2]
    both = jnp.asarray(np.concatenate([axes, -axes]), jnp.float32)
    config = SAEConfig("relu", subtract_b_dec=True, reads=(SITE,), transcoder=False)
    return SAE(both.T, jnp.zeros(4), both, jnp.asarray(mean, jnp.float32), config).checked()


def test_the_right_site_is_quiet(source: Stored) -> None:
    found = check_belongs(_sae(source.arrays[SITE]), source)
    assert found.nmse < 1e-6 and found.tokens == 600 and found.elsewhere == {}
    assert found.warning() is None
    warn_where_foreign(_sae(source.arrays[SITE]), source)


@pytest.mark.parametrize("wrong", ["blocks.0.resid_post", "blocks.0.attn.out", "blocks.0.resid_mid"])
def test_a_wrong_site_is_told_with_the_right_one(source: Stored, wrong: str) -> None:
    sae = at_sites(_sae(source.arrays[SITE]), wrong)
    found = check_belongs(sae, replace(source, sites=(wrong,)))
    assert found.nmse > 0.4 and found.best() == SITE and found.elsewhere[SITE] < 1e-6
    assert {*found.elsewhere} >= {*SITES} - {wrong}
    with pytest.warns(UserWarning, match=rf"NMSE of {found.nmse:.2f} at {wrong} .* but 0.00 at {SITE}: name"):
        warn_where_foreign(sae, replace(source, sites=(wrong,)))


def test_the_blocks_beside_are_tried(source: Stored) -> None:
    """Libraries count blocks from 0, from 1, or from the embeddings."""
    model = model_from_config({**CONFIG, "num_hidden_layers": 3})
    rng, sites = np.random.default_rng(0), [f"blocks.{n}.{name}" for n in range(3) for name in NAMES]
    arrays = {site: rng.standard_normal((640, D)).astype(np.float32) for site in sites}
    arrays["blocks.2.mlp.out"] = source.arrays[SITE]
    beside = Stored(model, None, source.tokens, ("blocks.1.mlp.out",), arrays=arrays)
    found = check_belongs(at_sites(_sae(source.arrays[SITE]), "blocks.1.mlp.out"), beside)
    assert found.best() == "blocks.2.mlp.out" and "name that site" in str(found.warning())


def test_another_model_is_told(source: Stored) -> None:
    other = np.random.default_rng(5).standard_normal((640, D)) * np.linspace(3, 1, D)
    found = check_belongs(_sae(other), source)
    assert found.best() is None and found.nmse > 0.9
    said = found.warning()
    assert said is not None and "another model or site" in said and f"{found.nmse:.2f}" in said


def test_sinks_do_not_hide_the_error_of_other_tokens(source: Stored) -> None:
    """One token in each context is a thousand times as long, and lies where the SAE reconstructs it."""
    other = np.random.default_rng(5).standard_normal((640, D))
    wrong = _sae(other)
    direction = 1000 * np.asarray(wrong.W_dec[0])
    first = np.arange(640)[:, None] % LENGTH == 3
    sunk = replace(source, change=lambda x, tokens: np.where(first[: len(x)], direction, x))
    with_sinks, without = check_belongs(wrong, sunk), check_belongs(wrong, source)
    assert with_sinks.tokens == 560 and with_sinks.nmse == pytest.approx(without.nmse, rel=0.05)


def test_missing_bos_and_centered_weights_are_told(source: Stored) -> None:
    noise = np.random.default_rng(7).standard_normal((640, D)).astype(np.float32)

    def lost(x: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return x if (tokens[:, 0] == BOS).all() else x + 40 * noise[: len(x)]

    sae = _sae(source.arrays[SITE])
    found = check_belongs(sae, replace(source, change=lost), bos=lambda: BOS)
    assert found.nmse > 0.5 and "begin with it" in str(found.warning()), found
    begun = np.concatenate([np.full_like(source.tokens[:, :1], BOS), source.tokens[:, :-1]], axis=1)
    assert check_belongs(sae, replace(source, tokens=begun, change=lost), bos=lambda: BOS).warning() is None
    assert "another model" in str(check_belongs(sae, replace(source, change=lost)).warning())

    def uneven(x: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return x + 20 * noise[: len(x), :1]  # the same for all coordinates of a token

    centered = source.arrays["blocks.0.resid_post"]
    centered = centered - centered.mean(axis=1, keepdims=True)
    wide = np.linalg.svd(centered - centered.mean(axis=0), full_matrices=False)[2][:24]
    both = jnp.asarray(np.concatenate([wide, -wide]), jnp.float32)
    mean = jnp.asarray(centered.mean(axis=0), jnp.float32)
    config = SAEConfig("relu", subtract_b_dec=True, transcoder=False)
    sae = SAE(both.T, jnp.zeros(48), both, mean, config).checked()
    found = check_belongs(sae, replace(source, sites=("blocks.0.resid_post",), change=uneven))
    assert "centered weights" in str(found.warning()), found


def test_a_transcoder_is_tried_on_what_it_writes(source: Stored) -> None:
    read = "blocks.0.mlp.input"
    both = replace(source, sites=(read, SITE))
    x, y = source.arrays[read], source.arrays[SITE]
    skip = np.linalg.lstsq(x - x.mean(axis=0), y - y.mean(axis=0), rcond=None)[0]
    config = SAEConfig("relu", reads=(read,), writes=(SITE,))
    bias = jnp.asarray(y.mean(axis=0) - x.mean(axis=0) @ skip)
    arrays = (jnp.zeros((D, 4)), jnp.zeros(4), jnp.zeros((4, D)), bias)
    linear = SAE(*arrays, config=config, W_skip=jnp.asarray(skip)).checked()
    right = check_belongs(linear, both).nmse
    found = check_belongs(linear, replace(both, sites=("blocks.0.resid_pre", SITE)))
    assert right < 0.9 < found.nmse and found.warning() is not None
    assert found.elsewhere[read] == pytest.approx(right, rel=1e-3) and SITE not in found.elsewhere
