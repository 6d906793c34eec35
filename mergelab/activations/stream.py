"""Shuffled batches of activations with an exact place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from mergelab.activations.first_rows import FirstRows, gathered_first_rows, owned_places
from mergelab.activations.kept import KeptRows
from mergelab.errors import SAEError
from mergelab.processes.agreement import together

__all__ = ["ActivationSource", "ActivationStream", "Batch", "ScatteredRows", "lanes_of"]


@runtime_checkable
class ActivationSource(Protocol):
    """Activations `[rows, d_in]`, of which any range can be read.

    `mergelab.sae.toy.ToyGroundTruth` is one; files and stores are others.
    """

    @property
    def rows(self) -> int:
        """How many there are."""
        ...

    @property
    def d_in(self) -> int:
        """Width of a row."""
        ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop`: `[stop - start, d_in]`, float32."""
        ...


@runtime_checkable
class ScatteredRows(Protocol):
    """A source that reads rows from many places for less than what they cost one piece after the other."""

    def read_scattered(self, numbers: np.ndarray) -> np.ndarray:
        """Rows by number, in their order: `[len(numbers), d_in]`, float32."""
        ...


_BLOCK_ROWS = 1024
_LANES = 64  # at most, unless more processes than that share a batch
_FIRST_ROWS = 4096  # of a start sample, where groups are smaller than that
_GAP = 256  # rows between two that are wanted which are read with them, and not asked for apart


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


class _Group(NamedTuple):
    """Rows that are shuffled together, of the lanes that one process reads.

    Attributes:
        input: `[lanes, rows of a lane, d_in]`, shuffled; rows that are too long are replaced by others.
        target: `[lanes, rows of a lane, d_out]`; the same array where the input is to be reconstructed.
        rows: `[lanes, rows of a lane]`, numbers of the rows.
        asked: `[lanes, rows of a lane]`, numbers of the rows that were read, as they follow each other.
        short: `[lanes, rows of a lane]`, which of those are short enough.
    """

    input: np.ndarray
    target: np.ndarray
    rows: np.ndarray
    asked: np.ndarray
    short: np.ndarray


