"""Everything that distinguishes one BERT-like encoder from another, its sites and its parameters."""

from __future__ import annotations

from dataclasses import dataclass, field

from mergelab.models.layers.norms import NormKind
from mergelab.models.sites import Shape
from mergelab.models.table import Parameter, Parameters

__all__ = ["EncoderConfig", "encoder_parameters", "encoder_sites"]


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
            f"blocks.{i}.attn.q": head,
            f"blocks.{i}.attn.k": head,
            f"blocks.{i}.attn.v": head,
            f"blocks.{i}.attn.pattern": ("batch", c.heads, "query", "key"),
            f"blocks.{i}.attn.z": head,
            f"blocks.{i}.attn.out": stream,
            f"blocks.{i}.attn_norm.scale": factor,
            f"blocks.{i}.resid_mid": stream,
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
