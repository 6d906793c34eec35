"""RegMean++'s statistics: what each block reads behind merged ones, against passes of mixed models."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergelab import operators as ops
from mergelab.activations import TokenRule, capture, gram, merged_grams
from mergelab.errors import SiteError
from mergelab.models import model_from_config

CONFIG = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def siblings() -> tuple[Any, list[Any], list[np.ndarray]]:
    model = model_from_config(CONFIG)
    base = model.init(0)
    params = [
        jax.tree.map(lambda x, seed=seed: x + 0.02 * np.random.default_rng(seed).normal(size=x.shape), base)
        for seed in (1, 2)
    ]
    params = [jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), one) for one in params]
    texts = [np.random.default_rng(seed).integers(0, 61, (5, 9)) for seed in (3, 4)]
    return model, params, texts


def test_each_block_reads_what_merged_blocks_make(siblings: Any) -> None:
    model, params, texts = siblings
    found = merged_grams(model, params, texts, off_diagonal=0.9, batch=2)
    assert [one.kind for one in found] == ["merged_gram"] * 2 and found[0].tokens == 45
    merged = ops.regmean_pp(off_diagonal=0.9)(params, statistics=[one.tree for one in found])
    for own, text, one in zip(params, texts, found, strict=True):
        for block in range(3):
            mixed = {**merged, f"blocks_{block}": own[f"blocks_{block}"]}
            for site, (layer, kernel) in {
                "attn_norm": ("attn", "q"), "attn.z": ("attn", "o"), "mlp_norm": ("mlp", "up"),
            }.items():  # fmt: skip
                leaf = next(
                    x for x in model.table() if x.path == (f"blocks_{block}", layer, kernel, "kernel")
                )
                x = np.asarray(capture(model, mixed, text, [leaf.reads])[leaf.reads], np.float64)
                x = x.reshape(45, -1)
                expected = x.T @ x / 45
                got = one.tree[f"blocks_{block}"][layer][kernel]["kernel"]
                np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * expected.max(), err_msg=site)
        head = {**merged, "final_norm": own["final_norm"]}
        x = np.asarray(capture(model, head, text, ["unembed.input"])["unembed.input"], np.float64)
        x = x.reshape(45, -1)
        np.testing.assert_allclose(one.tree["unembed"]["kernel"], x.T @ x / 45, rtol=1e-4, atol=1e-4)
    plain = gram(model, params[0], texts[0]).tree["blocks_2"]["mlp"]["down"]["kernel"]
    got = found[0].tree["blocks_2"]["mlp"]["down"]["kernel"]
    assert np.abs(got - plain).max() > 1e-3 * np.abs(plain).max()  # the control: RegMean's own differ
    first = gram(model, params[0], texts[0]).tree["blocks_0"]
    assert not np.allclose(found[0].tree["blocks_0"]["attn"]["q"]["kernel"], first["attn"]["q"]["kernel"])


def test_equal_models_have_the_grams_of_one(siblings: Any) -> None:
    model, params, texts = siblings
    rule = TokenRule(max_norm_multiple=2.0)
    ragged = [row[: 4 + i].tolist() for i, row in enumerate(texts[0])]
    found = merged_grams(model, [params[0]] * 2, [ragged, texts[1]], rule=rule, batch=5)
    expected = gram(model, params[0], ragged, rule=rule, batch=5)
    assert found[0].tokens == expected.tokens == 25
    for one, other in zip(jax.tree.leaves(found[0].tree), jax.tree.leaves(expected.tree), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4 * np.abs(other).max())


def test_a_text_for_each_of_two_models(siblings: Any) -> None:
    model, params, texts = siblings
    with pytest.raises(SiteError, match=re.escape("2 models and 1 texts were given; regmean_pp takes two")):
        merged_grams(model, params, texts[:1])
    with pytest.raises(SiteError, match="regmean_pp takes two models or more"):
        merged_grams(model, params[:1], texts[:1])
