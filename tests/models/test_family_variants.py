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
            name: {name: None}
            for name in ("window", "cap", "clip", "alibi", "chunk", "temperature", "v_norm")
            if getattr(attention, name) is not None
        }
        if attention.alibi is not None:
            slopes = attention.alibi.slopes
            changes["slopes"] = {"alibi": replace(attention.alibi, slopes=slopes[::-1])}
        if attention.sinks:
            changes["sinks"] = {"sinks": False}
        if attention.qk_norm is not None:
            changes["norms of heads"] = {"qk_norm": None}
    if isinstance(attention, LatentSpec) and attention.rotary is not None:
        rotary = attention.rotary
        changes["pairs"] = {"rotary": replace(rotary, neighbors=not rotary.neighbors)}
        changes["not rotated"] = {"rotary": None}
    place = "mlp" if isinstance(block.mlp, Experts) else "experts"
    experts = getattr(block, place, None)
    if isinstance(experts, Experts):
        other: dict[str, Any] = {"chosen": experts.chosen - 1 or 2}
        if place == "mlp":  # where a norm follows, a common factor of the weights is not seen
            other["normalize"] = not experts.normalize
        other["scoring"] = "softmax" if experts.scoring == "sigmoid" else "sigmoid"
        plain = {"weight_scale": 1.0, "correction": False, "router_bias": False, "bias": False, "limit": None}
        plain |= {"shared": 0, "shared_gate": False, "activation": "silu", "weigh_input": False}
        plain |= {"expert_scale": False}
        other |= {name: value for name, value in plain.items() if getattr(experts, name) != value}
        if experts.groups > 1:
            other["chosen_groups"] = experts.groups
        for name, value in other.items():
            yield f"experts' {name}", replace(block, **{place: replace(experts, **{name: value})})
    for name, change in changes.items():
        yield name, replace(block, attention=replace(attention, **change))
    if getattr(block, "out_scale", 1) != 1:
        yield "out_scale", replace(block, out_scale=1.0)
    if block.norm.offset:
        yield "offset", replace(block, norm=replace(block.norm, offset=0.0))
    moved = {"pre": "parallel", "parallel": "pre", "sandwich": "pre", "sum": "pre"}.get(block.placement)
    if moved is not None:
        yield "placement", replace(block, placement=moved)
    if block.norm.kind == "layer":
        yield "centering", replace(block, norm=replace(block.norm, kind="rms"))


def wrong(model: Model) -> Iterator[tuple[str, Model]]:
    """A model with one thing forgotten or mistaken, in all layers that have it."""
    c = model.config
    names = dict.fromkeys(name for block in c.blocks for name, _ in wrong_blocks(block))
    for name in names:
        blocks = tuple(dict(wrong_blocks(block)).get(name, block) for block in c.blocks)
        yield name, replace(model, config=replace(c, blocks=blocks))
    plain = {"embed_scale": 1.0, "logit_scale": 1.0, "logit_cap": None, "causal": True, "embed_norm": None}
    for name, value in plain.items():
        if getattr(c, name) != value:
            yield name, replace(model, config=replace(c, **{name: value}))
    if c.first_position:  # the same table, read from its start
        rows = c.max_length + c.first_position
        yield "first_position", replace(model, config=replace(c, first_position=0, max_length=rows))


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


@pytest.mark.parametrize("name", ["llama4, two experts, no norms of heads", "gemma4, experts"])
def test_every_expert_gives_what_the_chosen_give(name: str) -> None:
    model, params = tiny(name)
    tokens, mask = jnp.asarray(TOKENS), jnp.asarray(MASK)
    run = jax.jit(lambda p, capture: model.apply(p, tokens, mask=mask, capture=capture), static_argnums=1)
    chosen, every = run(params, ()), run(params, "blocks.*.post")
    assert len(every.captured) >= 2
    np.testing.assert_allclose(every.logits[MASK], chosen.logits[MASK], rtol=0, atol=3e-5)
