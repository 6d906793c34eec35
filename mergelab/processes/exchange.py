"""What the processes of one run hand to each other on the host: facts, and rows that each has read."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

__all__ = ["gathered_facts", "gathered_rows"]


def gathered_facts(mine: Any) -> list[Any]:
    """The facts of every process, in their order; every process must call it at the same point.

    Args:
        mine: plain JSON data of this process.
    """
    import jax

    if jax.process_count() == 1:
        return [mine]
    data = np.frombuffer(json.dumps(mine).encode(), np.uint8)
    return [json.loads(piece.tobytes()) for piece in _pieces(data)]


def gathered_rows(mine: np.ndarray) -> np.ndarray:
    """Rows of every process, `[rows, ...]`, one process after the other; each may have another number.

    Every process must call it at the same point, with one dtype and width.
    """
    import jax

    return mine if jax.process_count() == 1 else np.concatenate(_pieces(mine))


def _pieces(mine: np.ndarray) -> list[np.ndarray]:
    from jax.experimental import multihost_utils

    sizes = np.asarray(multihost_utils.process_allgather(np.array(len(mine), np.int32))).reshape(-1)
    padded = np.zeros((int(sizes.max()), *mine.shape[1:]), mine.dtype)
    padded[: len(mine)] = mine
    # As bytes: jax would narrow 64-bit numbers.
    data = np.ascontiguousarray(padded).view(np.uint8).reshape(-1)
    found = np.asarray(multihost_utils.process_allgather(data))
    rows = found.view(mine.dtype).reshape(len(sizes), *padded.shape)
    return [piece[:size] for piece, size in zip(rows, sizes.tolist(), strict=True)]
