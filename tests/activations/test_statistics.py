"""Gram matrices and Fishers are the sums they are said to be, in memory and in files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from mergelab.activations.capture import capture
from mergelab.activations.kept import TokenRule
from mergelab.activations.statistics import fisher, gram, write_statistics
from mergelab.errors import SiteError
from mergelab.models.table import get_leaf, stored_shapes
from tests.models.tiny_models import tiny

RAGGED = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14], [15, 16, 17, 18]]
WHOLE = np.arange(3, 18).reshape(5, 3)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_gram_is_the_mean_over_real_tokens_of_what_the_matrix_reads(name: str) -> None:
    model, params = tiny(name)
    found = gram(model, params, RAGGED, batch=3)
    assert found.tokens == 14
    leaves = [leaf for leaf in model.table() if leaf.reads]
    held = capture(model, params, RAGGED, [leaf.reads or "" for leaf in leaves], batch=4)
    for leaf in leaves:
        x = held[leaf.reads or ""].reshape(20, -1).astype(np.float64)  # zeros at padding add nothing
        expected = x.T @ x / 14
        np.testing.assert_allclose(
            get_leaf(found.tree, leaf), expected, rtol=1e-5, atol=1e-5 * expected.max()
        )
    assert "embed" not in found.tree and "final_norm" not in found.tree
    block = found.tree["blocks_0"]["attn"]
    assert block["q"]["kernel"] is block["k"]["kernel"]  # one computation
    assert np.abs(block["q"]["kernel"] - found.tree["blocks_0"]["mlp"]["up"]["kernel"]).max() > 1e-2


def test_tokens_that_do_not_count_are_left_out_of_means_and_still_read() -> None:
    model, params = tiny("llama")
    tokens = np.arange(3, 43).reshape(5, 8)
    site, rule = "blocks.1.mlp.post", TokenRule(2, True, None)
    kept = (np.arange(8)[None] >= 2) & ~np.isin(tokens, [7, 22])
    rows = capture(model, params, tokens, [site])[site]
    limit = np.median(np.linalg.norm(rows[kept], axis=-1)) * 1.5
    short = kept & (np.linalg.norm(rows, axis=-1) <= limit)
    assert kept.sum() == 5 * 6 - 2 and short.sum() < kept.sum()
    for chosen, multiple in ((kept, None), (short, 1.5)):
        given = replace(rule, max_norm_multiple=multiple)
        found = gram(model, params, tokens, batch=5, rule=given, special_ids=(7, 22))
        x = rows[chosen].astype(np.float64)
        assert found.tokens == kept.sum()
        got = found.tree["blocks_1"]["mlp"]["down"]["kernel"]
        np.testing.assert_allclose(got, x.T @ x / len(x), rtol=1e-5, atol=1e-6 * (x * x).mean())
    some = fisher(model, params, tokens, batch=5, rule=rule, special_ids=(7, 22))
    every = fisher(model, params, tokens, batch=5)
    assert some.tokens == kept.sum() < every.tokens
    left, right = (one.tree["final_norm"]["scale"] for one in (some, every))
    assert np.abs(left).max() > 0 and np.abs(left - right).max() > 0.01 * np.abs(right).max()
    with pytest.raises(SiteError, match="no token of the text counts"):
        gram(model, params, tokens[:, :2], rule=rule)


def test_sums_keep_what_additions_round_off() -> None:
    model, params = tiny("llama")
    contexts = np.tile(WHOLE, (40, 1))
    few, many = (gram(model, params, tokens, batch=1) for tokens in (WHOLE, contexts))
    for one, other in zip(jax.tree.leaves(few.tree), jax.tree.leaves(many.tree), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=4e-7 * np.abs(one).max())


def test_a_fisher_is_the_mean_of_squared_gradients_of_each_sequence() -> None:
    model, params = tiny("gpt2")

    def log_likelihood(params: Any, ids: tuple[int, ...]) -> Any:
        logits = model.apply(params, jnp.array([ids])).logits
        assert logits is not None
        steps = jax.nn.log_softmax(logits[0, :-1])
        return sum(steps[place, token] for place, token in enumerate(ids[1:]))

    gradient = jax.jit(jax.grad(log_likelihood), static_argnums=1)
    gradients = [gradient(params, tuple(ids)) for ids in RAGGED]
    expected = jax.tree.map(lambda *g: np.mean(np.square(np.stack(g, dtype=np.float64)), axis=0), *gradients)
    found = fisher(model, params, RAGGED, batch=3)
    assert found.tokens == 14
    largest = max(array.max() for array in jax.tree.leaves(expected))
    for one, other in zip(jax.tree.leaves(found.tree), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=1e-8 * largest)  # biases of keys have 0
    joined = jax.tree.map(lambda *g: np.square(np.sum(np.stack(g), axis=0)), *gradients)
    one, other = found.tree["embed"]["embedding"], joined["embed"]["embedding"] / len(RAGGED)
    assert np.abs(one - other).max() > 0.1 * one.max()  # the control: squares are taken before the mean


def test_a_fisher_of_the_last_layer_has_its_closed_form() -> None:
    """`d log p / d W = sum_t h_t (onehot - p_t)^T` for the unembedding, in float64."""
    model, params = tiny("llama")
    held = capture(model, params, WHOLE, ["unembed.input", "logits"])
    h, logits = (held[site].astype(np.float64)[:, :-1] for site in ("unembed.input", "logits"))
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    rest = np.eye(p.shape[-1])[WHOLE[:, 1:]] - p
    expected = np.mean(np.square(np.einsum("nlw,nlv->nwv", h, rest)), axis=0)
    found = fisher(model, params, WHOLE, batch=2).tree["unembed"]["kernel"]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5 * expected.max())


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_a_folder_has_hf_names_and_shapes_in_groups_of_bounded_memory(name: str, tmp_path: Path) -> None:
    model, params = tiny(name)
    count = write_statistics(model, params, WHOLE, tmp_path / "g", kind="gram", group_bytes=20_000)
    write_statistics(model, params, WHOLE, tmp_path / "f", kind="fisher")
    files = sorted((tmp_path / "g").glob("*.safetensors"))
    assert len(files) > 1 and (tmp_path / "g" / "mergelab.json").is_file()
    grams: dict[str, np.ndarray] = {}
    for file in files:
        with safe_open(file, "np") as opened:
            assert opened.metadata() == {"kind": "gram", "tokens": "15"}
        grams |= load_file(file)
    tree, table = gram(model, params, WHOLE).tree, model.table()
    assert len(grams) == count
    assert set(grams) == {hf_name for leaf in table if leaf.reads for hf_name in leaf.hf_names}
    for leaf in table:
        if leaf.reads:
            np.testing.assert_allclose(grams[leaf.hf_name], get_leaf(tree, leaf), rtol=1e-5, atol=1e-5)
    fishers = load_file(tmp_path / "f" / "fisher.safetensors")
    assert {key: array.shape for key, array in fishers.items()} == stored_shapes(table)
    expected = fisher(model, params, WHOLE).tree
    for leaf in table:
        stored = [fishers[hf_name] for hf_name in leaf.hf_names]
        np.testing.assert_allclose(leaf.forward(stored), get_leaf(expected, leaf), rtol=1e-5, atol=1e-7)


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    model, params = tiny("llama")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    for kind in ("gram", "fisher"):
        with pytest.raises(KeyboardInterrupt):
            write_statistics(model, params, WHOLE, tmp_path / "out", kind=kind, progress=stop)
    assert not list(tmp_path.iterdir())
