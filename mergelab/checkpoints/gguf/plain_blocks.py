"""The simplest quantized blocks of GGUF files, Q4_0, Q4_1 and Q8_0, dequantized straight into their place.

Thirty-two elements share a float16 scale, and in Q4_1 a float16 minimum; a byte holds one element, or the
elements `i` and `i + 16` in its lower and upper half. The values are bit for bit those of the `gguf` package,
which makes several copies on the way and takes three times as long: most of the time in which such a model
loads. (https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

__all__ = ["PLAIN"]

_ELEMENTS = 32


def _q4_0(blocks: np.ndarray, out: np.ndarray) -> None:
    np.copyto(out, _halves(blocks[:, 2:]))
    np.subtract(out, np.float32(8), out=out)
    np.multiply(out, _floats(blocks[:, :2]), out=out)


def _q4_1(blocks: np.ndarray, out: np.ndarray) -> None:
    scales = _floats(blocks[:, :4])
    np.copyto(out, _halves(blocks[:, 4:]))
    np.multiply(out, scales[:, :1], out=out)
    np.add(out, scales[:, 1:], out=out)


def _q8_0(blocks: np.ndarray, out: np.ndarray) -> None:
    np.copyto(out, blocks[:, 2:].view(np.int8))
    np.multiply(out, _floats(blocks[:, :2]), out=out)


PLAIN: dict[int, Callable[[np.ndarray, np.ndarray], None]] = {2: _q4_0, 3: _q4_1, 8: _q8_0}
"""By number of the type: fills float32 `[blocks, 32]` from bytes `[blocks, bytes of a block]`."""


def _floats(scales: np.ndarray) -> np.ndarray:
    """Float16 numbers that lie in the first bytes of each block, as float32."""
    return np.ascontiguousarray(scales).view(np.float16).astype(np.float32)


def _halves(bytes_: np.ndarray) -> np.ndarray:
    """The lower halves of a block's sixteen bytes, then the upper ones, uint8 `[blocks, 32]`."""
    found = np.empty((len(bytes_), 2, _ELEMENTS // 2), np.uint8)
    np.bitwise_and(bytes_, 15, out=found[:, 0])
    np.right_shift(bytes_, 4, out=found[:, 1])
    return found.reshape(-1, _ELEMENTS)
