"""Attention by kernels: the same values as by the pattern, and only where nobody looks at one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.models.families import model_from_config
from mergelab.models.layers.attention import attention_pattern, mix_values, visible_keys
from mergelab.models.layers.fused_attention import Form, compiled_for, splash_values

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


def kernels(platform: str, dtype: Any = jnp.bfloat16, **options: Any) -> int:
    """How many kernels stand in a traced pass."""
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), MODEL.init(0))
    with compiled_for(platform):
        traced = jax.make_jaxpr(lambda params: MODEL.apply(params, TOKENS, **options))(params)
    return str(traced).count("pallas_call")


def test_a_pass_whose_patterns_nobody_looks_at_takes_the_kernel() -> None:
    assert kernels("tpu") >= 1
    assert kernels("cpu") == 0


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
