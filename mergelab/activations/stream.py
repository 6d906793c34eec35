"""Shuffled batches of activations, epoch after epoch, whose place is one number.

Each epoch, blocks of neighbouring rows are put in a new order; several blocks at a time, a group, are read
into a buffer. A group is cut into lanes of equal length, each shuffled by itself, and a batch takes as many
rows of every lane: a process that needs a part of each batch reads its lanes and nothing else, and batches
are the same however many processes share them. Everything follows from the seed, the epoch and the position,
so a stream goes on from any position exactly as if it had never stopped, without reading what came before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from mergelab.activations.source import ActivationSource
from mergelab.errors import SAEError

__all__ = ["ActivationStream", "Batch"]

_BLOCK_ROWS = 1024
_LANES = 64  # at most, and so the most processes that can share a batch


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
        buffer_rows: rows of a group, at least; the memory of the stream over all processes is about this many
            rows.
        process: which part of each batch this process reads, of `processes` equal ones. Side by side the
            parts are the batch that one process would read.
        processes: how many share a batch, a power of two. Fewer rows than there are lanes may be left out
            of an epoch, others each time.

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
        lanes = math.gcd(batch_size, _LANES)
        if lanes % processes:
            raise SAEError(
                f"batch_size is {batch_size}, which {processes} processes cannot share equally; a power of "
                f"two of them, up to {_LANES}, can share a multiple of their number."
            )
        self.source, self.target = source, target
        self.batch_size, self.seed = batch_size, seed
        self.process, self.processes, self.lanes = process, processes, lanes
        self.blocks_at_once = max(-(-buffer_rows // _BLOCK_ROWS), -(-batch_size // _BLOCK_ROWS))
        self.position = 0
        self._blocks = -(-source.rows // _BLOCK_ROWS)
        self._first_rows = source.rows - (self._blocks - 1) * _BLOCK_ROWS
        self._starts = self._lane_starts()
        self._group = lru_cache(maxsize=2)(self._read_group)
        self._order = lru_cache(maxsize=2)(self._shuffle_blocks)

    def state(self) -> dict[str, Any]:
        """The place of the next batch and what it depends on: plain JSON."""
        return {
            "position": self.position,
            "seed": self.seed,
            "rows": self.source.rows,
            "blocks_at_once": self.blocks_at_once,
            "lanes": self.lanes,
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
        place, wanted = self.position // self.lanes, self.batch_size // self.lanes
        pieces = []
        while wanted:
            pieces.append(self._from(place, wanted))
            taken = pieces[-1][2].shape[1]
            place, wanted = place + taken, wanted - taken
        x, y, rows = (np.concatenate(parts, axis=1) for parts in zip(*pieces, strict=True))
        self.position += self.batch_size
        x = x.reshape(-1, x.shape[-1])
        return Batch(x, x if self.target is None else y.reshape(-1, y.shape[-1]), rows.reshape(-1))

    def _from(self, place: int, wanted: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Up to `wanted` rows of each of this process's lanes from a place on, as far as their group goes."""
        epoch, place = divmod(place, int(self._starts[-1]))
        group = int(np.searchsorted(self._starts, place, side="right")) - 1
        first = place - int(self._starts[group])
        taken = slice(first, first + wanted)
        x, y, rows = self._group(epoch, group)
        return x[:, taken], y[:, taken], rows[:, taken]

    def _lane_starts(self) -> np.ndarray:
        """The place at which each group begins, in rows of one lane, and where the epoch ends."""
        sizes = np.full(self._blocks, _BLOCK_ROWS)
        sizes[0] = self._first_rows
        groups = np.add.reduceat(sizes, np.arange(0, self._blocks, self.blocks_at_once))
        return np.concatenate([[0], np.cumsum(groups // self.lanes)])

    def _shuffle_blocks(self, epoch: int) -> np.ndarray:
        """The blocks of an epoch in order; a short last block comes first, so that groups keep sizes."""
        short = int(self._first_rows < _BLOCK_ROWS)
        order = np.random.default_rng([self.seed, epoch]).permutation(self._blocks - short)
        return np.concatenate([[self._blocks - 1], order]) if short else order

    def _read_group(self, epoch: int, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """This process's lanes of a group: `[lanes, rows of a lane, d]`, and `[lanes, rows of a lane]`."""
        blocks = self._order(epoch)[group * self.blocks_at_once : (group + 1) * self.blocks_at_once]
        numbers = np.concatenate(
            [
                np.arange(b * _BLOCK_ROWS, min((b + 1) * _BLOCK_ROWS, self.source.rows))
                for b in blocks.tolist()
            ]
        )
        if len(numbers) % self.lanes:  # others are left out in each epoch
            numbers = np.roll(
                numbers, np.random.default_rng([self.seed, epoch, group]).integers(len(numbers))
            )
        length = len(numbers) // self.lanes
        mine = np.arange(self.lanes).reshape(self.processes, -1)[self.process]
        numbers = numbers[mine[0] * length : (mine[-1] + 1) * length]
        lanes = [np.random.default_rng([self.seed, epoch, group, lane]).permutation(length) for lane in mine]
        mixed = np.stack(lanes) + (np.arange(len(mine)) * length)[:, None]
        x = _read(self.source, numbers)[mixed]
        y = x if self.target is None else _read(self.target, numbers)[mixed]
        return x, y, numbers[mixed]


def _read(source: ActivationSource, numbers: np.ndarray) -> np.ndarray:
    """Rows by number, neighbours in one piece."""
    cuts = np.flatnonzero(np.diff(numbers) != 1) + 1
    spans = [(int(part[0]), int(part[-1]) + 1) for part in np.split(numbers, cuts)]
    return np.concatenate([source.read(*span) for span in spans])
