"""The decoder that every causal family shares: its configuration, and the flax.linen module it runs on.

The modules are linen, not nnx: `init` and `apply` are pure functions of a plain dictionary of parameters,
which is the object that merging, optax and checkpoints all work on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from mergelab.models.cache import Cache, Recurrent
from mergelab.models.layers.attention import AttentionSpec, soft_cap
from mergelab.models.layers.block import AnyBlock, Pass, Stream
from mergelab.models.layers.dense import Embed, Linear, scaled
from mergelab.models.layers.norms import Norm, NormKind
from mergelab.models.layers.per_layer import PER_LAYER_PARTS, PerLayer, per_layer_inputs
from mergelab.models.model import Architecture
from mergelab.models.sites import Tap

__all__ = [
    "DECODER",
    "ENTRANCE_PARTS",
    "Decoder",
    "DecoderConfig",
    "Entrance",
    "Exit",
    "embedded",
    "exit_parts",
]

ENTRANCE_PARTS = ("embed", "embed_up", "positions", "embed_norm", *PER_LAYER_PARTS)
"""Roots of the parameters that stand before the blocks, those that a model has of them."""


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder: its blocks, and what stands around them.

    Attributes:
        vocab_size, d_model: tokens, residual width.
        max_length: positions the model is made for; the size of the table of learned positions.
        blocks: what each layer is made of (`BlockSpec`, or another `AnyBlock`).
        norm: the norm of the end.
        learned_positions: whether positions are a table of embeddings, and not rotations in the blocks.
        first_position: row of that table that the first token of a text reads (OPT: 2).
        embed_width: width of the embeddings, where two projections stand between them and the stream: before
            the blocks, and before the logits (OPT 350m); None where it is that of the stream.
        embed_scale: what embeddings are multiplied with.
        embed_norm: norm of what enters the first block, or None (BLOOM).
        per_layer: vectors that blocks read beside the stream, or None (Gemma 4 E2B).
        logit_scale: what logits are multiplied with, before the cap (Cohere, Granite).
        logit_cap: soft cap of the logits, or None.
        logit_bias: whether logits of untied models have a bias (Phi 2).
        tied: whether the logits use the embedding matrix.
        causal: whether tokens see only earlier ones; False for models of embeddings (EmbeddingGemma).
        head: whether there are logits; False for weights saved without a head, or with one of another kind.
    """

    vocab_size: int
    d_model: int
    max_length: int
    blocks: tuple[AnyBlock, ...]
    norm: NormKind = field(default_factory=NormKind)
    learned_positions: bool = False
    first_position: int = 0
    embed_width: int | None = None
    embed_scale: float = 1.0
    embed_norm: NormKind | None = None
    per_layer: PerLayer | None = None
    logit_scale: float = 1.0
    logit_cap: float | None = None
    logit_bias: bool = False
    tied: bool = False
    causal: bool = True
    head: bool = True

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def n_heads(self) -> int:
        """Query heads of the first block with attention; 0 where none has it."""
        return self._attention.n_heads

    @property
    def n_kv_heads(self) -> int:
        """Key-value heads of the first block with attention; 0 where none has it."""
        return self._attention.n_kv_heads

    @property
    def head_dim(self) -> int:
        """Width of a head of the first block with attention; 0 where none has it."""
        return self._attention.head_dim

    @property
    def mlp_width(self) -> int:
        """Neurons of the feed-forward layer of the first block that has one (of one expert); else 0."""
        found: list[Any] = [mlp for block in self.blocks if (mlp := getattr(block, "mlp", None))]
        return found[0].hidden if found else 0

    @property
    def _attention(self) -> AttentionSpec:
        found: list[Any] = [one for block in self.blocks if (one := getattr(block, "attention", None))]
        return found[0] if found else AttentionSpec(0, 0, 0, 1.0)

    @property
    def recurrent(self) -> tuple[int, ...]:
        """Numbers of the blocks that keep a state, which holds all tokens at once."""
        return tuple(i for i, block in enumerate(self.blocks) if isinstance(block.kept, Recurrent))

    @property
    def borrowing(self) -> tuple[int, ...]:
        """Numbers of the blocks that read keys and values of an earlier one."""
        found = [getattr(getattr(block, "attention", None), "borrows", None) for block in self.blocks]
        return tuple(i for i, lender in enumerate(found) if lender is not None)

    @property
    def passes_only_the_stream(self) -> bool:
        """Whether a block reads nothing but the stream that the one before it left."""
        return self.per_layer is None and not self.borrowing

    @property
    def least_tensors(self) -> int:
        """Number of tensors that the files of such a model hold at least."""
        return sum(block.tensors for block in self.blocks)

    @property
    def residual_gain(self) -> float:
        """Initial gain of what is added to the residual stream, twice a layer: keeps the sum's scale."""
        return (2 * self.n_layers) ** -0.5

    def one_of_each(self) -> tuple[DecoderConfig, Sequence[int]]:
        """See `mergelab.models.derived.Configuration`."""
        outlines = {block: block.outline() for block in dict.fromkeys(self.blocks)}
        numbers = {outline: n for n, outline in enumerate(dict.fromkeys(outlines.values()))}
        return replace(self, blocks=tuple(numbers)), [numbers[outlines[block]] for block in self.blocks]


