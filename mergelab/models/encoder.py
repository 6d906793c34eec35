"""The bidirectional encoder of the BERT family, as flax.linen modules driven by an `EncoderConfig`."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from mergelab.models.encoder_config import EncoderConfig, encoder_parameters, encoder_sites
from mergelab.models.family import Architecture
from mergelab.models.layers.attention import Attention
from mergelab.models.layers.linear import Linear
from mergelab.models.layers.masks import visible_keys
from mergelab.models.layers.mlp import MLP
from mergelab.models.layers.norms import Norm
from mergelab.models.sites import Tap

__all__ = ["ENCODER", "Encoder"]

Stream = Float[Array, "batch length width"]


class Block(nn.Module):
    """One encoder block; its norms come after each sum, on the residual stream itself."""

    config: EncoderConfig
    layer: int

    @nn.compact
    def __call__(self, x: Stream, visible: Bool[Array, "rows length length"], tap: Tap) -> Stream:
        c, site = self.config, f"blocks.{self.layer}"
        x = tap(f"{site}.resid_pre", x)
        attention = Attention(
            heads=c.heads,
            kv_heads=c.heads,
            head_dim=c.head_dim,
            scale=c.head_dim**-0.5,
            qkv_bias=True,
            out_bias=True,
            name="attn",
        )
        attended, _ = attention(x, visible, None, None, self.layer, tap, f"{site}.attn")
        if tap.done:
            return x
        x = Norm(c.norm, name="attn_norm")(x + attended, tap, f"{site}.attn_norm")
        x = tap(f"{site}.resid_mid", x)
        mlp = MLP(c.mlp_width, c.activation, gated=False, bias=True, name="mlp")
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

        def table(rows: int, name: str) -> nn.Embed:
            return nn.Embed(rows, c.width, embedding_init=nn.initializers.normal(0.02), name=name)

        types = jnp.zeros_like(tokens) if token_types is None else token_types
        x = table(c.vocab_size, "embed")(tokens) + table(c.max_length, "positions")(positions)
        x = x + table(c.token_types, "token_types")(types)
        x = tap("embed", Norm(c.norm, name="embed_norm")(x, tap, "embed_norm"))
        slots = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        visible = visible_keys(slots, tokens.shape[1], mask, causal=False)
        for i in range(c.layers):
            if tap.done:
                return None, None, None
            x = Block(c, i, name=f"blocks_{i}")(x, visible, tap)
        if tap.done:
            return None, None, None
        if c.pooler:
            pooled = Linear(c.width, bias=True, name="pooler")(x[:, :1])
            tap("pooled", jnp.tanh(pooled[:, 0]))
        return None, x, None


ENCODER = Architecture(Encoder, encoder_parameters, encoder_sites, causal=False)
