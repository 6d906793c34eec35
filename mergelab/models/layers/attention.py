"""Attention with grouped heads and a cache, and its masks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from mergelab.models.cache import Cache
from mergelab.models.derived import param
from mergelab.models.layers.alibi import Alibi
from mergelab.models.layers.dense import Linear, scaled
from mergelab.models.layers.fused_attention import Form, fused_values
from mergelab.models.layers.norms import Norm, NormKind
from mergelab.models.layers.relative import Disentangled, RelativePlaces, disentangled_scores
from mergelab.models.layers.rotary import Rotary, rotate
from mergelab.models.sites import Tap

__all__ = [
    "Attention",
    "AttentionSpec",
    "KeysValues",
    "QueryTemperature",
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
    bias: Float[Array, "bias_rows heads #query key"] | None = None,
) -> Float[Array, "batch heads query key"]:
    """Softmax over the visible keys of `query . key * scale + bias`, float32.

    Consecutive groups of `heads / kv_heads` query heads share one key head. A query that sees no key (of a
    padding token) gets the uniform pattern, never NaN. With `sinks`, the scores of seeing nothing, a
    pattern sums to less than 1.
    """
    batch, length, heads, head_dim = query.shape
    grouped = query.reshape(batch, length, key.shape[2], -1, head_dim)
    scores = jnp.einsum("bqkgd,bskd->bkgqs", grouped, key, preferred_element_type=jnp.float32)
    scores = soft_cap(scores.reshape(batch, heads, length, -1) * scale, cap)
    scores = scores if bias is None else scores + bias.astype(jnp.float32)
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
class QueryTemperature:
    """Queries grow with their position `p`: by `1 + strength * log(1 + floor((p + 1) / step))` (Llama 4).

    Attributes:
        strength: factor of the logarithm.
        step: tokens within which nothing grows.
    """

    strength: float
    step: int

    def factor(self, positions: Int[Array, "batch length"]) -> Float[Array, "batch length"]:
        """What the queries are multiplied with, float32."""
        steps = jnp.floor((positions.astype(jnp.float32) + 1) / self.step)
        return jnp.log1p(steps) * self.strength + 1


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
        v_norm: norm of each head's values, or None (Gemma 4).
        values_of_keys: whether values are the projected keys, before their norm (Gemma 4).
        cap: soft cap of the scores, or None.
        clip: largest magnitude of projected queries, keys and values, or None (OLMo 1).
        sinks: whether each head has a learned score of seeing nothing (gpt-oss).
        alibi: slopes by which scores fall with distance, or None (BLOOM, Falcon RW).
        chunk: if given, tokens see only their own of the pieces of that many tokens (Llama 4).
        temperature: growth of queries with their position, or None (Llama 4).
        disentangled: how heads look at vectors of relative positions, or None (DeBERTa).
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
    v_norm: NormKind | None = None
    values_of_keys: bool = False
    cap: float | None = None
    clip: float | None = None
    sinks: bool = False
    alibi: Alibi | None = None
    chunk: int | None = None
    temperature: QueryTemperature | None = None
    disentangled: Disentangled | None = None
    gated: bool = False

    @property
    def kept(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Heads and width of the keys, and of the values, that a cache keeps of every token."""
        return (self.n_kv_heads, self.head_dim), (self.n_kv_heads, self.head_dim)

    def outline(self) -> AttentionSpec:
        """The same without what changes neither parameters nor sites."""
        plain = replace(self, window=None, rotary=None, scale=1.0, cap=None, clip=None)
        return replace(plain, alibi=None, chunk=None, temperature=None)


