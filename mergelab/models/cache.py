"""The cache: what a decoder remembers of the tokens it has seen, as a pytree of fixed shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mergelab.compat import register_dataclass
from mergelab.errors import MergelabError

__all__ = ["ArrayLeaf", "Cache", "Kept", "Recurrent", "State", "empty_layer", "new_cache"]

# A field of a pytree. While JAX transforms the tree it also holds shapes, shardings and batched arrays, so
# what it holds is not checked at run time.
if TYPE_CHECKING:
    ArrayLeaf = jax.Array
else:
    ArrayLeaf = Any


@dataclass(frozen=True)
class Recurrent:
    """What a recurrent layer keeps of a row, which does not grow with its tokens.

    Attributes:
        window: shape of the latest inputs of its convolutions, tokens and channels.
        memory: shape of what it remembers of all tokens, kept in float32.
    """

    window: tuple[int, int]
    memory: tuple[int, ...]


Kept = tuple[tuple[int, int], tuple[int, int]] | Recurrent
"""What a layer keeps: heads and width of a token's keys, and of its values; or a state."""

State = tuple[Float[Array, "batch before channels"], Float[Array, "batch heads *memory"]]
"""A recurrent layer's window and memory."""


@register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys (rotated) and values of all tokens so far, in slots of equal number per row.

    A recurrent layer has no slots: its window and its memory stand in place of its keys and its values, and
    hold all real tokens at once, so that none of them can be taken back.

    A call with `n` new tokens a row fills slots `[length, length + n)` of each row; rows of different
    lengths are padded (on the left, for generation) and `mask` says which slots are real. A row's next
    position is its number of real slots.

    Attributes:
        keys, values: arrays of each layer, `[batch, slots, kv_heads, head_dim]`; of a recurrent one its
            window and its memory.
        mask: `[batch, slots]` bool, True where a slot holds a real token.
        length: number of filled slots of each row, int32 `[batch]`.
        even: whether all rows are known to be equally long (static): they are written in one piece.
        recurrent: numbers of the layers that are recurrent (static).
    """

    keys: tuple[ArrayLeaf, ...]
    values: tuple[ArrayLeaf, ...]
    mask: ArrayLeaf
    length: ArrayLeaf
    even: bool = field(default=True, metadata={"static": True})
    recurrent: tuple[int, ...] = field(default=(), metadata={"static": True})

    @property
    def slots(self) -> int:
        """Number of tokens that a row can hold."""
        return self.mask.shape[1]

    def positions(self, mask: Bool[Array, "batch new"]) -> Int[Array, "batch new"]:
        """The positions of new tokens: real ones counted on from each row's real tokens so far."""
        before = jnp.sum(self.mask, axis=1, dtype=jnp.int32)[:, None]
        return jnp.maximum(before + jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)

    def extend_mask(self, mask: Bool[Array, "batch new"]) -> Bool[Array, "batch slots"]:
        """The mask once new tokens are in their slots."""
        return self._put(self.mask, mask)

    def write(
        self,
        layer: int,
        key: Float[Array, "batch new kv_heads head_dim"],
        value: Float[Array, "batch new kv_heads value_dim"],
    ) -> tuple[Float[Array, "batch slots kv_heads head_dim"], Float[Array, "batch slots kv_heads value_dim"]]:
        """One layer's keys and values with the new ones in their slots."""
        keys, values = self.keys[layer], self.values[layer]
        return self._put(keys, key.astype(keys.dtype)), self._put(values, value.astype(values.dtype))

    def state(self, layer: int) -> State:
        """The window and the memory of a recurrent layer."""
        return self.keys[layer], self.values[layer]

    def _put(self, slots: jax.Array, new: jax.Array) -> jax.Array:
        """`[batch, slots, ...]` with new entries behind each row's last."""
        if self.even:
            return jax.lax.dynamic_update_slice_in_dim(slots, new, self.length[0], axis=1)
        return jax.vmap(lambda row, x, at: jax.lax.dynamic_update_slice_in_dim(row, x, at, axis=0))(
            slots, new, self.length
        )

    def repeat(self, times: int) -> Cache:
        """Every row `times` times, one copy after the other: to continue one text in several ways."""
        return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), self)

    def rewind(self, lengths: Int[Array, "*batch"] | int) -> Cache:
        """The cache before a row's tokens beyond its first `lengths` slots (padding counts) were there.

        Args:
            lengths: one number for all rows, or one per row; a row that is shorter stays as it is.

        Raises:
            MergelabError: a layer is recurrent.
        """
        if self.recurrent:
            raise MergelabError(
                f"this model has {len(self.recurrent)} recurrent layers, whose states hold all tokens at "
                "once and cannot be taken back to an earlier one; read the text again from its beginning, or "
                "take a model of attention alone."
            )
        one = jnp.ndim(lengths) == 0
        length = jnp.minimum(jnp.asarray(lengths, jnp.int32).reshape(-1), self.length)
        kept = jnp.arange(self.slots, dtype=jnp.int32)[None] < length[:, None]
        return replace(self, mask=self.mask & kept, length=length, even=self.even and one)


def new_cache(kept: Sequence[Kept], batch: int, slots: int, dtype: jnp.dtype | type) -> Cache:
    """An empty cache.

    Args:
        kept: what each layer keeps.
        batch: number of rows.
        slots: number of tokens that a row can hold.
        dtype: dtype of keys and values, and of windows.
    """
    pairs = [empty_layer(layer, batch, slots, dtype) for layer in kept]
    return Cache(
        keys=tuple(first for first, _ in pairs),
        values=tuple(second for _, second in pairs),
        mask=jax.device_put(np.zeros((batch, slots), np.bool_)),
        length=jax.device_put(np.zeros(batch, np.int32)),
        recurrent=tuple(n for n, layer in enumerate(kept) if isinstance(layer, Recurrent)),
    )


def empty_layer(kept: Kept, batch: int, slots: int, dtype: jnp.dtype | type) -> tuple[Array, Array]:
    """What a layer keeps before the first token; the arguments are those of `new_cache`."""
    name = jnp.dtype(dtype).name
    if isinstance(kept, Recurrent):
        return _zeros((batch, *kept.window), name), _zeros((batch, *kept.memory), "float32")
    return _zeros((batch, slots, *kept[0]), name), _zeros((batch, slots, *kept[1]), name)


@partial(jax.jit, static_argnames=("shape", "dtype"))
def _zeros(shape: tuple[int, ...], dtype: str) -> Array:
    """One program for each shape; `jnp.zeros` compiles two."""
    return jnp.zeros(shape, dtype)
