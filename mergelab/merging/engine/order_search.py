"""Exact order statistics of keys that arrive block by block, in memory far below the tensor's size.

A sample of the keys brackets the wanted one; one pass counts what lies above the bracket and collects what
lies inside; if the rank falls inside, the answer is a selection among the few collected, else the bracket is
moved and the pass repeated. The result is exact: sampling only decides how much work it takes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mergelab.operators.order_statistics import Selection, split_words

__all__ = ["FoundOrder", "KeySearch"]

_HIGHEST = 0xFFFFFFFF
_PIECE = 2**18
_SMALL = 2**13
_LEVELS = 6
_HELD, _FEWEST = 2**23, 1024
_ALL = np.full(2, _HIGHEST, np.uint32)


@dataclass
class FoundOrder:
    """What one block holds with respect to the bracket.

    Attributes:
        above: keys above it.
        inside: keys inside it.
        keys: those inside, in element order; an even subset of them where they were too many.
        complete: whether `keys` is all of them.
        levels: instead of `keys`, how many equal each of the bracket's few levels.
    """

    above: int
    inside: int
    keys: np.ndarray
    complete: bool = True
    levels: np.ndarray | None = None


@dataclass
class KeySearch:
    """Finds the `count`-th largest of `size` keys and where its ties end.

    Attributes:
        count: how many of the largest keys to select, in `[1, size]`.
        size: how many keys there are in all.
        limit: how many keys a block may hand over, at most its share of 2^23; more are subsampled, which
            costs another pass.
    """

    count: int
    size: int
    limit: int = 2**20
    low: int = 0
    high: int = _HIGHEST
    threshold: int | None = None
    cutoff: np.ndarray | None = None
    _bounds: tuple[int, int] = (0, _HIGHEST)
    _levels: np.ndarray | None = None
    _ties: list[int] = field(default_factory=list)
    _ties_kept: int = 0

    def narrow(self, sample: np.ndarray, *, independent: bool = True) -> None:
        """Chooses the bracket from a sample of all keys.

        Args:
            sample: some of the keys.
            independent: False for a sample of runs, whose neighbors resemble each other, so that it is
                worth less than its size.
        """
        if sample.size:
            self._bracket(sample, self.size - self.count, self.size, 4 if independent else 24)

    def _bracket(self, sample: np.ndarray, below: int, population: int, errors: float) -> None:
        """Brackets the key with `below` keys under it, some standard errors of the sample to each side."""
        share = below / population
        error = np.sqrt(max(share * (1 - share), 1 / sample.size) / sample.size)
        spread = errors * error + 1 / sample.size
        first = max(0, int((share - spread) * (sample.size - 1)))
        last = min(sample.size - 1, int(np.ceil((share + spread) * (sample.size - 1))))
        ordered = np.sort(sample)
        self.low = self._bounds[0] if first == 0 else int(ordered[first])
        self.high = self._bounds[1] if last == sample.size - 1 else int(ordered[last])
        # Keys of 16-bit weights take few values: counting each is far cheaper than collecting their repeats.
        levels = np.unique(ordered[first : last + 1])
        few = levels.size <= _LEVELS and levels[0] == self.low and levels[-1] == self.high
        self._levels = levels if few else None

    def look(self, keys: np.ndarray) -> FoundOrder:
        """Examines one block of keys (1-D); safe to call from several threads."""
        levels = self._levels
        if levels is not None and (found := self._count_levels(keys, levels)) is not None:
            return found
        low, width = np.uint32(self.low), np.uint32(self.high - self.low)
        below = inside = 0
        collected: list[np.ndarray] = []
        # Pieces that fit the second-level cache make the passes below nearly free.
        for start in range(0, keys.size, _PIECE):
            piece = keys[start : start + _PIECE]
            below += int(np.count_nonzero(piece < low))
            within = (piece - low) <= width
            count = int(np.count_nonzero(within))
            inside += count
            if count and width:
                collected.append(np.compress(within, piece))
        above = keys.size - below - inside
        found = np.concatenate(collected) if collected else _none()
        # All blocks are held together: each gets its share of what memory allows.
        limit = min(self.limit, max(_FEWEST, _HELD * keys.size // self.size))
        if found.size <= limit:
            return FoundOrder(above, inside, found)
        return FoundOrder(above, inside, found[:: -(-found.size // limit)].copy(), complete=False)

    def _count_levels(self, keys: np.ndarray, levels: np.ndarray) -> FoundOrder | None:
        """Counts each level; None if the bracket holds other values too."""
        above = below = 0
        counts = np.zeros(levels.size, np.int64)
        for start in range(0, keys.size, _PIECE):
            piece = keys[start : start + _PIECE]
            above += int(np.count_nonzero(piece > levels[-1]))
            below += int(np.count_nonzero(piece < levels[0]))
            for position, level in enumerate(levels):
                counts[position] += np.count_nonzero(piece == level)
        inside = int(counts.sum())
        if above + inside + below != keys.size:
            return None
        return FoundOrder(above, inside, _none(), levels=counts)

    def conclude(self, blocks: list[FoundOrder]) -> bool:
        """Takes all blocks of one pass, in order; False if another pass (with a new bracket) is needed."""
        above = sum(b.above for b in blocks)
        inside = sum(b.inside for b in blocks)
        if above >= self.count:
            self._bounds = (self.high + 1, self._bounds[1])
            self.low, self.high = self._bounds
            self._levels = None
            return False
        if above + inside < self.count:
            self._bounds = (self._bounds[0], self.low - 1)
            self.low, self.high = self._bounds
            self._levels = None
            return False
        wanted = self.count - above
        if self.low == self.high:
            self._settle(self.low, wanted, [b.inside for b in blocks])
            return True
        if self._levels is not None:
            counts = [b.levels for b in blocks if b.levels is not None]
            if len(counts) < len(blocks):
                self._levels = None
                return False
            return self._conclude_levels(np.stack(counts), wanted)
        collected = np.concatenate([b.keys for b in blocks])
        if not all(b.complete for b in blocks):
            self._tighten(collected, inside - wanted, inside)
            return False
        threshold = _kth_largest(collected, wanted)
        larger = int(np.count_nonzero(collected > threshold))
        self._settle(threshold, wanted - larger, [int(np.count_nonzero(b.keys == threshold)) for b in blocks])
        return True

    def _conclude_levels(self, counts: np.ndarray, wanted: int) -> bool:
        """Finds the level that holds the wanted key; `counts` is `[blocks, levels]`."""
        assert self._levels is not None
        for position in reversed(range(self._levels.size)):
            total = int(counts[:, position].sum())
            if wanted <= total:
                self._settle(int(self._levels[position]), wanted, [int(c) for c in counts[:, position]])
                return True
            wanted -= total
        raise AssertionError("the counts of the levels add up to what lies inside the bracket")

    def _tighten(self, sample: np.ndarray, below: int, population: int) -> None:
        """Shrinks a bracket that is right but holds too many keys; at worst it halves."""
        self._bounds = before = (self.low, self.high)
        self._bracket(sample, below, population, 24)
        if (self.low, self.high) == before:
            # Nearly all keys lie where the sample does; if the wanted one does not, few are left to search.
            self.low, self.high = int(sample.min()), int(sample.max())
            self._levels = None
        if (self.low, self.high) == before:
            self.high = self.low + (self.high - self.low) // 2
            self._levels = None

    def _settle(self, threshold: int, ties_kept: int, ties: list[int]) -> None:
        self.threshold, self._ties, self._ties_kept = threshold, ties, ties_kept
        if ties_kept == sum(ties):
            self.cutoff = _ALL

    def tie_block(self) -> int | None:
        """Which block holds the last tie that is kept; None if all ties are, and nothing is left to find."""
        if self.cutoff is not None:
            return None
        return int(np.searchsorted(np.cumsum(self._ties), self._ties_kept))

    def place_tie(self, block: int, keys: np.ndarray, start: int) -> None:
        """Finds the cutoff inside the block that `tie_block` named, whose first element has index `start`."""
        before = sum(self._ties[:block])
        assert self.threshold is not None
        wanted, position = self._ties_kept - before, 0
        for position in range(0, keys.size, _PIECE):
            ties = keys[position : position + _PIECE] == np.uint32(self.threshold)
            if (count := int(np.count_nonzero(ties))) >= wanted:
                position += int(np.flatnonzero(ties)[wanted - 1])
                break
            wanted -= count
        self.cutoff = split_words(start + position + 1)

    def selection(self) -> Selection:
        """The result."""
        assert self.threshold is not None and self.cutoff is not None
        return Selection(np.uint32(self.threshold), self.cutoff)


def _kth_largest(keys: np.ndarray, count: int) -> int:
    """The `count`-th largest of keys in memory: three-way splits around two sampled pivots.

    Keys of merged 16-bit weights repeat by the thousand, which makes plain quickselect quadratic.
    """
    while keys.size > _SMALL:
        sample = np.sort(keys[:: keys.size // _SMALL])
        middle = int((1 - count / keys.size) * (sample.size - 1))
        for position in (min(middle + 200, sample.size - 1), max(middle - 200, 0)):
            pivot = sample[position]
            above = keys > pivot
            larger = int(np.count_nonzero(above))
            if larger >= count:
                keys = np.compress(above, keys)
                break
            equal = int(np.count_nonzero(keys == pivot))
            if larger + equal >= count:
                return int(pivot)
            keys = np.compress(keys < pivot, keys)
            count -= larger + equal
    return int(np.sort(keys)[keys.size - count])


def _none() -> np.ndarray:
    """No keys; unlike an empty slice of a block's keys it does not keep that block in memory."""
    return np.empty(0, np.uint32)
