"""Matrices of bfloat16 that a CPU multiplies piece by piece, where XLA would make a float32 copy of each.

XLA has no bfloat16 arithmetic on a CPU: it converts whole operands in every call, and the first touch of that
fresh memory costs more than the product. Seen as integers, a matrix stays as it is: a loop widens some rows
at a time, which fit into a core's cache, and multiplies them in float32. A bfloat16 is the upper half of the
float32 of the same value, so widening is a shift.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt16

from mergelab.compat import register_dataclass

__all__ = ["Bits", "StackedBits", "as_bits", "product_by_columns"]

_PIECE = 1 << 16
"""Elements widened at once: 256 KiB in float32, which stay in a core's cache."""
_FEWEST, _MOST = 16, 128
"""Rows of a piece, at least: every piece passes once over all sums, of which each token has its own."""


@register_dataclass
@dataclass(frozen=True)
class Bits:
    """A bfloat16 matrix `[rows, columns]`, seen as integers; it takes a kernel's or a table's place.

    Attributes:
        bits: the matrix, each element the 16 bits of a bfloat16.
    """

    bits: UInt16[Array, "rows columns"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""
        return self.bits.shape

    def product(self, x: Float[Array, "tokens rows"]) -> Float[Array, "tokens columns"]:
        """`x @ matrix`, summed in float32 and rounded to the dtype of `x`."""
        return _product(self.bits, 0, self.bits.shape[0], x).astype(x.dtype)

    def scores(self, x: Float[Array, "tokens columns"]) -> Float[Array, "tokens rows"]:
        """`x @ matrix.T`: each row's product with `x`, rounded to the dtype of `x`."""
        rows, columns = self.bits.shape
        size = _piece(rows, columns, x.shape[0])
        wide = x.astype(jnp.float32)

        def put(found: Array, start: Array | int, size: int) -> Array:
            part = wide @ _widen(jax.lax.dynamic_slice_in_dim(self.bits, start, size, axis=0)).T
            return jax.lax.dynamic_update_slice_in_dim(found, part, start, axis=1)

        found = jnp.zeros((x.shape[0], rows), jnp.float32)
        found = jax.lax.fori_loop(0, rows // size, lambda n, found: put(found, n * size, size), found)
        if rest := rows % size:
            found = put(found, rows - rest, rest)
        return found.astype(x.dtype)

    def take(self, ids: Int[Array, "batch length"]) -> Float[Array, "batch length columns"]:
        """The rows of these numbers, in bfloat16."""
        return _widen(jnp.take(self.bits, ids, axis=0)).astype(jnp.bfloat16)


@register_dataclass
@dataclass(frozen=True)
class StackedBits:
    """The bfloat16 matrices of several experts `[experts, rows, columns]`, seen as integers.

    Attributes:
        bits: the matrices, each element the 16 bits of a bfloat16.
    """

    bits: UInt16[Array, "experts rows columns"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Experts, rows and columns."""
        return self.bits.shape

    def by_block(
        self, x: Float[Array, "blocks rows width"], owner: Int[Array, " blocks"], used: Int[Array, ""]
    ) -> Float[Array, "blocks rows columns"]:
        """The rows of each block times the matrix of its expert, rounded to the dtype of `x`.

        Args:
            x: blocks of vectors.
            owner: the expert of each block.
            used: how many blocks, the first ones, to multiply; the others stay zero.
        """

        def one(n: Array, found: Array) -> Array:
            rows = jax.lax.dynamic_index_in_dim(x, n, keepdims=False)
            product = self._product(owner[n], rows).astype(x.dtype)
            return jax.lax.dynamic_update_index_in_dim(found, product, n, 0)

        empty = jnp.zeros((*x.shape[:2], self.shape[2]), x.dtype)
        return jax.lax.fori_loop(jnp.int32(0), used, one, empty)

    def wide(self) -> Float[Array, "experts rows columns"]:
        """The matrices as an array of bfloat16, which XLA converts as a whole."""
        return jax.lax.bitcast_convert_type(self.bits, jnp.bfloat16)

    def _product(self, expert: Array, x: Float[Array, "tokens rows"]) -> Float[Array, "tokens columns"]:
        experts, rows, columns = self.bits.shape
        # One matrix with all experts' rows, of which some are taken: an expert by itself would be a copy.
        return _product(self.bits.reshape(experts * rows, columns), expert * rows, rows, x)


def _product(
    bits: UInt16[Array, "all columns"], first: Array | int, rows: int, x: Float[Array, "tokens rows"]
) -> Float[Array, "tokens columns"]:
    """`x` times a matrix's rows from `first` on, in float32."""
    columns = bits.shape[1]
    size = _piece(rows, columns, x.shape[0])
    wide = x.astype(jnp.float32)

    def add(sums: Array, start: Array | int, size: int) -> Array:
        part = jax.lax.dynamic_slice_in_dim(wide, start, size, axis=1)
        return sums + part @ _widen(jax.lax.dynamic_slice_in_dim(bits, first + start, size, axis=0))

    sums = jnp.zeros((x.shape[0], columns), jnp.float32)
    sums = jax.lax.fori_loop(0, rows // size, lambda n, sums: add(sums, n * size, size), sums)
    if rest := rows % size:
        sums = add(sums, rows - rest, rest)
    return sums


def product_by_columns(
    x: Float[Array, "tokens width"],
    kernel: Float[Array, "one other"],
    *,
    transposed: bool = False,
    piece: int = 1 << 20,
) -> Float[Array, "tokens columns"]:
    """`x @ kernel` in float32, of a bfloat16 kernel some columns at a time; it has no derivative.

    Inside a program, whose operands are no `Bits`, the kernel is copied once as it is, and not in float32.

    Args:
        x: vectors, widened to float32.
        kernel: a bfloat16 matrix, `[width, columns]`.
        transposed: whether it is given as `[columns, width]`.
        piece: elements of the kernel widened at once.
    """
    axis = 0 if transposed else 1
    width, columns = kernel.shape[1 - axis], kernel.shape[axis]
    bits, wide = jax.lax.bitcast_convert_type(kernel, jnp.uint16), x.astype(jnp.float32)
    size = max(1, min(piece // width, columns))

    def put(found: Array, start: Array | int, size: int) -> Array:
        part = _widen(jax.lax.dynamic_slice_in_dim(bits, start, size, axis=axis))
        product = wide @ (part.T if transposed else part)
        return jax.lax.dynamic_update_slice_in_dim(found, product, start, axis=1)

    found = jnp.zeros((x.shape[0], columns), jnp.float32)
    found = jax.lax.fori_loop(0, columns // size, lambda n, found: put(found, n * size, size), found)
    if rest := columns % size:
        found = put(found, columns - rest, rest)
    return jax.lax.stop_gradient(found)


def _piece(rows: int, columns: int, tokens: int) -> int:
    """Rows widened at once: a divisor of all rows where one is near, for a rest is compiled by itself."""
    most = min(max(_PIECE // columns, _FEWEST, min(tokens, _MOST)), rows)
    return next((size for size in range(most, most // 2, -1) if rows % size == 0), most)


def _widen(bits: UInt16[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)


_WIDENED: dict[tuple[str | None, int], Callable[[Array], Bits | StackedBits]] = {
    ("kernel", 2): Bits,
    ("embedding", 2): Bits,
    **{(name, 3): StackedBits for name in ("gate", "up", "down")},
}
"""What takes the place of the leaves that `Linear`, `Embed` and `MixtureOfExperts` make, by name and rank."""


def as_bits(params: Any) -> Any:
    """Parameters on a CPU with `Bits` or `StackedBits` for bfloat16 matrices, in the same memory."""

    def widened(path: tuple[Any, ...], leaf: Any) -> Any:
        key = getattr(path[-1], "key", None)
        if (key, jnp.ndim(leaf)) not in _WIDENED or leaf.dtype != jnp.bfloat16:
            return leaf
        # A committed array stays on its device; another goes wherever JAX computes.
        device = next(iter(leaf.devices())) if leaf.committed else None
        seen = jax.device_put(np.asarray(leaf).view(np.uint16), device, may_alias=True)
        return _WIDENED[key, jnp.ndim(leaf)](seen)

    return jax.tree_util.tree_map_with_path(widened, params)