class Attention(nn.Module):
    """Multi-head, grouped-query or multi-query attention.

    Sites, under the name it is called with: `input` (what the projections read), `q`, `k` (after their norm
    and rotation), `v`, `pattern`, `z` (each head's mixed values, gated where there is a gate), `out`.

    Attributes:
        spec: its shape and settings; `window` and `chunk` are already in the mask, `rotary` in the rotation,
            `alibi` in the bias, `temperature` in the growth.
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
        bias: Float[Array, "bias_rows heads #length key"] | None = None,
        growth: Float[Array, "batch length"] | None = None,
        relative: RelativePlaces | None = None,
        form: Form | None = None,
    ) -> tuple[Float[Array, "batch length width"], KeysValues]:
        """Returns what is added to the residual stream, and the keys and values attended to.

        `bias` is added to the scores, queries are multiplied with `growth`, `relative` are vectors of
        relative positions, which heads look at, and `form` says what `visible` does, where it can.
        """
        x = tap(f"{site}.input", x)
        spec = self.spec

        def heads_of(y: Float[Array, "rows length width"], projection: Linear, heads: int) -> Array:
            return projection(y).reshape(*y.shape[:2], heads, spec.head_dim)

        def linear(name: str, heads: int, axis: str, bias: bool = spec.qkv_bias) -> Linear:
            return Linear(heads * spec.head_dim, ("embed", axis), bias, name=name)

        def project(projection: Linear, heads: int) -> Float[Array, "batch length heads head_dim"]:
            y = heads_of(x, projection, heads)
            return y if spec.clip is None else jnp.clip(y, -spec.clip, spec.clip)

        def normed(
            name: str, y: Float[Array, "batch length heads head_dim"], axis: str
        ) -> Float[Array, "batch length heads head_dim"]:
            if spec.qk_norm is None:
                return y
            if spec.qk_norm_over != "all":
                own = axis if spec.qk_norm_over == "each" else None
                return Norm(spec.qk_norm, None, own, name=name)(y)
            return Norm(spec.qk_norm, axis, name=name)(y.reshape(*y.shape[:2], -1)).reshape(y.shape)

        to_q = linear("q", spec.n_heads, "heads")
        to_k = linear("k", spec.n_kv_heads, "kv_heads")
        q, k = project(to_q, spec.n_heads), project(to_k, spec.n_kv_heads)
        v = k if spec.values_of_keys else project(linear("v", spec.n_kv_heads, "kv_heads"), spec.n_kv_heads)
        if spec.v_norm is not None:
            v = Norm(spec.v_norm, None, name="v_norm")(v)
        q, k = normed("q_norm", q, "heads"), normed("k_norm", k, "kv_heads")
        if rotation is not None:
            neighbors = spec.rotary is not None and spec.rotary.neighbors
            q, k = (rotate(y, *rotation, neighbors=neighbors) for y in (q, k))
        if growth is not None:
            q = (q * growth[..., None, None]).astype(q.dtype)
        q, k, v = tap(f"{site}.q", q), tap(f"{site}.k", k), tap(f"{site}.v", v)
        if cache is not None:
            k, v = cache.write(layer, k, v)
        sinks = None
        if spec.sinks:
            sinks = param(self, "sinks", nn.initializers.zeros, (spec.n_heads,), ("heads",))
        if relative is not None:
            how = spec.disentangled
            assert how is not None, "vectors of relative positions need heads that look at them"
            asks, answers = to_q, to_k
            if not how.shared:
                asks, answers = (linear(name, spec.n_heads, "heads") for name in ("position_q", "position_k"))
            asked = heads_of(relative.vectors, asks, spec.n_heads) if how.position_to_content else None
            answered = heads_of(relative.vectors, answers, spec.n_heads) if how.content_to_position else None
            bias = disentangled_scores(q, k, asked, answered, relative.places) * spec.scale

        def mixed(q: Array, k: Array, v: Array, visible: Array) -> Array:
            pattern = attention_pattern(q, k, visible, spec.scale, spec.cap, sinks, bias)
            return mix_values(tap(f"{site}.pattern", pattern), v)

        k_read, v_read = k.astype(q.dtype), v.astype(q.dtype)
        if bias is not None or tap.uses(f"{site}.pattern"):
            z = mixed(q, k_read, v_read, visible)
        else:
            options: dict[str, Any] = {"scale": spec.scale, "form": form, "cap": spec.cap, "sinks": sinks}
            z = fused_values(mixed, q, k_read, v_read, visible, **options)
        if spec.gated:
            z = z * jax.nn.sigmoid(project(linear("gate", spec.n_heads, "heads"), spec.n_heads))
        z = tap(f"{site}.z", z)
        output = Linear(x.shape[-1], ("heads", "embed"), spec.out_bias, self.initial_gain, name="o")
        out = output(z.reshape(*x.shape[:2], -1))
        if self.out_norm is not None:
            out = Norm(self.out_norm, name="out_norm")(out)
        return tap(f"{site}.out", scaled(out, self.out_scale)), (k, v)
