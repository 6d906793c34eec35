"""Shuffled batches of activations, epoch after epoch, whose place is one number.

Each epoch, blocks of neighbouring rows are put in a new order; several blocks at a time are read into a
buffer and their rows shuffled there. Everything follows from the seed, the epoch and the position, so a
stream goes on from any position exactly as if it had never stopped, without reading what came before.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from mergelab.data.activations.source import ActivationSource
from mergelab.errors import SAEError

__all__ = ["ActivationStream", "Batch"]

_BLOCK_ROWS = 1024


@dataclass(frozen=True)
class Batch:
    """Rows of one step.

    Attributes:
        input: `[rows, d_in]`, float32.
        target: `[rows, d_out]`; the same array where the input is to be reconstructed.
        rows: `[rows]`, int64, their numbers in the source.
    """

    input: np.ndarray
    target: np.ndarray
    rows: np.ndarray


class ActivationStream:
    """An endless iterator of batches over a source.

    Args:
        source: the activations.
        batch_size: rows of a batch, over all processes.
        seed: of the order.
        target: what to reconstruct, row by row, for a transcoder; by default the input itself.
        buffer_rows: rows that are shuffled together, at least; the memory of the stream is about this many
        rows. process: which part of each batch this process reads, of `processes` equal ones. Side by side
            the parts are the batch that one process would read.
        processes: how many share a batch.

    Raises:
        SAEError: the source has fewer rows than a batch, or sizes do not fit.
    """

    def __init__(
        self,
        source: ActivationSource,
        batch_size: int,
        *,
        seed: int = 0,
        target: ActivationSource | None = None,
        buffer_rows: int = 65_536,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        if not 1 <= batch_size <= source.rows:
            raise SAEError(
                f"batch_size is {batch_size}; it must be from 1 to the {source.rows} rows there are."
            )
        if target is not None and target.rows != source.rows:
            raise SAEError(
                f"inputs have {source.rows} rows but targets {target.rows}; they must be the same tokens."
            )
        if batch_size % processes:
            raise SAEError(f"batch_size is {batch_size}, which {processes} processes cannot share equally.")
        self.source, self.target = source, target
        self.batch_size, self.seed = batch_size, seed
        self.process, self.processes = process, processes
        self.blocks_at_once = max(-(-buffer_rows // _BLOCK_ROWS), -(-batch_size // _BLOCK_ROWS))
        self.position = 0
        self._group = lru_cache(maxsize=2)(self._read_group)
        self._order = lru_cache(maxsize=2)(self._shuffle_blocks)

    def state(self) -> dict[str, Any]:
        """The place of the next batch and what it depends on: plain JSON."""
        return {
            "position": self.position,
            "seed": self.seed,
            "rows": self.source.rows,
            "blocks_at_once": self.blocks_at_once,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to a place that `state` named.

        Raises:
            SAEError: the state is of another source, seed or buffer, whose batches would be others.
        """
        mine = self.state()
        for name, value in mine.items():
            if name != "position" and state.get(name) != value:
                raise SAEError(
                    f"the data stood at {name}={state.get(name)}, but now {name} is {value}: its batches "
                    "would be others; resume with the data and settings the run began with."
                )
        self.position = int(state["position"])

    def __iter__(self) -> ActivationStream:
        return self

    def __next__(self) -> Batch:
        share = self.batch_size // self.processes
        start = self.position + self.process * share
        pieces, wanted = [], share
        while wanted:
            piece = self._from(start, wanted)
            pieces.append(piece)
            start, wanted = start + len(piece[2]), wanted - len(piece[2])
        x, y, rows = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
        self.position += self.batch_size
        return Batch(x, x if self.target is None else y, rows)

    def _from(self, position: int, wanted: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Up to `wanted` rows from a position on, as far as its buffer goes."""
        epoch, place = divmod(position, self.source.rows)
        _, starts = self._order(epoch)
        group = int(np.searchsorted(starts, place, side="right")) - 1
        x, y, rows = self._group(epoch, group)
        first = place - int(starts[group])
        taken = slice(first, first + wanted)
        return x[taken], y[taken], rows[taken]

    def _shuffle_blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The blocks of an epoch in order, and the place at which each group of them begins."""
        total = self.source.rows
        blocks = -(-total // _BLOCK_ROWS)
        order = np.random.default_rng([self.seed, epoch]).permutation(blocks)
        sizes = np.minimum(_BLOCK_ROWS, total - order * _BLOCK_ROWS)
        ends = np.cumsum(np.add.reduceat(sizes, np.arange(0, blocks, self.blocks_at_once)))
        return order, np.concatenate([[0], ends[:-1]])

    def _read_group(self, epoch: int, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        order, _ = self._order(epoch)
        blocks = order[group * self.blocks_at_once : (group + 1) * self.blocks_at_once]
        spans = [(b * _BLOCK_ROWS, min((b + 1) * _BLOCK_ROWS, self.source.rows)) for b in blocks.tolist()]
        rows = np.concatenate([np.arange(*span) for span in spans])
        mixed = np.random.default_rng([self.seed, epoch, group]).permutation(len(rows))
        x = np.concatenate([self.source.read(*span) for span in spans])[mixed]
        y = x
        if self.target is not None:
            y = np.concatenate([self.target.read(*span) for span in spans])[mixed]
        return x, y, rows[mixed]
