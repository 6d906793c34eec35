"""The encoder: what stands before and after the blocks of models that see all tokens at once, as in BERT."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Int

from mergelab.models.layers.attention import AttentionSpec
from mergelab.models.layers.block import AnyBlock, BlockSpec, Pass, Stream
from mergelab.models.layers.dense import Embed, Linear
from mergelab.models.layers.mlp import MLPSpec
from mergelab.models.layers.norms import Norm, NormKind
from mergelab.models.layers.relative import RelativeBias, RelativeVectors
from mergelab.models.model import Architecture
from mergelab.models.sites import Tap
from mergelab.models.stack import Stack

__all__ = ["ENCODER", "Encoder", "EncoderConfig", "EncoderEntrance", "EncoderExit", "bert_blocks"]


@dataclass(frozen=True)
class EncoderConfig(Stack):
    """An encoder: its blocks, and what stands around them.

    Attributes:
        vocab_size, d_model: tokens, residual width.
        max_length: positions the model is made for.
        blocks: what each layer is made of.
        learned_positions: whether positions are a table of embeddings.
        first_position: row of that table that the first token of a text reads (RoBERTa: 2).
        skips_padding: whether positions count real tokens alone (RoBERTa), and not all.
        token_types: size of the table of segments; 0 without one.
        embed_norm, final_norm: norm of the embeddings, and of the last block's output; None without one.
        relative: what all blocks share of relative positions, or None.
        pooler: whether the first token's last state passes a further layer (site `pooled`).
        causal: whether tokens see only earlier ones (CLIP's tower for text).
    """

    vocab_size: int
    d_model: int
    max_length: int
    blocks: tuple[AnyBlock, ...]
    learned_positions: bool = True
    first_position: int = 0
    skips_padding: bool = False
    token_types: int = 0
    embed_norm: NormKind | None = field(default_factory=lambda: NormKind("layer", 1e-12))
    final_norm: NormKind | None = None
    relative: RelativeBias | RelativeVectors | None = None
    pooler: bool = False
    causal: bool = False


def bert_blocks(
    layers: int, heads: int, head_dim: int, mlp: MLPSpec, norm: NormKind, **attention: Any
) -> tuple[BlockSpec, ...]:
    """Blocks of BERT and its kin: biases everywhere, norms after each sum; equal ones are one object.

    Args:
        layers: number of blocks.
        heads: number of heads.
        head_dim: width of a head.
        mlp: the feed-forward layer.
        norm: the norm after each sum.
        attention: fields of `AttentionSpec` that a family sets otherwise.
    """
    usual: dict[str, Any] = {"n_heads": heads, "n_kv_heads": heads, "head_dim": head_dim}
    usual |= {"scale": head_dim**-0.5, "qkv_bias": True, "out_bias": True}
    return (BlockSpec(AttentionSpec(**usual | attention), mlp, norm, "after"),) * layers


class Encoder(nn.Module):
    """Bidirectional transformer: tokens in, one vector per token out."""

    config: EncoderConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "batch length"],
        mask: Bool[Array, "batch length"] | None,
        cache: None,
        tap: Tap,
        token_types: Int[Array, "batch length"] | None = None,
    ) -> tuple[None, Stream | None, None]:
        """Returns `(None, the last hidden state, None)`: a decoder's results, without logits and cache.

        Args:
            tokens: token ids.
            positions: their positions.
            mask: False for padding; None if there is none.
            cache: None; encoders see all tokens at once.
            tap: what to do at the sites.
            token_types: the segment of each token; 0 if not given.
        """
        c = self.config
        x = _enter(c, tokens, positions, token_types, tap)
        relative = None if c.relative is None else c.relative.module("relative")(tokens.shape[1])
        shared = Pass(positions, mask, None, tap, causal=c.causal, relative=relative)
        for i, spec in enumerate(c.blocks):
            if tap.done:
                return None, None, None
            x, _ = spec.module(i, 1.0, f"blocks_{i}")(x, shared)
        if tap.done:
            return None, None, None
        return None, _leave(c, x, tap), None


class EncoderEntrance(nn.Module):
    """What an `Encoder` does before its blocks, with its parameters of those names."""

    config: EncoderConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "batch length"],
        token_types: Int[Array, "batch length"] | None,
        tap: Tap,
    ) -> Stream:
        """Returns what enters the first block."""
        return _enter(self.config, tokens, positions, token_types, tap)


class EncoderExit(nn.Module):
    """What an `Encoder` does after its blocks, with its parameters `final_norm` and `pooler`."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Stream, tap: Tap) -> Stream:
        """Returns the last hidden state."""
        return _leave(self.config, x, tap)


# The two make modules in the scope of the module that calls them.


def _enter(
    c: EncoderConfig,
    tokens: Int[Array, "batch length"],
    positions: Int[Array, "batch length"],
    token_types: Int[Array, "batch length"] | None,
    tap: Tap,
) -> Stream:
    x = Embed(c.vocab_size, c.d_model, "vocab", name="embed")(tokens)
    if c.learned_positions:
        rows = c.max_length + c.first_position
        x = x + Embed(rows, c.d_model, name="positions")(positions + c.first_position)
    if c.token_types:
        types = jnp.zeros_like(tokens) if token_types is None else token_types
        x = x + Embed(c.token_types, c.d_model, name="token_types")(types)
    if c.embed_norm is not None:
        x = Norm(c.embed_norm, name="embed_norm")(x, tap, "embed_norm")
    return tap("embed", x)


def _leave(c: EncoderConfig, x: Stream, tap: Tap) -> Stream:
    if c.final_norm is not None:
        x = Norm(c.final_norm, name="final_norm")(x, tap, "final_norm")
    if c.pooler:
        # Its two sides cannot be split along one mesh axis: the inputs are.
        pooled = Linear(c.d_model, ("embed", None), bias=True, name="pooler")(x[:, :1])
        tap("pooled", jnp.tanh(pooled[:, 0]))
    return x


ENCODER = Architecture(Encoder, causal=False)
