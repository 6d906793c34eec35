"""Two models side by side: the sets of their next tokens, and the layers that make the difference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.errors import SiteError
from mergelab.interp.logit_metrics import logit_difference
from mergelab.interp.model_diffing import compare_next_tokens, swap_layers
from mergelab.models.model import Params
from tests.interp.running import logits_of
from tests.models.tiny_models import MASK, TOKENS, params_of, tiny, weights


def test_sets_of_next_tokens_are_those_of_the_logits() -> None:
    one, other = tiny("llama"), tiny("gpt2")
    found = compare_next_tokens(one, other, TOKENS, mask=MASK, k=6, batch=2)
    last = np.array([9, 9, 5])
    logp = []
    for model, params in (one, other):
        out = logits_of(model, params, TOKENS, mask=MASK)
        logp.append(np.asarray(jax.nn.log_softmax(out))[np.arange(3), last])
    tops = [np.argsort(-table, axis=1)[:, :6] for table in logp]
    np.testing.assert_array_equal(found.first, tops[0])
    np.testing.assert_array_equal(found.second, tops[1])
    picked = np.take_along_axis(logp[1], tops[1], axis=1)
    np.testing.assert_allclose(found.second_log_probabilities, picked, atol=1e-4)
    np.testing.assert_allclose(found.kl, (np.exp(logp[0]) * (logp[0] - logp[1])).sum(axis=1), rtol=1e-3)
    for row in range(3):
        a, b = set(tops[0][row].tolist()), set(tops[1][row].tolist())
        assert found.overlap[row] == pytest.approx(len(a & b) / len(a | b))
        assert set(found.gained(row)) == b - a and set(found.lost(row)) == a - b
    same = compare_next_tokens(one, one, TOKENS, mask=MASK, k=6, batch=2)
    assert same.agreement == 1 and (same.overlap == 1).all() and np.abs(same.kl).max() < 1e-6
    with pytest.raises(SiteError, match="vocabularies of 61"):
        compare_next_tokens(one, other, TOKENS, k=62)


def changed(params: Params, other: Params, *paths: tuple[str, str]) -> Params:
    """The parameters, with those sub-trees of another model's."""
    new = jax.tree.map(lambda leaf: leaf, params)
    for block, part in paths:
        new[block][part] = other[block][part]
    return new


def test_swapping_finds_the_layers_that_were_changed() -> None:
    model, first = tiny("llama")
    other = params_of(model, weights(model, seed=1))
    second = changed(first, other, ("blocks_1", "mlp"))
    found = swap_layers(model, first, second, TOKENS, mask=MASK, by="component", batch=2)
    assert found.parts == (
        "embed", "blocks_0.attn", "blocks_0.mlp", "blocks_1.attn", "blocks_1.mlp", "final_norm", "unembed",
    )  # fmt: skip
    expected = np.arange(7) == 4
    np.testing.assert_allclose(found.enough, expected, atol=1e-5)
    np.testing.assert_allclose(found.needed, expected, atol=1e-5)
    assert np.abs(found.second).max() < 1e-6 and (found.first < -1e-3).all()


def test_two_changes_share_the_effect_and_a_metric_can_be_given() -> None:
    model, first = tiny("llama")
    other = params_of(model, weights(model, seed=1))
    second = changed(first, other, ("blocks_0", "attn"), ("blocks_1", "mlp"))
    metric = logit_difference([4, 9, 30], [7, 2, 5], [9, 9, 5])
    found = swap_layers(model, first, second, TOKENS, mask=MASK, metric=metric)
    assert found.parts == ("embed", "blocks_0", "blocks_1", "final_norm", "unembed")
    assert (np.abs(found.alone - found.first[:, None]).max(axis=0) > 1e-2).tolist() == [0, 1, 1, 0, 0]
    # Leaving one change away is having the other alone.
    np.testing.assert_allclose(found.without[:, 1], found.alone[:, 2], rtol=1e-5)
    logits = logits_of(model, changed(first, other, ("blocks_1", "mlp")), TOKENS, mask=MASK)
    np.testing.assert_allclose(found.alone[0, 2], logits[0, 9, 4] - logits[0, 9, 7], rtol=1e-4)


def test_models_that_do_not_match_are_refused() -> None:
    model, first = tiny("llama")
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), first)
    with pytest.raises(SiteError, match=r"is float32 .* and bfloat16"):
        swap_layers(model, first, half, TOKENS)
    with pytest.raises(SiteError, match="'bert' model is an encoder"):
        swap_layers(tiny("bert")[0], first, first, TOKENS)
