"""The encoder: embeddings and blocks with the norm after each sum, as in BERT; its configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from mergelab.models.layers.attention import Attention, AttentionSpec, visible_keys
from mergelab.models.layers.dense import Embed, Linear
from mergelab.models.layers.mlp import MLP, MLPSpec
from mergelab.models.layers.norms import Norm, NormKind
from mergelab.models.model import Architecture
from mergelab.models.sites import Tap

__all__ = [
    "ENCODER",
    "Encoder",
    "EncoderBlock",
    "EncoderConfig",
    "EncoderEntrance",
    "EncoderExit",
    "all_visible",
]


@dataclass(frozen=True)
class EncoderConfig:
    """The shape of an encoder; all its linear layers have biases, and norms come after each sum.

    Attributes:
        vocab_size, width, layers, heads: tokens, residual width, blocks, heads.
        mlp_width: neurons of a feed-forward layer.
        max_length: size of the table of positions.
        token_types: size of the table of segments.
        norm: the norm after the embeddings and after each sum.
        activation: name of the activation function of the feed-forward layers.
        pooler: whether the first token's last state passes a further layer (site `pooled`).
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    mlp_width: int
    max_length: int
    token_types: int = 2
    norm: NormKind = field(default_factory=lambda: NormKind("layer", 1e-12))
    activation: str = "gelu"
    pooler: bool = True

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.d_model // self.n_heads

    @property
    def least_tensors(self) -> int:
        """Number of tensors that the files of such a model hold at least."""
        return self.n_layers

    @property
    def learned_positions(self) -> bool:
        """Positions are a table of embeddings."""
        return True

    def one_of_each(self) -> tuple[EncoderConfig, Sequence[int]]:
        """See `mergelab.models.derived.Configuration`."""
        return replace(self, n_layers=1), (0,) * self.n_layers


Stream = Float[Array, "batch length width"]


class EncoderBlock(nn.Module):
    """One encoder block; its norms come after each sum, on the residual stream itself."""

    config: EncoderConfig
    layer: int

    @nn.compact
    def __call__(self, x: Stream, visible: Bool[Array, "rows length length"], tap: Tap) -> Stream:
        c, site = self.config, f"blocks.{self.layer}"
        x = tap(f"{site}.resid_pre", x)
        heads = AttentionSpec(
            n_heads=c.n_heads,
            n_kv_heads=c.n_heads,
            head_dim=c.head_dim,
            scale=c.head_dim**-0.5,
            qkv_bias=True,
            out_bias=True,
        )
        attention = Attention(heads, name="attn")
        attended, _ = attention(x, visible, None, None, self.layer, tap, f"{site}.attn")
        if tap.done:
            return x
        x = Norm(c.norm, name="attn_norm")(x + attended, tap, f"{site}.attn_norm")
        x = tap(f"{site}.resid_mid", x)
        mlp = MLP(MLPSpec(c.mlp_width, c.activation, gated=False, bias=True), name="mlp")
        x = Norm(c.norm, name="mlp_norm")(x + mlp(x, tap, f"{site}.mlp"), tap, f"{site}.mlp_norm")
        return tap(f"{site}.resid_post", x)


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
        visible = all_visible(x, mask)
        for i in range(c.n_layers):
            if tap.done:
                return None, None, None
            x = EncoderBlock(c, i, name=f"blocks_{i}")(x, visible, tap)
        if tap.done:
            return None, None, None
        _pool(c, x, tap)
        return None, x, None


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
    """What an `Encoder` does after its blocks, with its parameter `pooler`."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Stream, tap: Tap) -> Stream:
        """Returns the last hidden state."""
        _pool(self.config, x, tap)
        return x


def all_visible(x: Stream, mask: Bool[Array, "batch length"] | None) -> Bool[Array, "rows length length"]:
    """What `EncoderBlock` takes as `visible`: every token sees all real ones."""
    slots = jnp.arange(x.shape[1], dtype=jnp.int32)
    return visible_keys(slots, x.shape[1], mask, causal=False)


# The two make modules in the scope of the module that calls them.


def _enter(
    c: EncoderConfig,
    tokens: Int[Array, "batch length"],
    positions: Int[Array, "batch length"],
    token_types: Int[Array, "batch length"] | None,
    tap: Tap,
) -> Stream:
    types = jnp.zeros_like(tokens) if token_types is None else token_types
    x = Embed(c.vocab_size, c.d_model, "vocab", name="embed")(tokens)
    x = x + Embed(c.max_length, c.d_model, name="positions")(positions)
    x = x + Embed(c.token_types, c.d_model, name="token_types")(types)
    return tap("embed", Norm(c.norm, name="embed_norm")(x, tap, "embed_norm"))


def _pool(c: EncoderConfig, x: Stream, tap: Tap) -> None:
    if c.pooler:
        # Its two sides cannot be split along one mesh axis: the inputs are.
        pooled = Linear(c.d_model, ("embed", None), bias=True, name="pooler")(x[:, :1])
        tap("pooled", jnp.tanh(pooled[:, 0]))


ENCODER = Architecture(Encoder, causal=False)
