"""A transformer with a planted path, and nothing else that moves information between tokens.

Attention is uniform everywhere. Of all heads, three write something:
- block 0, head 1 copies stream directions 0-7 to directions 8-15,
- block 1, head 2 reads directions 8-15 and writes the logits of tokens 1 and 2,
- block 0, head 3 writes those logits itself, more weakly, from directions 0-7.
MLPs write nothing. A direction that no head reads holds nearly all of the stream's norm.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mergelab.models.families import model_from_config
from mergelab.models.model import Model, Params

VOCAB, WIDTH, HEADS = 12, 32, 4


def planted() -> tuple[Model, Params]:
    model = model_from_config(
        {
            "model_type": "llama", "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 16,
            "num_hidden_layers": 2, "num_attention_heads": HEADS, "max_position_embeddings": 32,
        }
    )  # fmt: skip
    shapes = jax.eval_shape(lambda: model.init(0))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    for name, leaf in jax.tree_util.tree_leaves_with_path(params):
        if "scale" in jax.tree_util.keystr(name):
            leaf[:] = 1
    rng = np.random.default_rng(0)
    params["embed"]["embedding"][:, :8] = rng.normal(0, 1, (VOCAB, 8))
    params["embed"]["embedding"][:, 31] = 50.0  # the stream's norm
    head = [slice(8 * i, 8 * i + 8) for i in range(HEADS)]
    first, second = params["blocks_0"]["attn"], params["blocks_1"]["attn"]
    first["v"]["kernel"][0:8, head[1]] = 9 * np.eye(8)
    first["o"]["kernel"][head[1], 8:16] = np.eye(8)
    second["v"]["kernel"][8:16, head[2]] = 9 * np.eye(8)
    second["o"]["kernel"][head[2], 16] = 1.0
    first["v"]["kernel"][0:8, head[3]] = np.eye(8)
    first["o"]["kernel"][head[3], 16] = 1.0
    params["unembed"]["kernel"][16, 1:3] = 5.0, -5.0
    return model, jax.tree.map(jnp.asarray, params)
