"""Attention with grouped heads and a cache, and its masks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from mergelab.models.cache import Cache
from mergelab.models.layers.dense import Linear
from mergelab.models.layers.norms import Norm, NormKind
from mergelab.models.layers.rotary import rotate
from mergelab.models.sites import Tap

__all__ = ["Attention", "KeysValues", "attention_pattern", "mix_values", "soft_cap", "visible_keys"]


def visible_keys(
    queries: Int[Array, " query"],
    keys: int,
    real: Bool[Array, "batch key"] | None,
    causal: bool = True,
    window: int | None = None,
) -> Bool[Array, "rows query key"]:
    """True where a query may look at a key.

    Args:
        queries: the slot of each query.
        keys: number of key slots, from 0.
        real: False for padding; None if there is none (then `rows` is 1, else it is the batch).
        causal: whether a query sees only its own slot and earlier ones.
        window: if given, a query sees only the last `window` slots, its own among them.
    """
    distance = queries[:, None] - jnp.arange(keys, dtype=queries.dtype)[None]
    seen = distance >= 0 if causal else jnp.ones(distance.shape, jnp.bool_)
    if window is not None:
        seen &= distance < window
    seen = seen[None]
    return seen if real is None else seen & real[:, None]


KeysValues = tuple[Float[Array, "batch key kv_heads head_dim"], Float[Array, "batch key kv_heads head_dim"]]


def soft_cap(x: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """`cap * tanh(x / cap)`, or `x` without a cap (Gemma 2, arXiv:2408.00118)."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attention_pattern(
    query: Float[Array, "batch query heads head_dim"],
    key: Float[Array, "batch key kv_heads head_dim"],
    visible: Bool[Array, "rows query key"],
    scale: float,
    cap: float | None = None,
) -> Float[Array, "batch heads query key"]:
    """Softmax over the visible keys of `query . key * scale`, float32.

    Consecutive groups of `heads / kv_heads` query heads share one key head. A query that sees no key (of a
    padding token) gets the uniform pattern, never NaN.
    """
    batch, length, heads, head_dim = query.shape
    grouped = query.reshape(batch, length, key.shape[2], -1, head_dim)
    scores = jnp.einsum("bqkgd,bskd->bkgqs", grouped, key, preferred_element_type=jnp.float32)
    scores = soft_cap(scores.reshape(batch, heads, length, -1) * scale, cap)
    return jax.nn.softmax(jnp.where(visible[:, None], scores, jnp.finfo(jnp.float32).min), axis=-1)


def mix_values(
    pattern: Float[Array, "batch heads query key"], value: Float[Array, "batch key kv_heads head_dim"]
) -> Float[Array, "batch query heads head_dim"]:
    """The values that each head's pattern mixes."""
    batch, heads, length, keys = pattern.shape
    grouped = pattern.astype(value.dtype).reshape(batch, value.shape[2], -1, length, keys)
    return jnp.einsum("bkgqs,bskd->bqkgd", grouped, value).reshape(batch, length, heads, -1)


class Attention(nn.Module):
    """Multi-head, grouped-query or multi-query attention.

    Sites, under the name it is called with: `input` (what the projections read), `q`, `k` (after their norm
    and rotation), `v`, `pattern`, `z` (each head's mixed values), `out`.

    Attributes:
        heads, kv_heads, head_dim: its shape.
        scale: what scores are multiplied with.
        qkv_bias, out_bias: whether projections have biases.
        qk_norm: the norm of each query and key head, or None.
        cap: soft cap of the scores, or None.
        out_norm: a norm of the output (sandwich blocks), or None.
        initial_gain: of the output projection.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: NormKind | None = None
    cap: float | None = None
    out_norm: NormKind | None = None
    initial_gain: float = 1.0

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

        def heads_of(name: str, heads: int) -> Float[Array, "batch length heads head_dim"]:
            y = Linear(heads * self.head_dim, self.qkv_bias, name=name)(x)
            return y.reshape(*x.shape[:2], heads, self.head_dim)

        q, k, v = heads_of("q", self.heads), heads_of("k", self.kv_heads), heads_of("v", self.kv_heads)
        if self.qk_norm is not None:
            q = Norm(self.qk_norm, name="q_norm")(q)
            k = Norm(self.qk_norm, name="k_norm")(k)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        q, k, v = tap(f"{site}.q", q), tap(f"{site}.k", k), tap(f"{site}.v", v)
        if cache is not None:
            k, v = cache.write(layer, k, v)
        pattern = attention_pattern(q, k.astype(q.dtype), visible, self.scale, self.cap)
        z = tap(f"{site}.z", mix_values(tap(f"{site}.pattern", pattern), v.astype(q.dtype)))
        project = Linear(x.shape[-1], self.out_bias, self.initial_gain, name="o")
        out = project(z.reshape(*x.shape[:2], -1))
        if self.out_norm is not None:
            out = Norm(self.out_norm, name="out_norm")(out)
        return tap(f"{site}.out", out), (k, v)
