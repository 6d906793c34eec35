"""Blocks: what one is made of, said per layer, and the module that the usual ones run on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from mergelab.models.cache import Cache, Kept
from mergelab.models.layers.alibi import Alibi, distance_bias
from mergelab.models.layers.attention import Attention, AttentionSpec, KeysValues, visible_keys
from mergelab.models.layers.experts import MixtureOfExperts
from mergelab.models.layers.fused_attention import Form
from mergelab.models.layers.latent_attention import LatentAttention, LatentSpec
from mergelab.models.layers.mlp import MLP, MLPSpec
from mergelab.models.layers.norms import Norm, NormKind
from mergelab.models.layers.relative import RelativePlaces
from mergelab.models.layers.rotary import Rotary, rotary_tables
from mergelab.models.layers.routing import Experts
from mergelab.models.sites import Tap

__all__ = ["AnyBlock", "Block", "BlockSpec", "Pass", "Stream"]

Stream = Float[Array, "batch length width"]
Rotation = tuple[Float[Array, "batch length half"], Float[Array, "batch length half"]]


class Pass:
    """What the blocks of one forward pass share; masks and rotations are made once for all that use them.

    Attributes:
        cache: earlier tokens, with room for these; None without a cache.
        tap: what to do at the sites.
        relative: what the blocks of an encoder share of relative positions: a bias of their scores
            `[1, heads, query, key]` (MPNet), or vectors that heads look at (DeBERTa); None of neither.
        mask: False for padding among the tokens of this pass; None if there is none.
        seen: keys and values of the blocks so far, for those that borrow them.

    Args:
        positions: positions of the tokens, for rotations.
        mask: False for padding; None if there is none.
        cache: earlier tokens, or None.
        tap: what to do at the sites.
        causal: whether tokens see only earlier ones.
        relative: same as the attribute.
        per_layer: what each block reads beside the stream (`layers/per_layer.py`); None if nothing.
    """

    def __init__(
        self,
        positions: Int[Array, "batch length"],
        mask: Bool[Array, "batch length"] | None,
        cache: Cache | None,
        tap: Tap,
        causal: bool = True,
        relative: Any = None,
        per_layer: Float[Array, "batch length layers narrow"] | None = None,
    ) -> None:
        self.cache, self.tap, self._positions, self._causal = cache, tap, positions, causal
        self.relative, self.mask, self._per_layer = relative, mask, per_layer
        self.seen: list[KeysValues] = []
        length = positions.shape[1]
        steps = jnp.arange(length, dtype=jnp.int32)
        self._queries = steps
        if cache is not None:
            self._queries = cache.length[0] + steps if cache.even else cache.length[:, None] + steps[None]
        self._keys = length if cache is None else cache.slots
        self.real = mask
        if cache is not None:
            self.real = cache.extend_mask(jnp.ones(positions.shape, jnp.bool_) if mask is None else mask)
        self._visible: dict[tuple[int | None, int | None], Bool[Array, "rows length key"]] = {}
        self._rotations: dict[Rotary, Rotation] = {}
        self._biases: dict[Alibi, Float[Array, "rows heads #length key"]] = {}

    def visible(self, window: int | None = None, chunk: int | None = None) -> Bool[Array, "rows length key"]:
        """True where a token may look at a key: at itself and earlier ones (or all), within window and chunk.

        Chunks are of so many tokens, counted over real ones.
        """
        if (window, chunk) not in self._visible:
            seen = visible_keys(self._queries, self._keys, self.real, self._causal, window=window)
            if chunk is not None and self._keys > chunk:
                own, keys = self._positions // chunk, self._key_positions // chunk
                seen &= own[:, :, None] == keys[:, None]
            self._visible[window, chunk] = seen
        return self._visible[window, chunk]

    def given(self, attention: AttentionSpec) -> dict[str, Any]:
        """What positions mean to the attention of a layer, beside rotations, as arguments of `Attention`."""
        tuning = attention.temperature
        growth = None if tuning is None else tuning.factor(self._positions)
        bias, relative = self._bias(attention.alibi), self.relative
        given: dict[str, Any] = {"bias": bias, "growth": growth}
        if isinstance(relative, RelativePlaces):
            return given | {"relative": relative}
        if relative is not None:
            return given | {"bias": relative}
        plain = self.cache is None and self.real is None and attention.chunk is None
        return given | {"form": Form(self._causal, attention.window) if plain else None}

    def lent(self, attention: AttentionSpec) -> KeysValues | None:
        """Keys and values of the block that attention borrows of; None where it has its own."""
        if attention.borrows is None:
            return None
        if attention.borrows < 0:  # an outline, which stands for no place among the blocks
            shape = (self._positions.shape[0], self._keys, attention.n_kv_heads, attention.head_dim)
            return jnp.zeros(shape), jnp.zeros(shape)
        return self.seen[attention.borrows]

    def vector(self, layer: int) -> Float[Array, "batch length narrow"]:
        """What a block reads beside the stream."""
        assert self._per_layer is not None, "a block reads a vector that no embedding per layer gave"
        return self._per_layer[:, :, layer]

    def rotation(self, rotary: Rotary | None) -> Rotation | None:
        """Cosine and sine for every token; None where nothing is rotated."""
        if rotary is None:
            return None
        if rotary not in self._rotations:
            self._rotations[rotary] = rotary_tables(self._positions, rotary)
        return self._rotations[rotary]

    def _bias(self, alibi: Alibi | None) -> Float[Array, "rows heads #length key"] | None:
        """What is added to scores by distance; None where nothing is."""
        if alibi is None:
            return None
        if alibi not in self._biases:
            self._biases[alibi] = distance_bias(alibi, self._positions, self._key_positions)
        return self._biases[alibi]

    @property
    def _key_positions(self) -> Int[Array, "rows key"]:
        """The position of each key; those in a cache are counted over its real tokens."""
        if self.cache is None:
            return self._positions
        assert self.real is not None
        return jnp.maximum(jnp.cumsum(self.real, axis=1, dtype=jnp.int32) - 1, 0)


@runtime_checkable
class AnyBlock(Protocol):
    """What a decoder asks of the description of a block: a frozen, hashable dataclass.

    A block that `BlockSpec` does not describe is another class with these four members; its module is called
    with the stream and a `Pass`, and returns the stream and the two arrays that a cache keeps of the layer.
    """

    @property
    def kept(self) -> Kept:
        """What a cache keeps of the layer."""
        ...

    @property
    def tensors(self) -> int:
        """How many tensors of a file the block takes at least: one, or one per expert."""
        ...

    def outline(self) -> AnyBlock:
        """The block without what changes neither parameters nor sites; equal for blocks that are alike."""
        ...

    def module(self, layer: int, gain: float, name: str) -> nn.Module:
        """The flax module; `gain` is the initial gain of what it adds to the stream."""
        ...


@dataclass(frozen=True)
class BlockSpec:
    """Attention and a feed-forward layer, each added to the stream.

    Attributes:
        attention: heads, window, rotation.
        mlp: the feed-forward layer, or a mixture of experts in its place.
        norm: the norm of what enters, or leaves, the two.
        placement: place of the norms: `pre` (on what each reads), `sandwich` (on what each reads and on what
            it adds: Gemma 2), `post` (only on what each adds: OLMo 2), `parallel` (`pre`, and both read the
            block's input: GPT-NeoX), `joint` (both read one norm of the block's input: Phi 2, Cohere),
            `after` (on the sums themselves: BERT, OPT 350m).
        out_scale: what both are multiplied with before they are added to the stream.
        reads_plain: whether attention reads the stream without a norm (ModernBERT's first block).
    """

    attention: AttentionSpec | LatentSpec
    mlp: MLPSpec | Experts
    norm: NormKind = field(default_factory=NormKind)
    placement: Literal["pre", "parallel", "joint", "sandwich", "post", "after"] = "pre"
    out_scale: float = 1.0
    reads_plain: bool = False

    @property
    def kept(self) -> Kept:
        """See `AnyBlock`."""
        return self.attention.kept

    @property
    def tensors(self) -> int:
        """See `AnyBlock`."""
        return self.mlp.count if isinstance(self.mlp, Experts) else 1

    def outline(self) -> BlockSpec:
        """See `AnyBlock`."""
        mlp = self.mlp.outline() if isinstance(self.mlp, Experts) else self.mlp
        return replace(self, attention=self.attention.outline(), mlp=mlp, out_scale=1.0)

    def module(self, layer: int, gain: float, name: str) -> Block:
        """See `AnyBlock`."""
        return Block(self, layer, gain, name=name)


class Block(nn.Module):
    """One transformer block, as a `BlockSpec` describes it.

    What attention and MLP add to the stream is their `out` site; where that is normalized first, the sites
    hold what is really added.
    """

    spec: BlockSpec
    layer: int
    gain: float = 1.0

    @nn.compact
    def __call__(self, x: Stream, shared: Pass) -> tuple[Stream, KeysValues]:
        spec, tap, site = self.spec, shared.tap, f"blocks.{self.layer}"
        out_norm = spec.norm if spec.placement in ("sandwich", "post") else None

        def read(x: Stream, name: str) -> Stream:
            """What a layer reads of the stream."""
            plain = spec.placement in ("post", "after") or (spec.reads_plain and name == "attn_norm")
            return x if plain else Norm(spec.norm, name=name)(x, tap, f"{site}.{name}")

        def summed(x: Stream, name: str) -> Stream:
            """The stream once a layer's output has been added to it."""
            return Norm(spec.norm, name=name)(x, tap, f"{site}.{name}") if spec.placement == "after" else x

        def mlp(x: Stream) -> Stream:
            arguments: dict[str, Any] = {
                "initial_gain": self.gain,
                "out_scale": spec.out_scale,
                "name": "mlp",
            }
            if isinstance(spec.mlp, Experts):
                layer = MixtureOfExperts(spec.mlp, out_norm=out_norm, **arguments)
            else:
                layer = MLP(spec.mlp, out_norm=out_norm, **arguments)
            return layer(x, tap, f"{site}.mlp")

        x = tap(f"{site}.resid_pre", x)
        made: Any = spec.attention  # each kind of attention is described by a class of its own
        kind: Any = LatentAttention if isinstance(made, LatentSpec) else Attention
        attention = kind(made, out_norm, self.gain, spec.out_scale, name="attn")
        given, chunk = {}, None
        if isinstance(made, AttentionSpec):
            given, chunk = shared.given(made), made.chunk
        normed = read(x, "attn_norm")
        attended, seen = attention(
            normed,
            shared.visible(spec.attention.window, chunk),
            shared.rotation(spec.attention.rotary),
            shared.cache,
            self.layer,
            tap,
            f"{site}.attn",
            **given,
        )
        if tap.done:
            return x, seen
        if spec.placement in ("parallel", "joint"):
            read_by_mlp = normed if spec.placement == "joint" else read(x, "mlp_norm")
            return tap(f"{site}.resid_post", x + attended + mlp(read_by_mlp)), seen
        x = tap(f"{site}.resid_mid", summed(x + attended, "attn_norm"))
        return tap(f"{site}.resid_post", summed(x + mlp(read(x, "mlp_norm")), "mlp_norm")), seen
