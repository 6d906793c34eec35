"""Logits of a bfloat16 unembedding that is widened in pieces: those of the plain product."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mergelab as ml
from mergelab.models import residual_stream
from mergelab.models.layers.bfloat16_bits import product_by_columns

CONFIG = {
    "model_type": "llama",
    "vocab_size": 67,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
}


@pytest.mark.parametrize("tied", [True, False])
def test_pieces_give_the_logits_of_the_whole(tied: bool, monkeypatch: Any) -> None:
    model = ml.model_from_config(CONFIG | {"tie_word_embeddings": tied})
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.init(0))
    normed = jax.random.normal(jax.random.key(1), (5, 16), jnp.bfloat16)
    whole = residual_stream.read_logits(model, params, normed)
    monkeypatch.setattr(residual_stream, "_alone_on_cpu", lambda: True)
    monkeypatch.setattr(residual_stream, "_LARGE", 1)
    calls: list[bool] = []

    def in_pieces(x: Any, kernel: Any, *, transposed: bool) -> Any:
        calls.append(transposed)
        return product_by_columns(x, kernel, transposed=transposed, piece=16 * 9)  # 67 is 7 nines and a rest

    monkeypatch.setattr(residual_stream, "product_by_columns", in_pieces)
    found = jax.jit(lambda p, x: residual_stream.read_logits(model, p, x))(params, normed)
    assert calls == [tied]
    kernel = residual_stream.unembedding(model, params).astype(jnp.float32)
    np.testing.assert_allclose(
        found, np.asarray(normed, np.float64) @ np.asarray(kernel, np.float64), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-6)


def test_a_large_unembedding_is_never_held_in_float32() -> None:
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((4, 64), (40_000, 64))]
    program = jax.jit(lambda x, table: product_by_columns(x, table, transposed=True)).lower(*shapes).compile()
    memory = program.memory_analysis()
    if memory is not None:
        assert memory.temp_size_in_bytes < 3 * 40_000 * 64  # a copy as it is, no two of four bytes
