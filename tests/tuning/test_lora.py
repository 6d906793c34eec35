"""LoRA factors are changes of the weights they stand for: in gradient, at full rank, and in fused weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.models.families import model_from_config
from mergelab.models.model import Model
from mergelab.models.table import get_leaf
from mergelab.tuning import LoraSettings, TokenLoss, find_factors, init_factors, with_factors
from tests.models.tiny_models import CONFIGS
from tests.tuning import small

TOKENS = jnp.asarray(np.random.default_rng(0).integers(1, 30, (2, 9)), jnp.int32)
BATCH = TOKENS, jnp.asarray(np.arange(16).reshape(2, 8) % 3 > 0)
SETTINGS = LoraSettings(rank=3, alpha=5.0)


def filled(model: Model, settings: LoraSettings = SETTINGS) -> tuple[Any, Any]:
    factors = find_factors(model, settings)
    draw = np.random.default_rng(1)
    drawn = jax.tree.map(
        lambda leaf: jnp.asarray(draw.standard_normal(leaf.shape) / 10, jnp.float32), init_factors(factors, 0)
    )
    return factors, drawn


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradients_are_the_chain_rule_of_those_of_the_weights(name: str) -> None:
    model = small.model() if name == "llama" else model_from_config(CONFIGS[name])
    params = model.init(0)
    factors, trained = filled(model)
    loss, whole = TokenLoss(model, factors=factors), TokenLoss(model)
    of_factors = jax.jit(jax.grad(lambda t: loss(t, {"params": params}, BATCH)[0]))(trained)
    of_weights = jax.jit(jax.grad(lambda p: whole(p, {}, BATCH)[0]))(with_factors(factors, params, trained))
    for module in factors.modules:
        change = np.zeros(module.leaves[0].hf_shape, np.float32)
        for leaf in module.leaves:
            leaf.inverse(np.asarray(get_leaf(of_weights, leaf)), [change])
        change = change if module.transposed else change.T
        a, b = (np.asarray(trained[module.name][part], np.float64) for part in "AB")
        found = of_factors[module.name]
        np.testing.assert_allclose(found["B"], SETTINGS.scale * change @ a.T, rtol=2e-4, atol=2e-6)
        np.testing.assert_allclose(found["A"], SETTINGS.scale * b.T @ change, rtol=2e-4, atol=2e-6)
    assert len(factors.modules) == (7 if name == "llama" else 8)


def test_factors_of_full_rank_reach_any_weight_and_begin_at_none() -> None:
    model = small.model()
    params = model.init(0)
    factors = find_factors(model, LoraSettings(rank=16, alpha=16.0, targets=("attn.q",)))
    begun = init_factors(factors, 0)
    for leaf in model.table():
        np.testing.assert_array_equal(
            get_leaf(with_factors(factors, params, begun), leaf), get_leaf(params, leaf)
        )
    wanted = np.random.default_rng(2).standard_normal((16, 16)).astype(np.float32)
    kernel = np.asarray(params["blocks_0"]["attn"]["q"]["kernel"])
    pair = {"A": jnp.eye(16), "B": jnp.asarray((wanted - kernel).T)}
    found = with_factors(factors, params, {factors.modules[0].name: pair})
    np.testing.assert_allclose(found["blocks_0"]["attn"]["q"]["kernel"], wanted, atol=1e-6)


def test_modules_are_those_of_the_files() -> None:
    def names(model: Model, *targets: str) -> list[str]:
        return [module.name for module in find_factors(model, LoraSettings(2, targets=targets)).modules]

    llama = small.model()
    assert names(llama, "q_proj", "*.mlp.down") == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.down_proj",
    ]
    # Three of our matrices are one module of theirs, which PEFT gives one pair of factors.
    gpt2 = find_factors(model_from_config(CONFIGS["gpt2"]), LoraSettings(2, targets=("attn.q",)))
    assert [module.name for module in gpt2.modules] == [f"transformer.h.{n}.attn.c_attn" for n in (0, 1)]
    assert gpt2.modules[0].shape == (72, 24) and not gpt2.modules[0].transposed
    # A router is left alone unless it is named, and experts that are stacked have no module.
    mixtral = model_from_config(CONFIGS["mixtral"])
    assert not [name for name in names(mixtral) if "gate" in name or "experts" in name]
    assert len(names(mixtral, "router")) == 2


def test_factors_of_a_tensor_that_is_fused_in_groups_reach_each_part() -> None:
    model = model_from_config(CONFIGS["falcon, new form, key heads"])
    params = model.init(0)
    factors, trained = filled(model, LoraSettings(rank=3, alpha=5.0, targets=("attn.q",)))
    changed = with_factors(factors, params, trained)
    assert [len(module.leaves) for module in factors.modules] == [3, 3]
    for module in factors.modules:
        a, b = (np.asarray(trained[module.name][part]) for part in "AB")
        for leaf in module.leaves:
            expected = np.asarray(get_leaf(params, leaf)) + leaf.forward([SETTINGS.scale * b @ a])
            np.testing.assert_allclose(get_leaf(changed, leaf), expected, atol=1e-5)
            assert np.abs(np.asarray(get_leaf(changed, leaf) - get_leaf(params, leaf))).max() > 1e-2
