"""Variants of each family, and controls: what is forgotten or taken for another thing changes outputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.models.families import model_from_config
from mergelab.models.layers.attention import AttentionSpec
from mergelab.models.layers.block import BlockSpec
from mergelab.models.layers.latent_attention import LatentSpec
from mergelab.models.layers.mamba import Mamba2Spec
from mergelab.models.layers.recurrent_block import RecurrentBlockSpec
from mergelab.models.layers.routing import Experts
from mergelab.models.model import Model
from tests.models.test_families import FIRST, differences, forward
from tests.models.tiny_models import CONFIGS, MASK, TOKENS, tiny


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in FIRST])
def test_outputs_of_variants_are_the_recorded_ones(name: str) -> None:
    model, params = tiny(name)
    run = forward(model)
    assert differences(run(params, TOKENS, MASK), name) <= 1e-4
    assert differences(run(params, TOKENS[[0, 2, 1]], MASK), name) > 1e-2


def wrong_blocks(block: BlockSpec) -> Iterator[tuple[str, BlockSpec]]:
    """The block with one thing forgotten or mistaken, where that leaves its parameters alone."""
    attention = block.attention
    changes: dict[str, dict[str, Any]] = {"scale": {"scale": attention.scale * 1.3}}
    if isinstance(attention, AttentionSpec):
        if attention.rotary is not None:
            rotary = attention.rotary
            if rotary.dim > 2:  # one pair turns at frequency 1, whatever theta is, and has one order
                changes["theta"] = {"rotary": replace(rotary, theta=rotary.theta * 3)}
                changes["pairs"] = {"rotary": replace(rotary, neighbors=not rotary.neighbors)}
            changes["not rotated"] = {"rotary": None}
        changes |= {
            name: {name: None} for name in ("window", "cap", "clip") if getattr(attention, name) is not None
        }
        if attention.gated:
            changes["gate"] = {"gated": False}
        if attention.sinks:
            changes["sinks"] = {"sinks": False}
        if attention.qk_norm is not None:
            changes["norms of heads"] = {"qk_norm": None}
    if isinstance(attention, LatentSpec) and attention.rotary is not None:
        rotary = attention.rotary
        changes["pairs"] = {"rotary": replace(rotary, neighbors=not rotary.neighbors)}
        changes["not rotated"] = {"rotary": None}
    if isinstance(block.mlp, Experts):
        other: dict[str, Any] = {"normalize": not block.mlp.normalize, "chosen": block.mlp.chosen - 1}
        other["scoring"] = "softmax" if block.mlp.scoring == "sigmoid" else "sigmoid"
        plain = {"weight_scale": 1.0, "correction": False, "router_bias": False, "bias": False, "limit": None}
        plain |= {"shared": 0, "shared_gate": False, "activation": "silu"}
        other |= {name: value for name, value in plain.items() if getattr(block.mlp, name) != value}
        if block.mlp.groups > 1:
            other["chosen_groups"] = block.mlp.groups
        for name, value in other.items():
            yield name, replace(block, mlp=replace(block.mlp, **{name: value}))
    for name, change in changes.items():
        yield name, replace(block, attention=replace(attention, **change))
    if block.out_scale != 1:
        yield "out_scale", replace(block, out_scale=1.0)
    if block.norm.offset:
        yield "offset", replace(block, norm=replace(block.norm, offset=0.0))
    moved = {"pre": "parallel", "parallel": "pre", "sandwich": "pre"}.get(block.placement)
    if moved is not None:
        yield "placement", replace(block, placement=moved)
    if block.norm.kind == "layer":
        yield "centering", replace(block, norm=replace(block.norm, kind="rms"))


def wrong_mixers(block: RecurrentBlockSpec) -> Iterator[tuple[str, RecurrentBlockSpec]]:
    """The block with one thing of its recurrent layer or its norms mistaken."""
    mixer: Any = block.mixer
    if isinstance(mixer, Mamba2Spec):
        yield "bounds", replace(block, mixer=replace(mixer, least_step=0.7, largest_step=0.71))
    changes: dict[str, dict[str, Any]] = {
        "eps": {"eps": 1.0},
        "key_eps": {"key_eps": 3.0},
        "conv_bias": {"conv_bias": False},
        "norm": {"norm": None},
    }
    for name, change in changes.items():
        fields = {key: value for key, value in change.items() if getattr(mixer, key, value) != value}
        if fields:
            yield f"mixer {name}", replace(block, mixer=replace(mixer, **fields))
    if block.norm.offset:
        yield "offset", replace(block, norm=replace(block.norm, offset=0.0))
    yield "centering", replace(block, norm=replace(block.norm, kind="layer", biased=False))


def wrong(model: Model) -> Iterator[tuple[str, Model]]:
    """A model with one thing forgotten or mistaken, in all layers that have it."""
    c = model.config
    mistaken = [
        dict(wrong_mixers(block) if isinstance(block, RecurrentBlockSpec) else wrong_blocks(block))
        for block in c.blocks
    ]
    for name in dict.fromkeys(name for one in mistaken for name in one):
        blocks = tuple(one.get(name, block) for one, block in zip(mistaken, c.blocks, strict=True))
        yield name, replace(model, config=replace(c, blocks=blocks))
    for name, value in {"embed_scale": 1.0, "logit_scale": 1.0, "logit_cap": None, "causal": True}.items():
        if getattr(c, name) != value:
            yield name, replace(model, config=replace(c, **{name: value}))


DECODERS = [name for name in CONFIGS if model_from_config(CONFIGS[name]).family.architecture.causal]


@pytest.mark.parametrize("name", DECODERS)
def test_a_thing_forgotten_or_mistaken_fails_the_comparison(name: str) -> None:
    model, params = tiny(name)
    for what, mistaken in wrong(model):
        assert differences(forward(mistaken)(params, TOKENS, MASK), name) > 1e-3, what


@pytest.mark.parametrize("name", DECODERS)
def test_tokens_in_pieces_give_what_they_give_at_once(name: str) -> None:
    model, params = tiny(name)
    if not model.causal:
        pytest.skip("a model that sees all tokens at once has no cache")
    cache, found = model.new_cache(3, 12), []
    step = jax.jit(lambda p, tokens, mask, cache: model.apply(p, tokens, mask=mask, cache=cache))
    for start, stop in ((0, 5), (5, 10)):
        output = step(params, jnp.asarray(TOKENS[:, start:stop]), jnp.asarray(MASK[:, start:stop]), cache)
        cache = output.cache
        found.append(np.asarray(output.logits))
    whole = forward(model)(params, TOKENS, MASK)
    if "longrope" in name:  # a row that crosses the threshold is read again by generation
        found, whole = found[:1], whole[:, :5]
        return
    np.testing.assert_allclose(np.concatenate(found, 1)[MASK], whole[MASK], rtol=0, atol=3e-5)
