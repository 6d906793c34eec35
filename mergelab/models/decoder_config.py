"""Everything that distinguishes one decoder-only transformer from another, as one frozen object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from mergelab.models.layers.norms import NormKind
from mergelab.models.layers.rotary import Rotary

__all__ = ["DecoderConfig", "Experts"]


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

    def one_of_each(self) -> tuple[DecoderConfig, Sequence[int]]:
        """See `mergelab.models.derived.Configuration`."""
        # Layers differ in rotation and window only, which change no shape.
        rotary = (Rotary(10000.0, 2),) if self.rotary else ()
        return replace(self, layers=1, rotary=rotary, windows=(None,)), (0,) * self.layers
