"""A tiny model with attention sinks: one token's activations are hundreds of times as long as the others'."""

from __future__ import annotations

from functools import cache

import jax
import numpy as np

from mergelab.activations.kept import DEFAULT_RULE, TokenRule
from mergelab.activations.model_activations import ModelActivations
from mergelab.models.families import model_from_config
from mergelab.models.model import Model, Params

SITE, WIDTH, LENGTH, VOCAB, SINK = "blocks.0.resid_post", 16, 16, 64, 7


@cache
def planted_sink() -> tuple[Model, Params]:
    """A Llama of one block and the embedding of `SINK` 20,000 times as long as the others'."""
    model = model_from_config(
        {
            "model_type": "llama", "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 16,
            "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": LENGTH,
        }
    )  # fmt: skip
    params = jax.tree.map(lambda x: 2 * x if x.ndim == 2 else x, model.init(0))
    table = params["embed"]["embedding"]
    params["embed"]["embedding"] = table.at[SINK].multiply(20_000)
    return model, params


def sink_tokens(contexts: int, seed: int = 0) -> np.ndarray:
    """Contexts that begin with the sink; every eighth has another at position 2."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(8, VOCAB, (contexts, LENGTH)).astype(np.int32)
    tokens[:, 0] = SINK
    tokens[::8, 2] = SINK
    return tokens


def sink_source(contexts: int = 64, seed: int = 0, rule: TokenRule = DEFAULT_RULE) -> ModelActivations:
    """The model on such contexts."""
    return ModelActivations(*planted_sink(), sink_tokens(contexts, seed), (SITE,), batch=16, rule=rule)
