"""Variants of each family, and controls: what is forgotten or taken for another thing changes outputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.models.encoder import EncoderConfig
from mergelab.models.families import model_from_config
from mergelab.models.layers.attention import AttentionSpec
from mergelab.models.layers.block import BlockSpec
from mergelab.models.layers.latent_attention import LatentSpec
from mergelab.models.layers.mamba import Mamba2Spec
from mergelab.models.layers.recurrent_block import RecurrentBlockSpec
from mergelab.models.layers.relative import RelativeBias, RelativeVectors, buckets_of, places_of
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
        if attention.gated:
            changes["gate"] = {"gated": False}
        if attention.sinks:
            changes["sinks"] = {"sinks": False}
        if attention.qk_norm is not None:
            changes["norms of heads"] = {"qk_norm": None}
        if attention.borrows:  # the other layer of its kind
            changes["lender"] = {"borrows": attention.borrows - (attention.window is not None)}
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
    if getattr(block, "per_layer", False):
        yield "vectors per layer", replace(block, per_layer=False)
    if getattr(block, "out_scale", 1) != 1:
        yield "out_scale", replace(block, out_scale=1.0)
    if block.norm.offset:
        yield "offset", replace(block, norm=replace(block.norm, offset=0.0))
    moved = {"pre": "parallel", "parallel": "pre", "sandwich": "pre", "after": "pre"}.get(block.placement)
    if moved is not None:
        yield "placement", replace(block, placement=moved)
    if block.norm.kind == "layer":
        yield "centering", replace(block, norm=replace(block.norm, kind="rms"))


def wrong_encoders(c: EncoderConfig) -> Iterator[tuple[str, EncoderConfig]]:
    """The encoder with one thing around its blocks, or shared by them, forgotten or mistaken."""
    if c.learned_positions:
        yield "first position", replace(c, first_position=c.first_position + 1, max_length=c.max_length - 1)
        yield "padding", replace(c, skips_padding=not c.skips_padding)
    yield from (
        (name, replace(c, **{name: None})) for name in ("embed_norm", "final_norm") if getattr(c, name)
    )
    if c.causal:
        yield "causal", replace(c, causal=False)
    if isinstance(c.relative, RelativeBias):
        yield "no bias", replace(c, relative=None)
        yield "buckets", replace(c, relative=replace(c.relative, buckets=12))
    if isinstance(c.relative, RelativeVectors):
        if c.relative.reach and c.relative.span > 4:  # fewer buckets clip alike
            yield "reach", replace(c, relative=replace(c.relative, reach=None))
        if c.relative.norm is not None:
            yield "norm of vectors", replace(c, relative=replace(c.relative, norm=None))
        blocks: Any = c.blocks
        how = blocks[0].attention.disentangled
        for name in ("content_to_position", "position_to_content"):
            if getattr(how, name):
                attention = replace(blocks[0].attention, disentangled=replace(how, **{name: False}))
                yield name, replace(c, blocks=tuple(replace(one, attention=attention) for one in blocks))


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
    if isinstance(c, EncoderConfig):
        yield from ((name, replace(model, config=config)) for name, config in wrong_encoders(c))
        return
    plain = {"embed_scale": 1.0, "logit_scale": 1.0, "logit_cap": None, "causal": True, "embed_norm": None}
    for name, value in plain.items():
        if getattr(c, name) != value:
            yield name, replace(model, config=replace(c, **{name: value}))
    if c.first_position:  # the same table, read from its start
        rows = c.max_length + c.first_position
        yield "first_position", replace(model, config=replace(c, first_position=0, max_length=rows))


DECODERS = [name for name in CONFIGS if model_from_config(CONFIGS[name]).family.architecture.causal]


@pytest.mark.parametrize("name", CONFIGS)
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
    # A row that crosses the threshold of LongRoPE in its second piece is read again by generation.
    kept = MASK & (MASK.sum(1) <= 8)[:, None] if "longrope" in name else MASK
    np.testing.assert_allclose(np.concatenate(found, 1)[kept], whole[kept], rtol=0, atol=3e-5)


@pytest.mark.oracle
def test_relative_positions_are_those_of_transformers() -> None:
    import torch
    from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position
    from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

    steps = torch.arange(600)
    expected = MPNetEncoder.relative_position_bucket(steps[None] - steps[:, None])
    np.testing.assert_array_equal(buckets_of(600, RelativeBias(1, 32)), expected.numpy())
    vectors = torch.zeros(1, 600, 1)
    for span, reach in ((256, 512), (4, 64), (16, None)):
        found = places_of(600, RelativeVectors(1, span, reach))
        buckets = {} if reach is None else {"bucket_size": span, "max_position": reach}
        relative = build_relative_position(vectors, vectors, **buckets)[0].numpy()
        np.testing.assert_array_equal(found, np.clip(relative + span, 0, 2 * span - 1))


@pytest.mark.parametrize("name", ["llama4, two experts, no norms of heads", "gemma4, experts"])
def test_every_expert_gives_what_the_chosen_give(name: str) -> None:
    model, params = tiny(name)
    tokens, mask = jnp.asarray(TOKENS), jnp.asarray(MASK)
    run = jax.jit(lambda p, capture: model.apply(p, tokens, mask=mask, capture=capture), static_argnums=1)
    chosen, every = run(params, ()), run(params, "blocks.*.post")
    assert len(every.captured) >= 2
    np.testing.assert_allclose(every.logits[MASK], chosen.logits[MASK], rtol=0, atol=3e-5)
