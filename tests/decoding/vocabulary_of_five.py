"""Models with five tokens, of whose texts all can be counted."""

from __future__ import annotations

from functools import cache

import jax

from mergelab.models.families import model_from_config
from mergelab.models.model import Model, Params

VOCAB = 5
CONFIG = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


@cache
def five(seed: int) -> tuple[Model, Params]:
    """A model with opinions of its own."""
    model = model_from_config(CONFIG)
    params = model.init(seed)
    larger = {"embed": 40.0, "unembed": 4.0}
    scales = {name: larger.get(name, 1.5) for name in params}
    return model, {name: jax.tree.map(lambda x, by=by: x * by, params[name]) for name, by in scales.items()}
