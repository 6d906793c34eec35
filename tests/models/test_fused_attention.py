"""Attention by kernels: the same values as by the pattern, and only where nobody looks at one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.models.families import model_from_config
from mergelab.models.layers import fused_attention
from mergelab.models.layers.attention import attention_pattern, mix_values, visible_keys
from mergelab.models.layers.fused_attention import Form, compiled_for, splash_values, values_in_pieces

MODEL = model_from_config(
    {
        "model_type": "llama",
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
)
TOKENS = jnp.zeros((2, 128), jnp.int32)


@pytest.mark.parametrize(
    ("window", "cap", "sinks"),
    [(40, 30.0, False), pytest.param(None, None, True, marks=pytest.mark.thorough)],
)
def test_the_kernel_of_tpus_gives_what_the_pattern_gives(
    window: int | None, cap: float | None, sinks: bool
) -> None:
    draw = np.random.default_rng(0)
    q, k, v = (jnp.asarray(draw.standard_normal((2, 128, heads, 16)), jnp.float32) for heads in (4, 2, 2))
    sink = jnp.asarray(draw.standard_normal(4), jnp.float32) if sinks else None
    found = splash_values(q, k, v, scale=0.25, form=Form(True, window), cap=cap, sinks=sink, interpret=True)
    visible = visible_keys(jnp.arange(128), 128, None, window=window)
    expected = mix_values(attention_pattern(q, k, visible, 0.25, cap, sink), v)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    wider = visible_keys(jnp.arange(128), 128, None, window=window and window + 1)
    control = mix_values(attention_pattern(q, k, wider, 0.25, cap, None), v)
    assert np.abs(control - found).max() > 1e-3


@pytest.mark.parametrize(
    ("window", "cap", "sinks", "padded", "by_row"),
    [
        (40, 30.0, True, False, False),
        pytest.param(None, None, False, False, True, marks=pytest.mark.thorough),
        pytest.param(None, None, True, True, False, marks=pytest.mark.thorough),
        pytest.param(40, None, False, True, True, marks=pytest.mark.thorough),
    ],
)
def test_pieces_give_what_the_pattern_gives(
    window: int | None, cap: float | None, sinks: bool, padded: bool, by_row: bool, monkeypatch: Any
) -> None:
    """75 queries in pieces of 4, two at a time in a loop; the last is shorter."""
    draw = np.random.default_rng(0)
    q, k, v = (jnp.asarray(draw.standard_normal((2, 75, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    sink = jnp.asarray(draw.standard_normal(4), jnp.float32) if sinks else None
    real = jnp.ones((2, 75), bool).at[1, :30].set(False) if padded else None
    visible = visible_keys(jnp.arange(75), 75, real, window=window)
    form = None if padded else Form(True, window)
    monkeypatch.setattr(fused_attention, "_CACHED", 0 if by_row else 1 << 30)

    def whole(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return mix_values(attention_pattern(q, k, visible, 0.25, cap, sink), v)

    def pieces(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return values_in_pieces(q, k, v, visible, scale=0.25, form=form, cap=cap, sinks=sink, piece=4)

    np.testing.assert_allclose(jax.jit(pieces)(q, k, v), whole(q, k, v), atol=1e-6)
    slopes = [
        jax.jit(jax.grad(lambda *x, f=f: (f(*x) ** 2).sum(), (0, 1, 2)))(q, k, v) for f in (whole, pieces)
    ]
    for expected, found in zip(*slopes, strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.thorough
def test_a_long_pass_is_that_with_its_patterns_read() -> None:
    params = MODEL.init(0)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 130)))
    mask = jnp.ones((2, 130), bool).at[0, :9].set(False)
    read, unread = (
        MODEL.apply(params, tokens, mask=mask, capture=capture).logits
        for capture in ("blocks.*.attn.pattern", ())
    )
    assert read is not None and unread is not None
    np.testing.assert_allclose(unread[mask], read[mask], atol=1e-5)


def kernels(platform: str, dtype: Any = jnp.bfloat16, alone: bool = True, **options: Any) -> int:
    """How many kernels stand in a traced pass."""
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), MODEL.init(0))
    with compiled_for(platform, alone=alone):
        traced = jax.make_jaxpr(lambda params: MODEL.apply(params, TOKENS, **options))(params)
    return str(traced).count("pallas_call")


def test_a_pass_whose_patterns_nobody_looks_at_takes_the_kernel() -> None:
    assert kernels("tpu") >= 1
    assert kernels("cpu") == kernels("tpu", alone=False) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": jnp.float32},
        {"capture": "blocks.*.attn.pattern"},
        {"edit": {"blocks.*.attn.pattern": lambda x: x}},
        {"mask": jnp.ones((2, 128), bool)},
    ],
    ids=["float32", "captured", "edited", "padded"],
)
def test_a_pass_that_has_to_write_patterns_does_not(options: dict[str, Any]) -> None:
    assert kernels("tpu", **options) == 0


def test_without_cudnn_a_gpu_computes_the_pattern() -> None:
    assert kernels("gpu") == 0
