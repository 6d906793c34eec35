"""A tensor and a block of it, as parts of a merge may know them; the random bits drawn there."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mergelab.compat import register_dataclass

__all__ = ["Region", "TensorInfo", "TensorRole", "tensor_key", "threefry", "uniform", "whole"]

TensorRole = Literal["matrix", "vector", "stack"]


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor as a part may know it before it acts on it: see `Part.at`.

    Attributes:
        name: its name, as the output spells it.
        shape: its true shape.
        statistics: whether every model has a statistic of it (see `Region.statistics`).
        reads: the axis of a matrix along which its inputs lie, where its name (flax's `kernel`), its Gram
            matrix or its model's table says so; the last one where nothing does.
        depth: how deep the tensor's block is in its model, from 0 (the first, and what is in no block) to 1.
    """

    name: str
    shape: tuple[int, ...]
    statistics: bool = False
    reads: int | None = None
    depth: float = 0.0

    @property
    def role(self) -> TensorRole:
        """`matrix`, `vector` (a scalar too), or a `stack` of matrices along leading axes (experts)."""
        return "matrix" if len(self.shape) == 2 else "stack" if len(self.shape) > 2 else "vector"


_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def threefry(
    key: tuple[jax.Array, jax.Array], counter: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Encrypts a 64-bit counter under a 64-bit key: two uint32 words in, two uniform uint32 words out."""
    a, b = key
    schedule = (a, b, a ^ b ^ jnp.uint32(_PARITY))
    x, y = counter[0] + schedule[0], counter[1] + schedule[1]
    for block in range(5):
        for distance in _ROTATIONS[block % 2]:
            x = x + y
            y = (y << jnp.uint32(distance)) | (y >> jnp.uint32(32 - distance))
            y = x ^ y
        x = x + schedule[(block + 1) % 3]
        y = y + schedule[(block + 2) % 3] + jnp.uint32(block + 1)
    return x, y


def uniform(bits: jax.Array) -> jax.Array:
    """Maps 21 random bits to float32 in [0, 1), each value exactly representable."""
    return bits.astype(jnp.float32) * jnp.float32(2.0**-21)


def tensor_key(seed: int, name: str) -> np.ndarray:
    """The uint32 `[2]` key of a tensor: a hash of the seed and the tensor's name."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    return np.frombuffer(digest, dtype="<u4").astype(np.uint32)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Region:
    """A block of consecutive elements of one tensor.

    Attributes:
        start: uint32 `[2]`, the high and low word of the flat index of the block's first element.
        key: uint32 `[2]`, the tensor's random key (a function of its name and the seed).
        shape: the block's shape (static).
        wide: the dtype sums are accumulated in, `float64` or, under a user's transformation, `float32`.
        short: whether the first axis is short enough to be summed in float32 before widening, which
            vector units like (static).
        count: how many of the block's elements are the tensor's own, a scalar; the others are padding, zero.
        statistics: one array per model, in the models' order, where every model has a statistic of the
            tensor: the same block of it where it has the tensor's shape, else all of it (which takes a part
            of grain `tensor`).
    """

    start: Any
    key: Any
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    wide: str = dataclasses.field(default="float32", metadata={"static": True})
    short: bool = dataclasses.field(default=False, metadata={"static": True})
    count: Any = None
    statistics: tuple[jax.Array, ...] | None = None

    def offset(self) -> jax.Array:
        """Every element's flat index within the block, uint32 `[*shape]`."""
        offset = jnp.zeros(self.shape, jnp.uint32)
        stride = 1
        for axis in reversed(range(len(self.shape))):
            step = jax.lax.broadcasted_iota(jnp.uint32, self.shape, axis)
            offset = offset + step * jnp.uint32(stride)
            stride *= self.shape[axis]
        return offset

    def index(self) -> tuple[jax.Array, jax.Array]:
        """High and low 32-bit words of every element's flat index in its tensor, each `[*shape]`."""
        offset = self.offset()
        low = offset + self.start[1]
        high = jnp.where(low < offset, self.start[0] + jnp.uint32(1), self.start[0])
        return high, low

    def before(self, index: jax.Array) -> jax.Array:
        """Bool `[*shape]`: which elements have a flat index below `index` (uint32 high and low word)."""
        # Subtracting two-word numbers once leaves one comparison per element.
        low = index[1] - self.start[1]
        high = index[0] - self.start[0] - (index[1] < self.start[1]).astype(jnp.uint32)
        behind = (index[0] < self.start[0]) | ((index[0] == self.start[0]) & (index[1] < self.start[1]))
        end = jnp.where(behind, jnp.uint32(0), jnp.where(high > 0, jnp.uint32(0xFFFFFFFF), low))
        return self.offset() < end

    def total(self, x: jax.Array) -> jax.Array:
        """The sum of `x` over the block's axes (its last ones), in the wide dtype."""
        if self.short:
            return jnp.sum(jnp.sum(x.astype(jnp.float32), axis=0).astype(self.wide))
        axes = tuple(range(x.ndim - len(self.shape), x.ndim))
        x = x.astype(self.wide)
        # Leading axes first: that order keeps vector lanes apart until the last, short sum.
        x = jnp.sum(x, axis=axes[:-1]) if len(axes) > 1 else x
        return jnp.sum(x, axis=-1)

    def dot(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """The inner product over the block's axes, multiplied and summed in the wide dtype.

        Ten times as slow on CPUs as `total(x * y)`, whose products are rounded to float32 first.
        """
        axes = tuple(range(x.ndim - len(self.shape), x.ndim))
        products = x.astype(self.wide) * y.astype(self.wide)
        products = jnp.sum(products, axis=axes[:-1]) if len(axes) > 1 else products
        return jnp.sum(products, axis=-1)

    def elements(self) -> jax.Array:
        """How many elements of the tensor the block holds, in the wide dtype; padding does not count."""
        return jnp.asarray(self.count).astype(self.wide)

    def random_bits(self, salt: int, model: int) -> jax.Array:
        """21 uniform random bits per element, uint32 `[*shape]`, for one model.

        A pure function of key, salt, model and flat index. One cipher call yields 64 bits, so three models
        share a counter.
        """
        return _share(self._random_words(salt, model // 3), model % 3)

    def random_bits_of_all(self, salt: int, models: int) -> tuple[jax.Array, ...]:
        """The `random_bits` of `models` models, for programs that use each of them more than once.

        In a block of an engine the cipher's words are arrays of their own: XLA would put the cipher, some
        hundred operations an element, into every loop that reads a bit of it.
        """
        words: list[tuple[jax.Array, jax.Array]] = []
        for group in range(-(-models // 3)):
            if not self.short:
                words.append(self._random_words(salt, group))
                continue
            # A loop whose number of turns is not known cannot be dissolved into what uses its results.
            once = jnp.minimum(jnp.asarray(self.count, jnp.uint32), jnp.uint32(1))
            blank = jnp.zeros(self.shape, jnp.uint32)
            words.append(
                jax.lax.fori_loop(
                    jnp.uint32(0), once, lambda _, __, g=group: self._random_words(salt, g), (blank, blank)
                )
            )
        return tuple(_share(words[model // 3], model % 3) for model in range(models))

    def _random_words(self, salt: int, group: int) -> tuple[jax.Array, jax.Array]:
        """64 uniform random bits per element, two uint32 `[*shape]`, for the three models of a group."""
        key = threefry((self.key[0], self.key[1]), (jnp.uint32(salt), jnp.uint32(group)))
        first, second = threefry(key, self.index())
        return first, second


def _share(words: tuple[jax.Array, jax.Array], place: int) -> jax.Array:
    """The 21 bits of the first, second or third model of a group."""
    first, second = words
    if place < 2:
        return words[place] >> jnp.uint32(11)
    return ((first & jnp.uint32(0x7FF)) << jnp.uint32(10)) | (second & jnp.uint32(0x3FF))


def whole(shape: tuple[int, ...], key: Any, wide: str) -> Region:
    """The region that is an entire tensor."""
    shape = shape or (1,)
    return Region(np.zeros(2, np.uint32), key, shape, wide, count=np.uint32(np.prod(shape, dtype=np.int64)))
