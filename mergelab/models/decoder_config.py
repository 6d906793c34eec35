"""Everything that distinguishes one decoder-only transformer from another, as one frozen object."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mergelab.models.layers.norms import NormKind
from mergelab.models.layers.rotary import Rotary
from mergelab.models.sites import Shape

__all__ = ["DecoderConfig", "Experts", "decoder_sites"]


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of one feed-forward layer.

    Attributes:
        count: how many experts there are.
        chosen: how many each token uses.
    """

    count: int
    chosen: int


@dataclass(frozen=True)
class DecoderConfig:
    """The shape and the switches of a decoder.

    Attributes:
        vocab_size, width, layers: tokens, residual width, blocks.
        heads, kv_heads, head_dim: query heads, key-value heads, width of a head.
        mlp_width: neurons of a feed-forward layer (of one expert).
        max_length: positions the model is made for; the size of the table of learned positions.
        rotary: per layer, how queries and keys are rotated; empty for learned positions.
        windows: per layer, the sliding window, or None for full attention.
        norm: the norm of blocks and of the end.
        block: `sequential` (attention, then MLP), `parallel` (both read the block's input: GPT-NeoX), or
            `sandwich` (sequential, with a second norm on what each adds: Gemma 2).
        query_scale: what attention scores are multiplied with (usually `head_dim**-0.5`).
        qkv_bias, out_bias, mlp_bias: whether those projections have biases.
        qk_norm: the norm of each query and key head, or None.
        attention_cap, logit_cap: soft caps, or None.
        activation, gated: of the feed-forward layers.
        experts: the mixture of experts, or None.
        embed_scale: what embeddings are multiplied with.
        tied: whether the logits use the embedding matrix.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    max_length: int
    rotary: tuple[Rotary, ...]
    windows: tuple[int | None, ...]
    query_scale: float
    norm: NormKind = field(default_factory=NormKind)
    block: Literal["sequential", "parallel", "sandwich"] = "sequential"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: NormKind | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None
    activation: str = "silu"
    gated: bool = True
    experts: Experts | None = None
    embed_scale: float = 1.0
    tied: bool = False

    @property
    def residual_gain(self) -> float:
        """Initial gain of what is added to the residual stream, twice a layer: keeps the sum's scale."""
        return (2 * self.layers) ** -0.5


def decoder_sites(config: DecoderConfig) -> dict[str, Shape]:
    """Name and symbolic shape of every site, in the order of the forward pass."""
    c = config
    stream: Shape = ("batch", "length", c.width)
    factor: Shape = ("batch", "length", 1)
    neurons: Shape = ("batch", "length", c.mlp_width)
    if c.experts is not None:
        neurons = ("batch", "length", c.experts.count, c.mlp_width)
    sites: dict[str, Shape] = {"embed": stream}
    for i in range(c.layers):
        sites |= {
            f"blocks.{i}.resid_pre": stream,
            f"blocks.{i}.attn_norm.scale": factor,
            f"blocks.{i}.attn.input": stream,
            f"blocks.{i}.attn.q": ("batch", "length", c.heads, c.head_dim),
            f"blocks.{i}.attn.k": ("batch", "length", c.kv_heads, c.head_dim),
            f"blocks.{i}.attn.v": ("batch", "length", c.kv_heads, c.head_dim),
            f"blocks.{i}.attn.pattern": ("batch", c.heads, "query", "key"),
            f"blocks.{i}.attn.z": ("batch", "length", c.heads, c.head_dim),
            f"blocks.{i}.attn.out": stream,
        }
        if c.block != "parallel":
            sites[f"blocks.{i}.resid_mid"] = stream
        sites |= {f"blocks.{i}.mlp_norm.scale": factor, f"blocks.{i}.mlp.input": stream}
        if c.experts is not None:
            sites[f"blocks.{i}.mlp.router"] = ("batch", "length", c.experts.count)
        sites |= {
            f"blocks.{i}.mlp.pre": neurons,
            f"blocks.{i}.mlp.post": neurons,
            f"blocks.{i}.mlp.out": stream,
            f"blocks.{i}.resid_post": stream,
        }
    return sites | {
        "final_norm.scale": factor,
        "unembed.input": stream,
        "logits": ("batch", "length", c.vocab_size),
    }
