"""Attention whose pattern nobody looks at, never written whole: by kernels, or on CPUs in pieces.

The kernels of GPUs and TPUs are for bfloat16 and float16; float32 is computed there as where the pattern is
read, so that results are exact to its rounding. On a CPU the queries go a hundred at a time: the scores of
all leave the cache of a processor, and of causal ones half are never seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

__all__ = ["Form", "compiled_for", "fused_values", "splash_values", "values_in_pieces"]

Heads = Float[Array, "batch length heads head_dim"]
Kernel = Callable[[Array, Array, Array, Array], Array]

_HALF = (jnp.bfloat16, jnp.float16)
_TILE, _LARGE_TILE = 128, 512
_TILES = (
    "block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute",
    "block_q_dq", "block_kv_dq",
)  # fmt: skip
_SHORTEST = 128
"""Tokens from which a kernel is worth its start: a decoding step reads its keys once either way."""
_PIECE, _MOST_PIECES = 128, 16
"""Queries of a piece, and how many pieces a program is written out for."""
_CACHED = 16 << 20
"""Bytes of a piece's scores from which rows of a batch are better taken one by one."""


class Form(NamedTuple):
    """What a mask is where numbers say it all: no padding, no cache.

    Attributes:
        causal: whether tokens see only earlier ones, and themselves.
        window: number of latest tokens that are visible, or None for all.
    """

    causal: bool
    window: int | None


class _Target(NamedTuple):
    platform: str
    alone: bool


_COMPILED_FOR: ContextVar[_Target | None] = ContextVar("compiled_for", default=None)


@contextmanager
def compiled_for(platform: str, *, alone: bool = True) -> Iterator[None]:
    """Context in which programs are traced for a platform that JAX does not run on here.

    Args:
        platform: `tpu` or `gpu`.
        alone: whether for one device of it.
    """
    token = _COMPILED_FOR.set(_Target(platform, alone))
    try:
        yield
    finally:
        _COMPILED_FOR.reset(token)


def fused_values(
    plain: Kernel,
    query: Heads,
    key: Float[Array, "batch key kv_heads head_dim"],
    value: Float[Array, "batch key kv_heads value_dim"],
    visible: Bool[Array, "rows length key"],
    *,
    scale: float,
    form: Form | None,
    cap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
) -> Float[Array, "batch length heads value_dim"]:
    """The values that each head mixes, by the platform's kernel where there is one for this attention.

    Args:
        plain: `(query, key, value, visible)` to the same, by the pattern.
        query: heads of the tokens that look.
        key: heads of the tokens that are looked at.
        value: what they hand over.
        visible: True where a query may look at a key.
        scale: factor of the scores.
        form: what says the same as `visible`, or None.
        cap: soft cap of the scores, or None.
        sinks: each head's score of seeing nothing, or None.
    """
    platform, alone = _COMPILED_FOR.get() or _Target(jax.default_backend(), jax.device_count() == 1)
    if query.shape[1] < _SHORTEST:
        return plain(query, key, value, visible)
    if platform == "cpu":
        return values_in_pieces(query, key, value, visible, scale=scale, form=form, cap=cap, sinks=sinks)
    kernel: Kernel | None = None
    if query.dtype in _HALF and value.shape[-1] == key.shape[-1]:
        if platform == "gpu" and cap is None and sinks is None:
            kernel = _cudnn(query, key, value, visible, scale, form)
        # A splash kernel is not divided among devices by the compiler.
        if platform == "tpu" and alone and form is not None and form.causal and query.shape[1] % _TILE == 0:
            kernel = partial(_by_splash, scale=scale, form=form, cap=cap, sinks=sinks)
    return (plain if kernel is None else kernel)(query, key, value, visible)


