"""Taking a direction out of the weights is taking it out of what is written while the model runs."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.abliteration.ablation import Ablation, LayerKernel
from mergelab.abliteration.removal import ablate, abliterate_params, induce, orthogonalize
from mergelab.errors import MergelabError
from mergelab.interp.vectors import unit
from mergelab.models.families import model_from_config
from mergelab.models.model import Model, Output, Params
from mergelab.models.residual_stream import writers
from mergelab.models.table import get_leaf
from tests.models.tiny_models import CONFIGS, MASK, TOKENS, tiny

FAMILIES = ("llama", "gpt2", "gpt_neox", "gemma2", "mixtral", "qwen3")


def random_ablation(model: Model, seed: int = 0) -> Ablation:
    """Another direction and another share for every layer and component."""
    layers, width = model.config.n_layers, model.config.d_model
    rng = np.random.default_rng(seed)
    directions = unit(jnp.asarray(rng.normal(size=(layers + 1, width)), jnp.float32))
    shares = jnp.asarray(rng.uniform(0.3, 1.2, (2, layers)), jnp.float32)
    return Ablation(directions, jnp.float32(0.0 if model.config.tied else 0.9), shares[0], shares[1])


@partial(jax.jit, static_argnames=("model", "capture"))
def run(model: Model, params: Params, edit: Any = None, capture: tuple[str, ...] = ()) -> Output:
    return model.apply(params, jnp.asarray(TOKENS), mask=jnp.asarray(MASK), capture=capture, edit=edit)


def logits(model: Model, params: Params, edit: Any = None) -> np.ndarray:
    return np.where(MASK[..., None], np.asarray(run(model, params, edit).logits), 0.0)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_weight_edit_is_the_runtime_edit(name: str) -> None:
    model, params = tiny(name)
    ablation = random_ablation(model)
    by_weights = logits(model, abliterate_params(model, params, ablation))
    at_runtime = logits(model, params, edit=ablate(model, params, ablation))
    np.testing.assert_allclose(by_weights, at_runtime, atol=1e-4)
    other = random_ablation(model, seed=1)
    assert np.abs(logits(model, abliterate_params(model, params, other)) - at_runtime).max() > 1e-2
    assert np.abs(logits(model, params) - at_runtime).max() > 1e-2


@pytest.mark.parametrize("name", ("llama", "gpt2", "gemma2", "mixtral"))
def test_nothing_along_the_direction_reaches_the_stream(name: str) -> None:
    model, params = tiny(name)
    direction = np.random.default_rng(2).normal(size=model.config.d_model)
    ablation = Ablation.everywhere(jnp.asarray(direction, jnp.float32), model.config.n_layers)
    capture = ("embed", "blocks.*.attn.out", "blocks.*.mlp.out", "blocks.*.resid_post")
    r = np.asarray(ablation.directions[0])

    def part(params: Params) -> list[float]:
        seen = run(model, params, capture=capture).captured
        return [float(np.abs(np.asarray(x) @ r).max()) for x in seen.values()]

    assert min(part(params)) > 1e-2
    assert max(part(abliterate_params(model, params, ablation))) < 1e-4


def test_a_tied_output_embedding_loses_the_direction_too() -> None:
    model, params = tiny("gpt2")
    ablation = Ablation.everywhere(jnp.arange(24, dtype=jnp.float32) - 9.0, model.config.n_layers)
    r = np.asarray(ablation.directions[0])
    found = run(model, params, ablate(model, params, ablation))
    edited = run(model, abliterate_params(model, params, ablation))
    assert found.hidden is not None and found.logits is not None and edited.logits is not None
    rest = (np.asarray(found.hidden) @ r)[..., None] * (np.asarray(params["embed"]["embedding"]) @ r)
    assert np.abs(rest).max() > 1e-2
    np.testing.assert_allclose(edited.logits, np.asarray(found.logits) - rest, atol=1e-4)


def test_writers_are_the_parameters_that_write() -> None:
    def names(config: str) -> set[str]:
        return {writer.leaf.name for writer in writers(model_from_config(CONFIGS[config]))}

    block = {f"blocks_{i}.{part}" for i in range(2) for part in ("attn.o.kernel", "mlp.down.kernel")}
    assert names("llama") == {"embed.embedding"} | block
    biases = {f"blocks_{i}.{part}" for i in range(2) for part in ("attn.o.bias", "mlp.down.bias")}
    assert names("gpt2") == {"embed.embedding", "positions.embedding"} | block | biases
    experts = {f"blocks_{i}.{part}" for i in range(2) for part in ("attn.o.kernel", "mlp.down")}
    assert names("mixtral") == {"embed.embedding"} | experts
    assert all(w.gain for w in writers(model_from_config(CONFIGS["gemma2"])) if w.layer is not None)


def test_encoders_and_other_widths_are_refused() -> None:
    with pytest.raises(MergelabError, match="'bert' model is an encoder"):
        writers(model_from_config(CONFIGS["bert"]))
    model, params = tiny("llama")
    with pytest.raises(MergelabError, match=r"expected \[3, 24\]"):
        abliterate_params(model, params, Ablation.everywhere(jnp.ones(23), 2))


def test_kept_norms_are_exact_and_say_what_they_cost() -> None:
    rng = np.random.default_rng(3)
    kernel, bias = jnp.asarray(rng.normal(size=(40, 24)), jnp.float32), jnp.asarray(rng.normal(size=24))
    r = unit(jnp.asarray(rng.normal(size=24), jnp.float32))
    plain = orthogonalize(kernel, r)
    written = orthogonalize(kernel, r, keep_norms="written")
    coordinate = orthogonalize(kernel, r, keep_norms="coordinate")
    np.testing.assert_allclose(jnp.linalg.norm(written, axis=1), jnp.linalg.norm(kernel, axis=1), rtol=1e-6)
    np.testing.assert_allclose(
        jnp.linalg.norm(coordinate, axis=0), jnp.linalg.norm(kernel, axis=0), rtol=1e-6
    )
    assert np.abs(plain @ r).max() < 1e-5 and np.abs(written @ r).max() < 1e-5
    assert 1e-3 < np.abs(coordinate @ r).max() < 0.5 * np.abs(kernel @ r).max()
    half = orthogonalize(bias.astype(jnp.float32), r, 0.5, keep_norms="written")
    np.testing.assert_allclose(half @ r, 0.5 * bias @ r, atol=1e-5)
    inside = jnp.tensordot(jnp.arange(1.0, 4.0), r, 0)
    np.testing.assert_allclose(orthogonalize(inside, r, keep_norms="written"), 0, atol=1e-6)


def test_the_in_memory_edit_keeps_dtypes_and_shardings() -> None:
    from mergelab.sharding import DEFAULT_RULES, make_mesh, named_sharding

    model, params = tiny("llama")
    mesh = make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    sharded = jax.tree.map(lambda x: x, params)
    for leaf in model.table():
        node: Any = sharded
        for key in leaf.path[:-1]:
            node = node[key]
        sharding = named_sharding(mesh, leaf.shape, leaf.axes, DEFAULT_RULES)
        node[leaf.path[-1]] = jax.device_put(get_leaf(params, leaf).astype(jnp.bfloat16), sharding)
    ablation = random_ablation(model)
    edited = abliterate_params(model, sharded, ablation, keep_norms="written")
    expected = abliterate_params(model, params, ablation, keep_norms="written")
    for leaf in model.table():
        mine = get_leaf(edited, leaf)
        assert mine.dtype == jnp.bfloat16
        assert mine.sharding.is_equivalent_to(get_leaf(sharded, leaf).sharding, mine.ndim)
        np.testing.assert_allclose(mine.astype(jnp.float32), get_leaf(expected, leaf), atol=0.02)


def test_adding_and_kernels() -> None:
    model, params = tiny("llama")
    vectors = jnp.zeros((2, 24)).at[1].set(1.0)
    seen = run(model, params, induce(vectors), capture=("blocks.*.resid_pre",))
    plain = run(model, params, capture=("blocks.*.resid_pre",))
    difference = seen.captured["blocks.1.resid_pre"] - plain.captured["blocks.1.resid_pre"]
    np.testing.assert_allclose(difference, 1.0, atol=1e-5)
    np.testing.assert_array_equal(LayerKernel(1.0, 2.0, 0.5, 2.0).weights(6), [0.5, 0.75, 1, 0.75, 0.5, 0])
    np.testing.assert_array_equal(unit(jnp.zeros((2, 3))), np.zeros((2, 3)))
