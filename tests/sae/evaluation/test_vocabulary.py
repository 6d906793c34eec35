"""Memory at a vocabulary of 256,000: what programs of metrics hold beside their arguments, as compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from mergelab.activations.losses import LOGIT_BYTES
from mergelab.models import model_from_config
from mergelab.sae import spliced_losses
from mergelab.sae.evaluation import explanation_loss, sparsity, training_curve
from mergelab.sae.sae import SAE, SAEConfig

VOCABULARY, D, LATENTS, BATCH, LENGTH = 256_000, 8, 16, 32, 128
SITE = "blocks.0.resid_post"
WHOLE = 4 * BATCH * LENGTH * VOCABULARY  # the logits of one pass: 4.2 GB

MODEL = model_from_config(
    {
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": D, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 1, "tie_word_embeddings": True,
    }
)  # fmt: skip


def _shape(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


PARAMS = jax.eval_shape(lambda: MODEL.init(0))
ARRAYS: Any = (_shape(D, LATENTS), _shape(LATENTS), _shape(LATENTS, D), _shape(D))
SAE_SHAPES = SAE(*ARRAYS, SAEConfig(activation="relu"))
TOKENS, BY_PLACE = _shape(BATCH, LENGTH, dtype=jnp.int32), _shape(BATCH, LENGTH, dtype=jnp.bool_)
WEIGHT, LIMITS = _shape(BATCH, LENGTH - 1, dtype=jnp.int32), _shape(1)
HOW: dict[str, Any] = {"model": MODEL, "sites": (SITE, SITE), "deciding": (SITE,)}


def _downstream() -> Any:
    given = PARAMS, SAE_SHAPES, _shape(D), LIMITS, TOKENS, WEIGHT, BY_PLACE
    return spliced_losses._losses.lower(*given, **HOW, parts=("spliced", "zero", "mean", "everywhere"))


def _ablation() -> Any:
    given = PARAMS, SAE_SHAPES, LIMITS, TOKENS, _shape(BATCH, dtype=jnp.int32), _shape(BATCH)
    return sparsity._ablate.lower(*given, **HOW, change=sparsity._latent_change, horizon=16)


def _explanations() -> Any:
    latents, simulated = _shape(4, dtype=jnp.int32), _shape(BATCH, LENGTH, 4)
    given = PARAMS, SAE_SHAPES, latents, LIMITS, TOKENS, BY_PLACE, simulated
    return explanation_loss._losses.lower(*given, **HOW)


def _curve() -> Any:
    return training_curve._losses.lower(PARAMS, TOKENS, WEIGHT, model=MODEL)


def _logits(params: Any, tokens: Any) -> jax.Array:
    found = MODEL.apply(params, tokens).logits
    assert found is not None
    return found


def _all_logits() -> Any:
    """The control: what is not cut into pieces."""
    return jax.jit(lambda params, tokens: jnp.median(_logits(params, tokens), axis=-1)).lower(PARAMS, TOKENS)


@pytest.mark.parametrize(
    "program",
    [_downstream, _ablation, _explanations, _curve],
    ids=["downstream", "sparsity", "explanations", "curve"],
)
def test_logits_are_held_a_few_at_a_time(program: Callable[[], Any]) -> None:
    # Logits, as many log-probabilities or sorted copies, and what is small beside them.
    held = program().compile().memory_analysis().temp_size_in_bytes
    assert 0 < held < 2.5 * LOGIT_BYTES < WHOLE / 6


def test_all_logits_at_once_would_be_seen() -> None:
    assert _all_logits().compile().memory_analysis().temp_size_in_bytes > 0.9 * WHOLE