def values_in_pieces(
    query: Heads,
    key: Float[Array, "batch key kv_heads head_dim"],
    value: Float[Array, "batch key kv_heads value_dim"],
    visible: Bool[Array, "rows length key"],
    *,
    scale: float,
    form: Form | None,
    cap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
    piece: int = _PIECE,
) -> Float[Array, "batch length heads value_dim"]:
    """The values that each head mixes, some queries at a time, and of keys those alone that these may see.

    Args:
        query: heads of the tokens that look.
        key: heads of the tokens that are looked at.
        value: what they hand over.
        visible: True where a query may look at a key.
        scale: factor of the scores.
        form: what says the same as `visible`, or None.
        cap: soft cap of the scores, or None.
        sinks: each head's score of seeing nothing, or None.
        piece: queries at a time.
    """
    batch, length, heads, _ = query.shape
    slots, groups = key.shape[1:3]
    if batch > 1 and batch * heads * piece * slots * 4 > _CACHED:

        def row(given: tuple[Array, Array, Array, Array]) -> Array:
            found = values_in_pieces(
                *(one[None] for one in given), scale=scale, form=form, cap=cap, sinks=sinks, piece=piece
            )
            return found[0]

        seen = jnp.broadcast_to(visible, (batch, *visible.shape[1:]))
        return jax.lax.map(row, (query, key, value, seen))

    grouped = query.reshape(batch, length, groups, heads // groups, -1)
    sink = None if sinks is None else sinks.astype(jnp.float32).reshape(1, groups, -1, 1, 1)
    lowest = jnp.finfo(jnp.float32).min

    def mixed(q: Array, seen: Array, first: int, last: int) -> Array:
        """Some queries against the keys from `first` to `last`."""
        keys, values = key[:, first:last], value[:, first:last]
        scores = jnp.einsum("bqkgd,bskd->bkgqs", q, keys, preferred_element_type=jnp.float32) * scale
        scores = scores if cap is None else cap * jnp.tanh(scores / cap)
        scores = jnp.where(seen[:, None, None], scores, lowest)
        highest = scores.max(axis=-1, keepdims=True)
        highest = highest if sink is None else jnp.maximum(highest, sink)
        weights = jnp.exp(scores - highest)
        total = weights.sum(axis=-1, keepdims=True)
        total = total if sink is None else total + jnp.exp(sink - highest)
        mixture = jnp.einsum(
            "bkgqs,bskd->bkgqd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
        )
        return jnp.moveaxis(mixture / total, 3, 1).astype(values.dtype)

    step = max(piece, -(-length // _MOST_PIECES // piece) * piece)
    pieces = []
    for start in range(0, length, step):
        stop = min(start + step, length)
        first, last = 0, slots
        if form is not None and form.causal:
            first, last = 0 if form.window is None else max(0, start - form.window + 1), stop
        q, seen = grouped[:, start:stop], visible[:, start:stop, first:last]
        count = (stop - start) // piece
        if count > 1 and count * piece == stop - start:
            parts = jnp.moveaxis(q.reshape(batch, count, piece, *q.shape[2:]), 1, 0)
            masks = jnp.moveaxis(seen.reshape(seen.shape[0], count, piece, -1), 1, 0)

            def part(given: tuple[Array, Array], first: int = first, last: int = last) -> Array:
                return mixed(*given, first, last)

            found = jax.lax.map(part, (parts, masks))
            pieces.append(jnp.moveaxis(found, 0, 1).reshape(batch, stop - start, *found.shape[3:]))
        else:
            pieces.append(mixed(q, seen, first, last))
    return jnp.concatenate(pieces, axis=1).reshape(batch, length, heads, -1)


def _cudnn(
    query: Array, key: Array, value: Array, visible: Array, scale: float, form: Form | None
) -> Kernel | None:
    """Flash attention of cuDNN; None where this version, device or shape has none."""

    def run(query: Array, key: Array, value: Array, visible: Array) -> Array:
        options: dict[str, Any] = {"mask": visible[:, None]}
        if form is not None and form.causal:
            window = None if form.window is None else (form.window - 1, 0)
            options = {"is_causal": True, "local_window_size": window}
        return jax.nn.dot_product_attention(query, key, value, scale=scale, implementation="cudnn", **options)

    try:
        jax.eval_shape(run, query, key, value, visible)
    except (RuntimeError, ValueError, NotImplementedError):  # said in many words, by version
        return None
    return run


def _by_splash(query: Array, key: Array, value: Array, visible: Array, **options: Any) -> Array:
    return splash_values(query, key, value, **options)


def splash_values(
    query: Heads,
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    *,
    scale: float,
    form: Form,
    cap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
    interpret: bool = False,
) -> Heads:
    """Causal attention by JAX's splash kernel for TPUs, of a length that is a multiple of 128.

    Args:
        query: heads of tokens, without padding.
        key: their keys.
        value: their values.
        scale: factor of the scores.
        form: the mask; causal.
        cap: soft cap of the scores, or None.
        sinks: each head's score of seeing nothing, or None.
        interpret: whether the kernel is interpreted, where there is no TPU.
    """
    # Only where it is used: the module takes a second to import.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads = query.shape[1:3]
    square = (length, length)
    seen = (
        masks.CausalMask(square)
        if form.window is None
        else masks.LocalMask(square, (form.window - 1, 0), offset=0)
    )
    size = _LARGE_TILE if length % _LARGE_TILE == 0 else _TILE
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([seen] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=kernels.BlockSizes(**dict.fromkeys(_TILES, size)),
        attn_logits_soft_cap=cap,
        interpret=interpret,
    )

    def one(query: Array, key: Array, value: Array) -> Array:
        q, k, v = (jnp.swapaxes(x, 0, 1) for x in (query, key, value))
        scaled = (q * jnp.asarray(scale, q.dtype)).astype(q.dtype)
        found: Any = kernel(scaled, k, v) if sinks is None else kernel(scaled, k, v, sinks=sinks)
        return jnp.swapaxes(found, 0, 1)

    return jax.vmap(one)(query, key, value)
