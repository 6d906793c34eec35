"""Latent attention: keys and values made of one narrow vector per token (DeepSeek V2, arXiv:2405.04434)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from mergelab.models.cache import Cache
from mergelab.models.layers.attention import KeysValues, attention_pattern, mix_values
from mergelab.models.layers.dense import Linear, scaled
from mergelab.models.layers.fused_attention import fused_values
from mergelab.models.layers.norms import Norm, NormKind
from mergelab.models.layers.rotary import Rotary, rotate
from mergelab.models.sites import Tap

__all__ = ["LatentAttention", "LatentSpec"]


@dataclass(frozen=True)
class LatentSpec:
    """What the latent attention of one layer is.

    Attributes:
        n_heads: number of heads; each has its own keys and values.
        q_rank: width of the vector that queries are made of; None where they are made of the stream.
        kv_rank: width of the vector that keys and values are made of.
        plain, turned: components of a head's queries and keys that are not rotated, and those that are, of
            which all heads share the keys.
        value_dim: width of a head's values.
        scale: factor of attention scores.
        rotary: rotation, of `turned` components.
        bias: whether the narrow projections and the output have biases.
        norm: norm of the narrow vectors.
        window: None: every earlier token is visible.
    """

    n_heads: int
    q_rank: int | None
    kv_rank: int
    plain: int
    turned: int
    value_dim: int
    scale: float
    rotary: Rotary | None
    bias: bool = False
    norm: NormKind = field(default_factory=NormKind)
    window: int | None = None

    @property
    def n_kv_heads(self) -> int:
        """Number of heads of keys."""
        return self.n_heads

    @property
    def head_dim(self) -> int:
        """Width of a head's queries and keys."""
        return self.plain + self.turned

    @property
    def kept(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Heads and width of the keys, and of the values, that a cache keeps of every token."""
        return (self.n_heads, self.head_dim), (self.n_heads, self.value_dim)

    def outline(self) -> LatentSpec:
        """The same without what changes neither parameters nor sites."""
        return replace(self, rotary=None, scale=1.0)


class LatentAttention(nn.Module):
    """Attention whose keys and values are projected from one normalized vector of `kv_rank` per token.

    The cache keeps the keys and values themselves, so that edits of them stay in it.

    Sites, under the name it is called with: `input`, `q_latent` (where there is one), `kv_latent`, `q`, `k`
    (unrotated components first), `v`, `pattern`, `z`, `out`.

    Attributes:
        spec: its shape and settings.
        out_norm: norm of the output, or None.
        initial_gain: gain of the output projection's initial weights.
        out_scale: what the output is multiplied with before it is added to the stream.
    """

    spec: LatentSpec
    out_norm: NormKind | None = None
    initial_gain: float = 1.0
    out_scale: float = 1.0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length width"],
        visible: Bool[Array, "rows length key"],
        rotation: tuple[Float[Array, "batch length half"], Float[Array, "batch length half"]] | None,
        cache: Cache | None,
        layer: int,
        tap: Tap,
        site: str,
    ) -> tuple[Float[Array, "batch length width"], KeysValues]:
        """Returns what is added to the residual stream, and the keys and values attended to."""
        x = tap(f"{site}.input", x)
        spec, width = self.spec, x.shape[-1]
        heads = (*x.shape[:2], spec.n_heads)

        def turned(y: Float[Array, "batch length heads turned"]) -> Float[Array, "batch length heads turned"]:
            neighbors = spec.rotary is not None and spec.rotary.neighbors
            return y if rotation is None else rotate(y, *rotation, neighbors=neighbors)

        features = spec.n_heads * spec.head_dim
        if spec.q_rank is None:
            q = Linear(features, ("embed", "heads"), name="q")(x)
        else:
            narrow = Linear(spec.q_rank, ("embed", None), spec.bias, name="q_down")(x)
            narrow = tap(f"{site}.q_latent", Norm(spec.norm, None, name="q_norm")(narrow))
            q = Linear(features, (None, "heads"), name="q_up")(narrow)
        q_plain, q_turned = jnp.split(q.reshape(*heads, -1), [spec.plain], axis=-1)

        narrow = Linear(spec.kv_rank + spec.turned, ("embed", None), spec.bias, name="kv_down")(x)
        narrow, k_turned = jnp.split(narrow, [spec.kv_rank], axis=-1)
        narrow = tap(f"{site}.kv_latent", Norm(spec.norm, None, name="kv_norm")(narrow))
        features = spec.n_heads * (spec.plain + spec.value_dim)
        kv = Linear(features, (None, "heads"), name="kv_up")(narrow)
        k_plain, v = jnp.split(kv.reshape(*heads, -1), [spec.plain], axis=-1)
        k_turned = jnp.broadcast_to(turned(k_turned[:, :, None]), (*heads, spec.turned))

        q = tap(f"{site}.q", jnp.concatenate([q_plain, turned(q_turned)], axis=-1))
        k, v = tap(f"{site}.k", jnp.concatenate([k_plain, k_turned], axis=-1)), tap(f"{site}.v", v)
        if cache is not None:
            k, v = cache.write(layer, k, v)

        def mixed(q: Array, k: Array, v: Array, visible: Array) -> Array:
            return mix_values(tap(f"{site}.pattern", attention_pattern(q, k, visible, spec.scale)), v)

        read = q, k.astype(q.dtype), v.astype(q.dtype), visible
        looked_at = tap.uses(f"{site}.pattern")
        z = mixed(*read) if looked_at else fused_values(mixed, *read, scale=spec.scale, form=None)
        z = tap(f"{site}.z", z)
        output = Linear(width, ("heads", "embed"), spec.bias, self.initial_gain, name="o")
        out = output(z.reshape(*x.shape[:2], -1))
        if self.out_norm is not None:
            out = Norm(self.out_norm, name="out_norm")(out)
        return tap(f"{site}.out", scaled(out, self.out_scale)), (k, v)