class Decoder(nn.Module):
    """Decoder-only transformer: tokens in, next-token logits out."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "batch length"],
        mask: Bool[Array, "batch length"] | None,
        cache: Cache | None,
        tap: Tap,
    ) -> tuple[Float[Array, "batch length vocab"] | None, Stream | None, Cache | None]:
        """Returns the logits (float32), the normalized last stream, and the cache with these tokens.

        Logits and stream are None if the tap is done before them.

        Args:
            tokens: token ids.
            positions: their positions, for rotary and learned embeddings.
            mask: False for padding; None if there is none.
            cache: earlier tokens, with room for these.
            tap: what to do at the sites.
        """
        c = self.config
        embed, x = _enter(c, tokens, positions, tap)

        beside = None if c.per_layer is None else per_layer_inputs(c.per_layer, tokens, x)
        shared = Pass(positions, mask, cache, tap, causal=c.causal, per_layer=beside)
        for i, spec in enumerate(c.blocks):
            if tap.done:
                return None, None, None
            x, keys_values = spec.module(i, c.residual_gain, f"blocks_{i}")(x, shared)
            shared.seen.append(keys_values)
        if cache is not None:
            assert shared.real is not None
            ks, vs = zip(*shared.seen, strict=True)
            length = cache.length + tokens.shape[1]
            cache = replace(cache, keys=ks, values=vs, mask=shared.real, length=length)
        if tap.done:
            return None, None, cache
        x = _normalize(c, x, tap)
        if tap.done or not c.head:
            return None, x, cache
        return _unembed(c, embed, x, tap), x, cache


class Entrance(nn.Module):
    """What a `Decoder` does before its blocks, with its parameters `ENTRANCE_PARTS`."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "batch length"], positions: Int[Array, "batch length"], tap: Tap
    ) -> Stream:
        """Returns what enters the first block."""
        return _enter(self.config, tokens, positions, tap)[1]


class Exit(nn.Module):
    """What a `Decoder` does after its blocks, with its parameters `exit_parts`."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Stream, tap: Tap) -> tuple[Float[Array, "batch length vocab"] | None, Stream]:
        """Returns the logits (float32), or None if the tap is done, and the normalized last stream."""
        c = self.config
        embed = _embedding(c) if c.tied else None
        x = _normalize(c, x, tap)
        return None if tap.done or not c.head else _unembed(c, embed, x, tap), x


def embedded(c: DecoderConfig, params: Mapping[str, Any], tokens: Int[Array, "batch length"]) -> Stream:
    """What tokens give the stream that enters the first block, without learned positions."""
    positions = jnp.zeros(tokens.shape, jnp.int32)
    named = {name: params[name] for name in ENTRANCE_PARTS if name in params}
    found: Any = Entrance(replace(c, learned_positions=False)).apply(
        {"params": named}, tokens, positions, Tap({})
    )
    return found


def exit_parts(c: DecoderConfig, logits: bool = True) -> tuple[str, ...]:
    """Roots of the parameters that stand behind the blocks, those that a model has of them."""
    head = ("unembed_down", "embed" if c.tied else "unembed") if logits else ()
    return ("final_norm", *head)


# These make modules in the scope of the module that calls them.


def _embedding(c: DecoderConfig) -> Embed:
    if c.embed_width is None:
        return Embed(c.vocab_size, c.d_model, "vocab", name="embed")
    return Embed(c.vocab_size, c.embed_width, "vocab", None, name="embed")


def _enter(
    c: DecoderConfig, tokens: Int[Array, "batch length"], positions: Int[Array, "batch length"], tap: Tap
) -> tuple[Embed, Stream]:
    embed = _embedding(c)
    x = scaled(embed(tokens), c.embed_scale)
    if c.embed_width is not None:
        x = Linear(c.d_model, (None, "embed"), name="embed_up")(x)
    if c.learned_positions:
        rows = c.max_length + c.first_position
        x = x + Embed(rows, c.d_model, name="positions")(positions + c.first_position)
    if c.embed_norm is not None:
        x = Norm(c.embed_norm, name="embed_norm")(x)
    return embed, tap("embed", x)


def _normalize(c: DecoderConfig, x: Stream, tap: Tap) -> Stream:
    return tap("unembed.input", Norm(c.norm, name="final_norm")(x, tap, "final_norm"))


def _unembed(
    c: DecoderConfig, embed: Embed | None, x: Stream, tap: Tap
) -> Float[Array, "batch length vocab"]:
    width = "embed"
    if c.embed_width is not None:
        x, width = Linear(c.embed_width, ("embed", None), name="unembed_down")(x), None
    unembed = Linear(c.vocab_size, (width, "vocab"), c.logit_bias, name="unembed")
    logits = unembed(x) if embed is None or not c.tied else embed.scores(x)
    return tap("logits", soft_cap(scaled(logits.astype(jnp.float32), c.logit_scale), c.logit_cap))


DECODER = Architecture(Decoder, causal=True)
