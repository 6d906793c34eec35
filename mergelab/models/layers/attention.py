"""Attention with grouped heads and a cache, and its masks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from mergelab.models.cache import Cache
from mergelab.models.derived import param
from mergelab.models.layers.dense import Linear, scaled
from mergelab.models.layers.norms import Norm, NormKind
from mergelab.models.layers.rotary import Rotary, rotate
from mergelab.models.sites import Tap

__all__ = [
    "Attention",
    "AttentionSpec",
    "KeysValues",
    "attention_pattern",
    "mix_values",
    "soft_cap",
    "visible_keys",
]


def visible_keys(
    queries: Int[Array, "*batch query"],
    keys: int,
    real: Bool[Array, "rows key"] | None,
    causal: bool = True,
    window: int | None = None,
) -> Bool[Array, "rows query key"]:
    """True where a query may look at a key.

    Args:
        queries: slot of each query, `[query]` where all rows agree, else `[batch, query]`.
        keys: number of key slots, from 0.
        real: False for padding; None if there is none (then `rows` is 1, else it is the batch).
        causal: whether a query sees only its own slot and earlier ones.
        window: if given, a query sees only the last `window` slots, its own among them; where it also sees
            later ones, those up to `window` slots away on either side.
    """
    slots = jnp.arange(keys, dtype=queries.dtype)
    distance = queries[..., None] - (slots[None] if queries.ndim == 1 else slots[None, None])
    seen = distance >= 0 if causal else jnp.ones(distance.shape, jnp.bool_)
    if window is not None:
        seen &= distance < window if causal else jnp.abs(distance) <= window
    seen = seen[None] if seen.ndim == 2 else seen
    return seen if real is None else seen & real[:, None]


KeysValues = tuple[Float[Array, "batch key kv_heads head_dim"], Float[Array, "batch key kv_heads value_dim"]]


def soft_cap(x: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """`cap * tanh(x / cap)`, or `x` without a cap (Gemma 2, arXiv:2408.00118)."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attention_pattern(
    query: Float[Array, "batch query heads head_dim"],
    key: Float[Array, "batch key kv_heads head_dim"],
    visible: Bool[Array, "rows query key"],
    scale: float,
    cap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
) -> Float[Array, "batch heads query key"]:
    """Softmax over the visible keys of `query . key * scale`, float32.

    Consecutive groups of `heads / kv_heads` query heads share one key head. A query that sees no key (of a
    padding token) gets the uniform pattern, never NaN. With `sinks`, the scores of seeing nothing, a
    pattern sums to less than 1.
    """
    batch, length, heads, head_dim = query.shape
    grouped = query.reshape(batch, length, key.shape[2], -1, head_dim)
    scores = jnp.einsum("bqkgd,bskd->bkgqs", grouped, key, preferred_element_type=jnp.float32)
    scores = soft_cap(scores.reshape(batch, heads, length, -1) * scale, cap)
    scores = jnp.where(visible[:, None], scores, jnp.finfo(jnp.float32).min)
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    nothing = jnp.broadcast_to(sinks.astype(jnp.float32)[None, :, None, None], (*scores.shape[:3], 1))
    return jax.nn.softmax(jnp.concatenate([scores, nothing], axis=-1), axis=-1)[..., :-1]


def mix_values(
    pattern: Float[Array, "batch heads query key"], value: Float[Array, "batch key kv_heads head_dim"]
) -> Float[Array, "batch query heads head_dim"]:
    """The values that each head's pattern mixes."""
    batch, heads, length, keys = pattern.shape
    grouped = pattern.astype(value.dtype).reshape(batch, value.shape[2], -1, length, keys)
    return jnp.einsum("bkgqs,bskd->bqkgd", grouped, value).reshape(batch, length, heads, -1)


