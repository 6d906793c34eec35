"""Blocks of a decoder: what one is made of, said per layer, and the module that the usual ones run on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from mergelab.models.cache import Cache, Kept
from mergelab.models.layers.attention import Attention, AttentionSpec, KeysValues, visible_keys
from mergelab.models.layers.experts import MixtureOfExperts
from mergelab.models.layers.latent_attention import LatentAttention, LatentSpec
from mergelab.models.layers.mlp import MLP, MLPSpec
from mergelab.models.layers.norms import Norm, NormKind
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
        mask: False for padding among the tokens of this pass; None if there is none.

    Args:
        positions: positions of the tokens, for rotations.
        mask: False for padding; None if there is none.
        cache: earlier tokens, or None.
        tap: what to do at the sites.
        causal: whether tokens see only earlier ones.
    """

    def __init__(
        self,
        positions: Int[Array, "batch length"],
        mask: Bool[Array, "batch length"] | None,
        cache: Cache | None,
        tap: Tap,
        causal: bool = True,
    ) -> None:
        self.cache, self.tap, self._positions, self._causal = cache, tap, positions, causal
        self.mask = mask
        length = positions.shape[1]
        steps = jnp.arange(length, dtype=jnp.int32)
        self._queries = steps
        if cache is not None:
            self._queries = cache.length[0] + steps if cache.even else cache.length[:, None] + steps[None]
        self._keys = length if cache is None else cache.slots
        self.real = mask
        if cache is not None:
            self.real = cache.extend_mask(jnp.ones(positions.shape, jnp.bool_) if mask is None else mask)
        self._visible: dict[int | None, Bool[Array, "rows length key"]] = {}
        self._rotations: dict[Rotary, Rotation] = {}

    def visible(self, window: int | None = None) -> Bool[Array, "rows length key"]:
        """True where a token may look at a key: at itself and earlier ones (or all), within the window."""
        if window not in self._visible:
            self._visible[window] = visible_keys(
                self._queries, self._keys, self.real, self._causal, window=window
            )
        return self._visible[window]

    def rotation(self, rotary: Rotary | None) -> Rotation | None:
        """Cosine and sine for every token; None where nothing is rotated."""
        if rotary is None:
            return None
        if rotary not in self._rotations:
            self._rotations[rotary] = rotary_tables(self._positions, rotary)
        return self._rotations[rotary]


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
            block's input: GPT-NeoX), `joint` (both read one norm of the block's input: Phi 2, Cohere).
        out_scale: what both are multiplied with before they are added to the stream.
    """

    attention: AttentionSpec | LatentSpec
    mlp: MLPSpec | Experts
    norm: NormKind = field(default_factory=NormKind)
    placement: Literal["pre", "parallel", "joint", "sandwich", "post"] = "pre"
    out_scale: float = 1.0

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
            if spec.placement == "post":
                return x
            return Norm(spec.norm, name=name)(x, tap, f"{site}.{name}")

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
        normed = read(x, "attn_norm")
        attended, seen = attention(
            normed,
            shared.visible(spec.attention.window),
            shared.rotation(spec.attention.rotary),
            shared.cache,
            self.layer,
            tap,
            f"{site}.attn",
        )
        if tap.done:
            return x, seen
        if spec.placement in ("parallel", "joint"):
            read_by_mlp = normed if spec.placement == "joint" else read(x, "mlp_norm")
            return tap(f"{site}.resid_post", x + attended + mlp(read_by_mlp)), seen
        x = tap(f"{site}.resid_mid", x + attended)
        return tap(f"{site}.resid_post", x + mlp(read(x, "mlp_norm"))), seen
