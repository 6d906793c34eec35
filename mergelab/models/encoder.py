"""The encoder: embeddings and blocks with the norm after each sum, as in BERT; its configuration."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from mergelab.models.layers.attention import Attention, visible_keys
from mergelab.models.layers.dense import Linear
from mergelab.models.layers.mlp import MLP
from mergelab.models.layers.norms import Norm, NormKind
from mergelab.models.model import Architecture
from mergelab.models.sites import Shape, Tap
from mergelab.models.table import Parameter, Parameters

__all__ = ["ENCODER", "Encoder", "EncoderConfig", "encoder_parameters", "encoder_sites"]


@dataclass(frozen=True)
class EncoderConfig:
    """The shape of an encoder; all its linear layers have biases, and norms come after each sum.

    Attributes:
        vocab_size, width, layers, heads: tokens, residual width, blocks, heads.
        mlp_width: neurons of a feed-forward layer.
        max_length: size of the table of positions.
        token_types: size of the table of segments.
        norm: the norm after the embeddings and after each sum.
        activation: of the feed-forward layers.
        pooler: whether the first token's last state passes a further layer (site `pooled`).
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    max_length: int
    token_types: int = 2
    norm: NormKind = field(default_factory=lambda: NormKind("layer", 1e-12))
    activation: str = "gelu"
    pooler: bool = True

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.width // self.heads


def encoder_sites(config: EncoderConfig) -> dict[str, Shape]:
    """Name and symbolic shape of every site, in the order of the forward pass."""
    c = config
    stream: Shape = ("batch", "length", c.width)
    factor: Shape = ("batch", "length", 1)
    head: Shape = ("batch", "length", c.heads, c.head_dim)
    sites: dict[str, Shape] = {"embed_norm.scale": factor, "embed": stream}
    for i in range(c.layers):
        sites |= {
            f"blocks.{i}.resid_pre": stream,
            f"blocks.{i}.attn.input": stream,
            f"blocks.{i}.attn.q": head,
            f"blocks.{i}.attn.k": head,
            f"blocks.{i}.attn.v": head,
            f"blocks.{i}.attn.pattern": ("batch", c.heads, "query", "key"),
            f"blocks.{i}.attn.z": head,
            f"blocks.{i}.attn.out": stream,
            f"blocks.{i}.attn_norm.scale": factor,
            f"blocks.{i}.resid_mid": stream,
            f"blocks.{i}.mlp.input": stream,
            f"blocks.{i}.mlp.pre": ("batch", "length", c.mlp_width),
            f"blocks.{i}.mlp.post": ("batch", "length", c.mlp_width),
            f"blocks.{i}.mlp.out": stream,
            f"blocks.{i}.mlp_norm.scale": factor,
            f"blocks.{i}.resid_post": stream,
        }
    return sites | ({"pooled": ("batch", c.width)} if c.pooler else {})


def encoder_parameters(config: EncoderConfig) -> Parameters:
    """Every parameter, keyed by its path; what `Encoder(config).init` makes."""
    c = config
    found: Parameters = {
        ("embed", "embedding"): Parameter((c.vocab_size, c.width), ("vocab", "embed")),
        ("positions", "embedding"): Parameter((c.max_length, c.width), (None, "embed")),
        ("token_types", "embedding"): Parameter((c.token_types, c.width), (None, "embed")),
    }
    linear = {
        ("attn", "q"): (c.width, c.width, "embed", "heads"),
        ("attn", "k"): (c.width, c.width, "embed", "kv_heads"),
        ("attn", "v"): (c.width, c.width, "embed", "kv_heads"),
        ("attn", "o"): (c.width, c.width, "heads", "embed"),
        ("mlp", "up"): (c.width, c.mlp_width, "embed", "mlp"),
        ("mlp", "down"): (c.mlp_width, c.width, "mlp", "embed"),
    }
    norms = [("embed_norm",)]
    for i in range(c.layers):
        block = f"blocks_{i}"
        norms += [(block, "attn_norm"), (block, "mlp_norm")]
        for path, (inputs, outputs, from_axis, to_axis) in linear.items():
            found[block, *path, "kernel"] = Parameter((inputs, outputs), (from_axis, to_axis))
            found[block, *path, "bias"] = Parameter((outputs,), (to_axis,))
    for path in norms:
        found[*path, "scale"] = Parameter((c.width,), ("embed",))
        found[*path, "bias"] = Parameter((c.width,), ("embed",))
    if c.pooler:
        # Its two sides cannot be split along one mesh axis: the inputs are.
        found["pooler", "kernel"] = Parameter((c.width, c.width), ("embed", None))
        found["pooler", "bias"] = Parameter((c.width,), (None,))
    return found


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