@dataclass(frozen=True)
class AttentionSpec:
    """What the attention of one layer is.

    Attributes:
        n_heads, n_kv_heads, head_dim: number of query heads and of key-value heads, width of a head.
        scale: factor of attention scores; usually `head_dim**-0.5`.
        rotary: rotation of queries and keys, or None.
        window: number of latest tokens that are visible, or None for all.
        qkv_bias, out_bias: whether those projections have biases.
        qk_norm: norm of queries and keys, or None.
        qk_norm_over: what it normalizes: each `head` (Qwen 3, Gemma 3), `each` with a scale of its own
            (Cohere), or `all` heads at once (OLMo 2).
        cap: soft cap of the scores, or None.
        clip: largest magnitude of projected queries, keys and values, or None (OLMo 1).
        sinks: whether each head has a learned score of seeing nothing (gpt-oss).
        gated: whether what heads mix is gated by sigmoids of a further projection (Qwen3-Next).
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    scale: float
    rotary: Rotary | None = None
    window: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: NormKind | None = None
    qk_norm_over: Literal["head", "each", "all"] = "head"
    cap: float | None = None
    clip: float | None = None
    sinks: bool = False
    gated: bool = False

    @property
    def kept(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Heads and width of the keys, and of the values, that a cache keeps of every token."""
        return (self.n_kv_heads, self.head_dim), (self.n_kv_heads, self.head_dim)

    def outline(self) -> AttentionSpec:
        """The same without what changes neither parameters nor sites."""
        return replace(self, window=None, rotary=None, scale=1.0, cap=None, clip=None)


class Attention(nn.Module):
    """Multi-head, grouped-query or multi-query attention.

    Sites, under the name it is called with: `input` (what the projections read), `q`, `k` (after their norm
    and rotation), `v`, `pattern`, `z` (each head's mixed values, gated where there is a gate), `out`.

    Attributes:
        spec: its shape and settings; `window` is already in the mask, `rotary` in the rotation.
        out_norm: norm of the output, or None.
        initial_gain: gain of the output projection's initial weights.
        out_scale: what the output is multiplied with before it is added to the stream (Granite).
    """

    spec: AttentionSpec
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
        spec = self.spec

        def project(name: str, heads: int, axis: str) -> Float[Array, "batch length heads head_dim"]:
            y = Linear(heads * spec.head_dim, ("embed", axis), spec.qkv_bias, name=name)(x)
            y = y if spec.clip is None else jnp.clip(y, -spec.clip, spec.clip)
            return y.reshape(*x.shape[:2], heads, spec.head_dim)

        def normed(
            name: str, y: Float[Array, "batch length heads head_dim"], axis: str
        ) -> Float[Array, "batch length heads head_dim"]:
            if spec.qk_norm is None:
                return y
            if spec.qk_norm_over != "all":
                own = axis if spec.qk_norm_over == "each" else None
                return Norm(spec.qk_norm, None, own, name=name)(y)
            return Norm(spec.qk_norm, axis, name=name)(y.reshape(*y.shape[:2], -1)).reshape(y.shape)

        q = project("q", spec.n_heads, "heads")
        k, v = (project(name, spec.n_kv_heads, "kv_heads") for name in "kv")
        q, k = normed("q_norm", q, "heads"), normed("k_norm", k, "kv_heads")
        if rotation is not None:
            neighbors = spec.rotary is not None and spec.rotary.neighbors
            q, k = (rotate(y, *rotation, neighbors=neighbors) for y in (q, k))
        q, k, v = tap(f"{site}.q", q), tap(f"{site}.k", k), tap(f"{site}.v", v)
        if cache is not None:
            k, v = cache.write(layer, k, v)
        sinks = None
        if spec.sinks:
            sinks = param(self, "sinks", nn.initializers.zeros, (spec.n_heads,), ("heads",))
        pattern = attention_pattern(q, k.astype(q.dtype), visible, spec.scale, spec.cap, sinks)
        z = mix_values(tap(f"{site}.pattern", pattern), v.astype(q.dtype))
        if spec.gated:
            z = z * jax.nn.sigmoid(project("gate", spec.n_heads, "heads"))
        z = tap(f"{site}.z", z)
        output = Linear(x.shape[-1], ("heads", "embed"), spec.out_bias, self.initial_gain, name="o")
        out = output(z.reshape(*x.shape[:2], -1))
        if self.out_norm is not None:
            out = Norm(self.out_norm, name="out_norm")(out)
        return tap(f"{site}.out", scaled(out, self.out_scale)), (k, v)