class ActivationStream:
    """An endless iterator of batches over the rows of a source that count.

    Rows that do not count by their place are passed over. Those that are too long are known when they are
    read: a lane of a group goes round its other rows in their place, so that shapes and places stay.

    Args:
        source: the activations.
        batch_size: rows of a batch, over all processes.
        seed: seed of the order.
        target: what to reconstruct, row by row, for a transcoder; by default the input itself.
        buffer_rows: rows of a group, at least; the memory of the stream over all processes is about this many
            rows.
        part: places in the batch whose rows this process reads, ascending; all by default. Side by
            side the parts are the batch that one process would read.
        readers: how many processes share a batch, any number: each reads the lanes that its part touches.
        kept: which rows count; all by default.

    Attributes:
        rows: rows of an epoch: those that count by their place.
        lanes: how many rows are taken side by side: the largest divisor of the batch up to 64, or up to the
            number of readers where they are more. Fewer rows than there are lanes may be left
            out of an epoch, others each time. A stream that is restored has those of the run.

    Raises:
        SAEError: fewer rows count than a batch has, or sizes do not fit.
    """

    def __init__(
        self,
        source: ActivationSource,
        batch_size: int,
        *,
        seed: int = 0,
        target: ActivationSource | None = None,
        buffer_rows: int = 65_536,
        part: np.ndarray | None = None,
        readers: int = 1,
        kept: KeptRows | None = None,
    ) -> None:
        self.kept = KeptRows() if kept is None else kept
        counts = self.kept.counts(source.rows, _BLOCK_ROWS)
        self.rows = int(counts.sum())
        if not 1 <= batch_size <= self.rows:
            which = (
                "there are"
                if self.rows == source.rows
                else f"of {source.rows} that count (skip_positions, ...)"
            )
            raise SAEError(f"batch_size is {batch_size}; it must be from 1 to the {self.rows} rows {which}.")
        if target is not None and target.rows != source.rows:
            raise SAEError(
                f"inputs have {source.rows} rows but targets {target.rows}; they must be the same tokens."
            )
        self.source, self.target = source, target
        self.batch_size, self.seed = batch_size, seed
        self.part = np.arange(batch_size) if part is None else np.asarray(part, np.int64)
        self.blocks_at_once = max(-(-buffer_rows // _BLOCK_ROWS), -(-batch_size // _BLOCK_ROWS))
        self.position = 0
        self._counts = counts
        self._group = lru_cache(maxsize=2)(self._read_group)
        self._drawn: dict[tuple[int, int], _Group] = {}
        self._order = lru_cache(maxsize=2)(self._shuffle_blocks)
        self._lay_lanes(lanes_of(batch_size, readers))

    def _lay_lanes(self, lanes: int) -> None:
        """Splits each group into lanes, of which this process reads those that its part touches."""
        self.lanes = lanes
        at_once = self.batch_size // lanes
        touched, inverse = np.unique(self.part // at_once, return_inverse=True)
        self._mine = touched
        whole = len(self.part) == len(touched) * at_once
        self._taken = None if whole else (inverse, self.part % at_once)
        self._group_ends = self._ends_of_groups()
        self._starts = np.concatenate([[0], np.cumsum(np.diff(self._group_ends, prepend=0) // lanes)])
        self._forget()

    def _forget(self) -> None:
        """Drops what was read for other lanes or other limits."""
        self._group.cache_clear()
        self._drawn.clear()

    def state(self) -> dict[str, Any]:
        """The place of the next batch and what it depends on: plain JSON."""
        return {
            "position": self.position,
            "seed": self.seed,
            "rows": self.source.rows,
            "kept_rows": self.rows,
            "blocks_at_once": self.blocks_at_once,
            "lanes": self.lanes,
            # JSON has no infinity.
            "limits": [
                one if math.isfinite(one) else None for one in (self.kept.limit, self.kept.target_limit)
            ],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to a place that `state` named, with the limits of norms that were found then.

        Raises:
            SAEError: the state is of another source, seed or buffer, whose batches would be others.
        """
        lanes = state.get("lanes")
        if isinstance(lanes, int) and lanes > 0 and self.batch_size % lanes == 0:
            self._lay_lanes(lanes)  # those of the processes that the run began with
        mine = self.state()
        for name, value in mine.items():
            if name not in ("position", "limits") and state.get(name) != value:
                raise SAEError(
                    f"the data stood at {name}={state.get(name)}, but now {name} is {value}: its batches "
                    "would be others; resume with the data and settings the run began with."
                )
        self.go_to(int(state["position"]), state["limits"])

    def go_to(self, position: int, limits: Sequence[float | None]) -> None:
        """Goes to a place in the rows of all epochs, with limits of norms; None is no limit."""
        known = [math.inf if one is None else float(one) for one in limits]
        self.kept = replace(self.kept, limit=known[0], target_limit=known[1])
        self._forget()
        self.position = position

    def draw(self, count: int) -> FirstRows:
        """The first rows of the first epoch, the same in every process; every process must make the call.

        They are of whole groups, which each process reads for its batches in any case and then keeps, so that
        they cost nothing: at most `count` rows, at most the first group, and of small groups as many as have
        4,096 rows.

        Args:
            count: rows to draw, at most.
        """
        owned = owned_places(self._mine.tolist())
        with together("reading the start sample", distributed=jax.process_count() > 1):
            mine = self.first_rows(count, owned)
        # A lane all of whose rows are too long has those of another.
        return gathered_first_rows(mine).distinct()

    def first_rows(self, count: int, places: Sequence[int] | None = None) -> FirstRows:
        """What `draw` takes of some of this process's lanes.

        Args:
            count: rows to draw of all lanes, at most.
            places: places of the lanes among those that this process reads; all if None.
        """
        chosen = list(range(len(self._mine)) if places is None else places)
        starts, lengths = self._starts[:-1], np.diff(self._starts)  # in each lane
        most = max(int(lengths[lengths > 0][0]) * self.lanes, _FIRST_ROWS)
        wanted = max(min(count, most, int(self._starts[-1]) * self.lanes) // self.lanes, 1)
        wide = (self.source.d_in, self.source.d_in if self.target is None else self.target.d_in)
        xs, ys = ([np.empty((0, width), np.float32)] for width in wide)
        rows, too_long, examined = [np.empty(0, np.int64)], [np.empty(0, np.int64)], 0
        needed = np.flatnonzero((starts < wanted) & (lengths > 0)) if chosen else []
        for group in map(int, needed):
            found = self._drawn[(0, group)] = self._read_group(0, group)
            taken = slice(0, wanted - int(starts[group]))
            for pieces, array in zip((xs, ys, rows), found[:3], strict=True):
                piece = array[chosen, taken]
                pieces.append(piece.reshape(-1, *piece.shape[2:]))
            asked, short = found.asked[chosen], found.short[chosen]
            examined += asked.size
            too_long.append(asked[~short])
        x = np.concatenate(xs)
        y = x if self.target is None else np.concatenate(ys)
        return FirstRows(x, y, np.concatenate(rows), examined, np.concatenate(too_long)).distinct()

    def __iter__(self) -> ActivationStream:
        return self

    def __next__(self) -> Batch:
        if not len(self.part):  # a batch of fewer rows than there are devices
            self.position += self.batch_size
            x = np.empty((0, self.source.d_in), np.float32)
            y = x if self.target is None else np.empty((0, self.target.d_in), np.float32)
            return Batch(x, y, np.empty(0, np.int64))
        place, wanted = self.position // self.lanes, self.batch_size // self.lanes
        pieces = []
        while wanted:
            pieces.append(self._from(place, wanted))
            taken = pieces[-1][2].shape[1]
            place, wanted = place + taken, wanted - taken
        xs, ys, rows = zip(*pieces, strict=True)
        self.position += self.batch_size
        x = self._of_part(xs)
        return Batch(x, x if self.target is None else self._of_part(ys), self._of_part(rows))

    def _of_part(self, pieces: Sequence[np.ndarray]) -> np.ndarray:
        """Pieces `[lanes, rows, ...]` of the lanes that are read, as the rows of this process's part."""
        found = np.concatenate(pieces, axis=1)
        return found.reshape(-1, *found.shape[2:]) if self._taken is None else found[self._taken]

    def _from(self, place: int, wanted: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The next rows of this process's lanes, `wanted` at most, as far as their group goes."""
        epoch, place = divmod(place, int(self._starts[-1]))
        group = int(np.searchsorted(self._starts, place, side="right")) - 1
        first = place - int(self._starts[group])
        taken = slice(first, first + wanted)
        x, y, rows = self._group(epoch, group)[:3]
        return x[:, taken], y[:, taken], rows[:, taken]

    def _ends_of_groups(self) -> np.ndarray:
        """The place in an epoch's rows at which each group ends: of whole blocks, where lanes divide them.

        All groups but the first are of whole lanes, so that only what is left of an epoch is left out.
        """
        blocks = -(-self.rows // _BLOCK_ROWS)
        sizes = np.full(blocks, _BLOCK_ROWS)
        sizes[0] = self.rows - (blocks - 1) * _BLOCK_ROWS
        ends = np.cumsum(np.add.reduceat(sizes, np.arange(0, blocks, self.blocks_at_once)))
        return self.rows - (self.rows - ends) // self.lanes * self.lanes

    def _shuffle_blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The blocks of an epoch in order, and the place in its rows at which each ends.

        A short last block comes first, so that groups keep sizes.
        """
        blocks = len(self._counts)
        short = int(self.source.rows < blocks * _BLOCK_ROWS)
        order = np.random.default_rng([self.seed, epoch]).permutation(blocks - short)
        order = np.concatenate([[blocks - 1], order]) if short else order
        return order, np.cumsum(self._counts[order])

    def _numbers(self, epoch: int, group: int) -> np.ndarray:
        """The numbers of a group's rows, those of a block in order."""
        order, ends = self._order(epoch)
        begin, end = int(self._group_ends[group - 1]) if group else 0, int(self._group_ends[group])
        first = int(np.searchsorted(ends, begin, side="right"))
        last = int(np.searchsorted(ends, end, side="left"))
        numbers = np.concatenate(
            [
                self.kept.numbers(b * _BLOCK_ROWS, min((b + 1) * _BLOCK_ROWS, self.source.rows))
                for b in order[first : last + 1].tolist()
            ]
        )
        before = begin - int(ends[first - 1] if first else 0)
        return numbers[before : before + end - begin]

    def _read_group(self, epoch: int, group: int) -> _Group:
        """This process's lanes of a group; one that was drawn from is not read again."""
        if (epoch, group) in self._drawn:
            return self._drawn.pop((epoch, group))
        numbers = self._numbers(epoch, group)
        if len(numbers) % self.lanes:  # others are left out in each epoch
            numbers = np.roll(
                numbers, np.random.default_rng([self.seed, epoch, group]).integers(len(numbers))
            )
        length = len(numbers) // self.lanes
        lanes = self._mine
        asked = np.concatenate([numbers[lane * length : (lane + 1) * length] for lane in lanes])
        x, y, short = self._read_rows(asked)
        mine = asked
        chosen = []
        for place, lane in enumerate(lanes):
            good = place * length + np.flatnonzero(short[place * length : (place + 1) * length])
            if not len(good):
                x, y, mine, good = self._from_next_lane(x, y, mine, numbers, int(lane), length)
            mixed = np.random.default_rng([self.seed, epoch, group, lane]).permutation(len(good))
            # A lane with rows that are too long goes round the others.
            chosen.append(np.resize(good[mixed], length))
        order = np.stack(chosen)
        lanes_x = x[order]
        by_lane = (len(lanes), length)
        return _Group(
            lanes_x,
            lanes_x if y is x else y[order],
            mine[order],
            asked.reshape(by_lane),
            short.reshape(by_lane),
        )

    def _read_rows(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows and targets by number, and which are short enough."""
        x = _read(self.source, numbers)
        y = x if self.target is None else _read(self.target, numbers)
        return x, y, self.kept.short_enough(x, y)

    def _from_next_lane(
        self, x: np.ndarray, y: np.ndarray, mine: np.ndarray, numbers: np.ndarray, lane: int, length: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """What a lane takes all of whose rows are too long: those of the next one that has others.

        The rows, targets and numbers with those appended, and the places of these among them.
        """
        for other in (*range(lane + 1, self.lanes), *range(lane)):
            asked = numbers[other * length : (other + 1) * length]
            more_x, more_y, short = self._read_rows(asked)
            if short.any():
                good = len(x) + np.arange(int(short.sum()))
                both = np.concatenate([x, more_x[short]])
                targets = both if y is x else np.concatenate([y, more_y[short]])
                return both, targets, np.concatenate([mine, asked[short]]), good
        raise SAEError(
            f"rows {numbers.min()} to {numbers.max()}: none of the {len(numbers)} that are shuffled together "
            "is short enough (max_norm_multiple); raise it, or set it to null for no limit."
        )


def lanes_of(batch_size: int, readers: int = 1) -> int:
    """How many rows a stream takes from a batch side by side: the largest divisor up to 64, or `readers`."""
    most = min(batch_size, max(_LANES, readers))
    return next(one for one in range(most, 0, -1) if batch_size % one == 0)


def _read(source: ActivationSource, numbers: np.ndarray) -> np.ndarray:
    """Rows by number, those near each other in one piece, unless the source has a better way."""
    if isinstance(source, ScatteredRows):
        return source.read_scattered(numbers)
    steps = np.diff(numbers)
    cuts = np.flatnonzero((steps < 1) | (steps > _GAP)) + 1
    pieces = []
    for part in np.split(numbers, cuts):
        first, last = int(part[0]), int(part[-1])
        rows = source.read(first, last + 1)
        pieces.append(rows if len(rows) == len(part) else rows[part - first])
    return np.concatenate(pieces)
