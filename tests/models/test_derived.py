"""Parameters and sites are read off the module itself, at the cost of one block, with nothing computed."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from mergelab.models.derived import derive, param
from mergelab.models.families import model_from_config
from mergelab.models.sites import Tap
from tests.models.tiny_models import CONFIGS

LARGE = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}


def test_a_block_of_llama_has_these_sites_and_parameters() -> None:
    model = model_from_config(CONFIGS["llama"])
    stream, factor = ("batch", "length", 24), ("batch", "length", 1)
    assert [(s, shape) for s, shape in model.sites().items() if s.startswith("blocks.1.")] == [
        ("blocks.1.resid_pre", stream),
        ("blocks.1.attn_norm.scale", factor),
        ("blocks.1.attn.input", stream),
        ("blocks.1.attn.q", ("batch", "length", 4, 6)),
        ("blocks.1.attn.k", ("batch", "length", 2, 6)),
        ("blocks.1.attn.v", ("batch", "length", 2, 6)),
        ("blocks.1.attn.pattern", ("batch", 4, "query", "key")),
        ("blocks.1.attn.z", ("batch", "length", 4, 6)),
        ("blocks.1.attn.out", stream),
        ("blocks.1.resid_mid", stream),
        ("blocks.1.mlp_norm.scale", factor),
        ("blocks.1.mlp.input", stream),
        ("blocks.1.mlp.pre", ("batch", "length", 40)),
        ("blocks.1.mlp.post", ("batch", "length", 40)),
        ("blocks.1.mlp.out", stream),
        ("blocks.1.resid_post", stream),
    ]
    leaves = {leaf.name: (leaf.shape, leaf.axes) for leaf in model.table()}
    assert leaves["embed.embedding"] == ((61, 24), ("vocab", "embed"))
    assert leaves["blocks_1.attn.k.kernel"] == ((24, 12), ("embed", "kv_heads"))
    assert leaves["blocks_1.mlp.down.kernel"] == ((40, 24), ("mlp", "embed"))
    assert leaves["unembed.kernel"] == ((24, 61), ("embed", "vocab"))


def test_eighty_layers_cost_one_and_weigh_nothing() -> None:
    model_from_config(CONFIGS["llama"]).sites()  # what JAX sets up once
    began = time.process_time()
    model = model_from_config(LARGE)
    sites, table = model.sites(), model.table()
    assert time.process_time() - began < 5
    assert sum(leaf.size for leaf in table) == 70_553_706_496
    assert len(sites) == 80 * 16 + 4 and list(sites)[-4] == "blocks.79.resid_post"


class _Toy(nn.Module):
    axes: tuple[str | None, ...]
    repeats: bool = False

    @nn.compact
    def __call__(
        self, tokens: jax.Array, positions: jax.Array, mask: None, cache: None, tap: Tap
    ) -> jax.Array:
        scale = param(self, "scale", nn.initializers.ones, (3,), self.axes)
        x = tap("x", tokens[..., None].astype(jnp.float32) * scale[None, None])
        return tap("twice", jnp.concatenate([x, x], axis=1)) if self.repeats else x


def test_any_module_is_read() -> None:
    parameters, sites = derive(_Toy(("embed",)))
    assert parameters == {("scale",): ((3,), ("embed",))}
    assert sites == {"x": ("batch", "length", 3)}


def test_what_cannot_be_said_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"the parameter 'scale' of shape \(3,\) has axes \(\)"):
        derive(_Toy(()))
    with pytest.raises(ValueError, match="the site 'twice' has the shapes"):
        derive(_Toy(("embed",), repeats=True))
