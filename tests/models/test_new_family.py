"""A family with a new block is one file: its config, its table and the block; everything else follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jaxtyping import Array

from mergelab.decoding import generate
from mergelab.models.decoder import DECODER, DecoderConfig
from mergelab.models.derived import param
from mergelab.models.families import FAMILIES, model_from_config
from mergelab.models.families.config_fields import read_usual_fields, usual_decoder
from mergelab.models.families.llama import LLAMA_LINEAR, llama_rows
from mergelab.models.layers.attention import Attention, AttentionSpec
from mergelab.models.layers.block import BlockSpec, Pass
from mergelab.models.layers.norms import NormKind
from mergelab.models.layers.routing import Experts, choose, spread
from mergelab.models.load import load_model
from mergelab.models.model import Family, Model, Params
from mergelab.models.save import save_model
from mergelab.models.table import Row, check_table, linear_rows
from tests.models.tiny_models import params_of, weights


@dataclass(frozen=True)
class Gated:
    """Attention without a feed-forward layer, added through a learned gate: no `BlockSpec` says so."""

    attention: AttentionSpec

    @property
    def kept(self) -> tuple[tuple[int, int], tuple[int, int]]:
        shape = (self.attention.n_kv_heads, self.attention.head_dim)
        return shape, shape

    @property
    def tensors(self) -> int:
        return 1

    def outline(self) -> Gated:
        return Gated(replace(self.attention, window=None, rotary=None))

    def module(self, layer: int, gain: float, name: str) -> nn.Module:
        return GatedBlock(self, layer, gain, name=name)


class GatedBlock(nn.Module):
    spec: Gated
    layer: int
    gain: float

    @nn.compact
    def __call__(self, x: Array, shared: Pass) -> tuple[Array, Any]:
        tap, site, spec = shared.tap, f"blocks.{self.layer}", self.spec.attention
        x = tap(f"{site}.resid_pre", x)
        visible, rotation = shared.visible(spec.window), shared.rotation(spec.rotary)
        attention = Attention(spec, initial_gain=self.gain, name="attn")
        added, seen = attention(x, visible, rotation, shared.cache, self.layer, tap, f"{site}.attn")
        gate = param(self, "gate", nn.initializers.ones, (x.shape[-1],), ("embed",))
        gate = tap(f"{site}.gate", jax.nn.sigmoid(x * gate[None, None]))
        return tap(f"{site}.resid_post", x + gate * added), seen


_LAYER = "model.layers.{i}"
ROWS = llama_rows(
    Row("blocks_{i}.gate", f"{_LAYER}.gate"),
    Row("blocks_{i}.attn.out_norm.scale", f"{_LAYER}.post_attention_layernorm.weight"),
    Row("blocks_{i}.mlp.out_norm.scale", f"{_LAYER}.post_feedforward_layernorm.weight"),
    *linear_rows("blocks_{i}", _LAYER, LLAMA_LINEAR),
    Row("blocks_{i}.attn.q_norm.scale", f"{_LAYER}.self_attn.q_norm.weight"),
    Row("blocks_{i}.attn.k_norm.scale", f"{_LAYER}.self_attn.k_norm.weight"),
    Row("blocks_{i}.mlp.router", f"{_LAYER}.mlp.gate.weight", "transpose"),
    Row("blocks_{i}.mlp.gate", f"{_LAYER}.mlp.experts.{{e}}.gate_proj.weight", "transpose"),
    Row("blocks_{i}.mlp.up", f"{_LAYER}.mlp.experts.{{e}}.up_proj.weight", "transpose"),
    Row("blocks_{i}.mlp.down", f"{_LAYER}.mlp.experts.{{e}}.down_proj.weight", "transpose"),
)


def read(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Layer 0 as in OLMo 2, layer 1 with experts as in Qwen 3 MoE, layer 2 of the new kind."""
    fields = read_usual_fields(config, place, {"max_position_embeddings": 2048}, {"hidden_act": ("silu",)})
    norm = NormKind("rms", fields["rms_norm_eps"])
    attention = {"qk_norm": norm, "qk_norm_over": "all"}
    usual = usual_decoder(fields, place, attention=attention, block={"placement": "post"})
    first, second, third = usual.blocks
    assert isinstance(second, BlockSpec) and isinstance(third, BlockSpec)
    sparse = replace(second, mlp=Experts(3, 2, fields["intermediate_size"], normalize=False))
    return replace(usual, blocks=(first, sparse, Gated(third.attention)))


