"""Exact order statistics of keys that arrive block by block, in memory far below the tensor's size.

A sample of the keys brackets the wanted one; one pass counts what lies above the bracket and collects what
lies inside; if the rank falls inside, the answer is a selection among the few collected, else the bracket is
moved and the pass repeated. The result is exact: sampling only decides how much work it takes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mergelab.operators.selection import Selection, split_words

__all__ = ["Found", "KeySearch"]

_HIGHEST = 0xFFFFFFFF
_ALL = np.full(2, _HIGHEST, np.uint32)


@dataclass
class Found:
    """What one block holds with respect to the bracket.

    Attributes:
        above: keys above it.
        inside: keys inside it.
        keys: those inside, in element order; an even subset of them where they were too many.
        complete: whether `keys` is all of them.
    """

    above: int
    inside: int
    keys: np.ndarray
    complete: bool = True


@dataclass
class KeySearch:
    """Finds the `count`-th largest of `size` keys and where its ties end.

    Attributes:
        count: how many of the largest keys to select, in `[1, size]`.
        size: how many keys there are in all.
        limit: how many keys a block may hand over; more are subsampled, which costs another pass.
    """

    count: int
    size: int
    limit: int = 2**20
    low: int = 0
    high: int = _HIGHEST
    threshold: int | None = None
    cutoff: np.ndarray | None = None
    _bounds: tuple[int, int] = (0, _HIGHEST)
    _ties: list[int] = field(default_factory=list)
    _ties_kept: int = 0

    def narrow(self, sample: np.ndarray) -> None:
        """Chooses the bracket from a sample of all keys."""
        if sample.size:
            self._bracket(sample, self.size - self.count, self.size)

    def _bracket(self, sample: np.ndarray, below: int, population: int) -> None:
        """Brackets the key with `below` keys under it, some standard errors of the sample to each side."""
        share = below / population
        error = np.sqrt(max(share * (1 - share), 1 / sample.size) / sample.size)
        # Neighbouring entries resemble each other, so a sample made of runs is worth less than its size.
        spread = 24 * error + 1 / sample.size
        first = max(0, int((share - spread) * (sample.size - 1)))
        last = min(sample.size - 1, int(np.ceil((share + spread) * (sample.size - 1))))
        ordered = np.partition(sample, (first, last))
        self.low = self._bounds[0] if first == 0 else int(ordered[first])
        self.high = self._bounds[1] if last == sample.size - 1 else int(ordered[last])

    def look(self, keys: np.ndarray) -> Found:
        """Examines one block of keys (1-D); safe to call from several threads."""
        above = int(np.count_nonzero(keys > np.uint32(self.high)))
        if self.low == self.high:
            return Found(above, int(np.count_nonzero(keys == np.uint32(self.low))), keys[:0])
        inside = keys[(keys - np.uint32(self.low)) <= np.uint32(self.high - self.low)]
        if inside.size <= self.limit:
            return Found(above, inside.size, inside)
        return Found(above, inside.size, inside[:: -(-inside.size // self.limit)].copy(), complete=False)

    def conclude(self, blocks: list[Found]) -> bool:
        """Takes all blocks of one pass, in order; False if another pass (with a new bracket) is needed."""
        above = sum(b.above for b in blocks)
        inside = sum(b.inside for b in blocks)
        if above >= self.count:
            self._bounds = (self.high + 1, self._bounds[1])
            self.low, self.high = self._bounds
            return False
        if above + inside < self.count:
            self._bounds = (self._bounds[0], self.low - 1)
            self.low, self.high = self._bounds
            return False
        wanted = self.count - above
        if self.low == self.high:
            self._settle(self.low, wanted, [b.inside for b in blocks])
            return True
        collected = np.concatenate([b.keys for b in blocks])
        if not all(b.complete for b in blocks):
            self._tighten(collected, inside - wanted, inside)
            return False
        position = collected.size - wanted
        threshold = int(np.partition(collected, position)[position])
        larger = int(np.count_nonzero(collected > threshold))
        self._settle(threshold, wanted - larger, [int(np.count_nonzero(b.keys == threshold)) for b in blocks])
        return True

    def _tighten(self, sample: np.ndarray, below: int, population: int) -> None:
        """Shrinks a bracket that is right but holds too many keys; at worst it halves."""
        self._bounds = before = (self.low, self.high)
        self._bracket(sample, below, population)
        if (self.low, self.high) == before:
            self.high = self.low + (self.high - self.low) // 2

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
        position = np.flatnonzero(keys == np.uint32(self.threshold))[self._ties_kept - before - 1]
        self.cutoff = split_words(start + int(position) + 1)

    def selection(self) -> Selection:
        """The result."""
        assert self.threshold is not None and self.cutoff is not None
        return Selection(np.uint32(self.threshold), self.cutoff)
