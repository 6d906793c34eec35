"""The decoder that every causal family shares, as flax.linen modules driven by a `DecoderConfig`.

The modules are linen, not nnx: `init` and `apply` are pure functions of a plain dictionary of parameters,
which is the object that merging, optax and checkpoints all work on.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from mergelab.models.cache import Cache
from mergelab.models.decoder_config import DecoderConfig, decoder_sites
from mergelab.models.decoder_parameters import decoder_parameters
from mergelab.models.layers.attention import Attention, KeysValues, soft_cap, visible_keys
from mergelab.models.layers.dense import Linear, matmul
from mergelab.models.layers.mlp import MLP, MixtureOfExperts
from mergelab.models.layers.norms import Norm
from mergelab.models.layers.rotary import rotary_tables
from mergelab.models.model import Architecture
from mergelab.models.sites import Tap

__all__ = ["DECODER", "Decoder"]

Stream = Float[Array, "batch length width"]
Rotation = tuple[Float[Array, "batch length half"], Float[Array, "batch length half"]]


class Block(nn.Module):
    """One transformer block.

    What attention and MLP add to the stream is their `out` site; in a sandwich block it is normalized first,
    so the sites hold what is really added.
    """

    config: DecoderConfig
    layer: int

    @nn.compact
    def __call__(
        self,
        x: Stream,
        visible: Bool[Array, "rows length key"],
        rotation: Rotation | None,
        cache: Cache | None,
        tap: Tap,
    ) -> tuple[Stream, KeysValues]:
        c, site = self.config, f"blocks.{self.layer}"
        x = tap(f"{site}.resid_pre", x)
        attention = Attention(
            heads=c.heads,
            kv_heads=c.kv_heads,
            head_dim=c.head_dim,
            scale=c.query_scale,
            qkv_bias=c.qkv_bias,
            out_bias=c.out_bias,
            qk_norm=c.qk_norm,
            cap=c.attention_cap,
            out_norm=c.norm if c.block == "sandwich" else None,
            initial_gain=c.residual_gain,
            name="attn",
        )
        normed = Norm(c.norm, name="attn_norm")(x, tap, f"{site}.attn_norm")
        attended, seen = attention(normed, visible, rotation, cache, self.layer, tap, f"{site}.attn")
        if tap.done:
            return x, seen
        if c.block == "parallel":
            normed = Norm(c.norm, name="mlp_norm")(x, tap, f"{site}.mlp_norm")
            return tap(f"{site}.resid_post", x + attended + self._mlp()(normed, tap, f"{site}.mlp")), seen
        x = tap(f"{site}.resid_mid", x + attended)
        normed = Norm(c.norm, name="mlp_norm")(x, tap, f"{site}.mlp_norm")
        return tap(f"{site}.resid_post", x + self._mlp()(normed, tap, f"{site}.mlp")), seen

    def _mlp(self) -> MLP | MixtureOfExperts:
        c = self.config
        if c.experts is not None:
            return MixtureOfExperts(
                c.experts.count, c.experts.chosen, c.mlp_width, c.activation, c.residual_gain, name="mlp"
            )
        out_norm = c.norm if c.block == "sandwich" else None
        return MLP(c.mlp_width, c.activation, c.gated, c.mlp_bias, out_norm, c.residual_gain, name="mlp")


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
        embed = nn.Embed(c.vocab_size, c.width, embedding_init=nn.initializers.normal(0.02), name="embed")
        x = embed(tokens)
        if c.embed_scale != 1.0:
            x = x * jnp.asarray(c.embed_scale, x.dtype)
        if not c.rotary:
            table = nn.Embed(
                c.max_length, c.width, embedding_init=nn.initializers.normal(0.02), name="positions"
            )
            x = x + table(positions)
        x = tap("embed", x)

        length = tokens.shape[1]
        if cache is None:
            queries, keys, real = jnp.arange(length, dtype=jnp.int32), length, mask
        else:
            queries, keys = cache.length + jnp.arange(length, dtype=jnp.int32), cache.slots
            real = cache.extend_mask(jnp.ones(tokens.shape, jnp.bool_) if mask is None else mask)
        visible = {w: visible_keys(queries, keys, real, window=w) for w in dict.fromkeys(c.windows)}
        rotations: dict[object, Rotation] = {r: rotary_tables(positions, r) for r in dict.fromkeys(c.rotary)}

        seen: list[KeysValues] = []
        for i in range(c.layers):
            if tap.done:
                return None, None, None
            rotation = rotations[c.rotary[i]] if c.rotary else None
            block = Block(c, i, name=f"blocks_{i}")
            x, keys_values = block(x, visible[c.windows[i]], rotation, cache, tap)
            seen.append(keys_values)
        if cache is not None:
            assert real is not None
            ks, vs = zip(*seen, strict=True)
            cache = Cache(keys=ks, values=vs, mask=real, length=cache.length + length)
        if tap.done:
            return None, None, cache
        x = tap("unembed.input", Norm(c.norm, name="final_norm")(x, tap, "final_norm"))
        if tap.done:
            return None, x, cache
        logits = matmul(x, embed.embedding.T) if c.tied else Linear(c.vocab_size, name="unembed")(x)
        return tap("logits", soft_cap(logits.astype(jnp.float32), c.logit_cap)), x, cache


DECODER = Architecture(Decoder, decoder_parameters, decoder_sites, causal=True)