DUMMY = Family("dummy", DECODER, read, lambda _: ROWS)
CONFIG = {
    "model_type": "dummy",
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 7)), jnp.int32)


@pytest.fixture(autouse=True)
def dummy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "dummy", DUMMY)


@pytest.fixture
def loaded(dummy: None) -> tuple[Model, Params]:
    model = model_from_config(CONFIG)
    return model, params_of(model, weights(model))


def test_sites_and_table_follow_from_the_blocks() -> None:
    model = model_from_config(CONFIG)
    check_table(model.table())
    sites = list(model.sites())
    assert [s.removeprefix("blocks.2.") for s in sites if s.startswith("blocks.2.")] == [
        *(
            "resid_pre",
            "attn.input",
            "attn.q",
            "attn.k",
            "attn.v",
            "attn.pattern",
            "attn.z",
            "attn.out",
            "gate",
            "resid_post",
        )
    ]
    assert "blocks.0.attn_norm.scale" not in sites and "blocks.0.mlp.router" not in sites
    assert model.sites()["blocks.1.mlp.router"] == ("batch", "length", 3)
    leaves = {leaf.name: leaf for leaf in model.table()}
    assert leaves["blocks_2.gate"].shape == (24,)
    assert leaves["blocks_0.attn.q_norm.scale"].shape == (24,)
    assert leaves["blocks_0.attn.k_norm.scale"].axes == ("kv_heads",)
    made = jax.eval_shape(lambda: model.init(0))
    shapes = {".".join(key.key for key in path): leaf.shape for path, leaf in jax.tree.leaves_with_path(made)}
    assert shapes == {name: leaf.shape for name, leaf in leaves.items()}


def test_it_runs_is_captured_and_generates_with_a_cache(loaded: tuple[Model, Params]) -> None:
    model, params = loaded
    output = jax.jit(lambda p: model.apply(p, TOKENS, capture=("*",)))(params)
    found = output.captured
    assert list(sorted(found)) == sorted(model.sites())
    # Norms stand on what is added alone: its root mean square is that of the norm's scale.
    added = found["blocks.0.resid_mid"] - found["blocks.0.resid_pre"]
    np.testing.assert_allclose(added, found["blocks.0.attn.out"], atol=1e-5)
    scale = params["blocks_0"]["attn"]["out_norm"]["scale"]
    np.testing.assert_allclose(jnp.mean((added / scale[None, None]) ** 2, axis=-1), 1.0, rtol=1e-3)
    gated = found["blocks.2.gate"] * found["blocks.2.attn.out"]
    np.testing.assert_allclose(
        found["blocks.2.resid_post"], found["blocks.2.resid_pre"] + gated, rtol=1e-5, atol=1e-5
    )
    prompt = TOKENS[:1, :4]
    new = generate(model, params, prompt, max_new_tokens=3).rows()[0]
    text = jnp.asarray([[*prompt[0].tolist(), *new]])
    logits = jax.jit(model.apply)(params, text).logits
    assert jnp.argmax(logits[0, 3:-1], axis=-1).tolist() == new


def test_it_is_saved_and_loaded(loaded: tuple[Model, Params], tmp_path: Path) -> None:
    model, params = loaded
    save_model(model, params, tmp_path / "model")
    again, same = load_model(tmp_path / "model")
    assert again == model
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, same))


def test_weights_of_experts_sum_to_one_only_if_normalized() -> None:
    logits = jnp.asarray([[[1.0, 3.0, 2.0, -1.0]]])
    every = jax.nn.softmax(logits, axis=-1)
    kept = jnp.where(logits >= 2.0, every, 0.0)
    for normalize, expected in ((False, kept), (True, kept / kept.sum())):
        found = choose(logits, Experts(4, 2, 1, normalize=normalize))
        np.testing.assert_allclose(spread(*found, 4), expected, rtol=1e-6)
