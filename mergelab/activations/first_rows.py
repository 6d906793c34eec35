"""The rows with which a training's order begins: what a start sample is made of, at no cost of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from mergelab.processes.exchange import gathered_facts, gathered_rows

__all__ = ["FirstRows", "gathered_first_rows", "one_after_other", "owned_places"]


@dataclass(frozen=True)
class FirstRows:
    """Rows of the first groups that are shuffled together, which a training reads in any case.

    Attributes:
        input: `[rows, d_in]`, float32, those short enough, each once.
        target: `[rows, d_out]`; the same array where the input is to be reconstructed.
        rows: `[rows]`, int64, their numbers in the source.
        examined: number of rows that were read, the long ones too.
        too_long: `[n]`, int64, numbers of those of them that are too long to count.
    """

    input: np.ndarray
    target: np.ndarray
    rows: np.ndarray
    examined: int
    too_long: np.ndarray

    def chosen(self, places: np.ndarray) -> FirstRows:
        """The rows at some places."""
        x = self.input[places]
        y = x if self.target is self.input else self.target[places]
        return FirstRows(x, y, self.rows[places], self.examined, self.too_long)

    def distinct(self) -> FirstRows:
        """Each row once, in the order of their numbers."""
        return self.chosen(np.unique(self.rows, return_index=True)[1])


def owned_places(lanes: Sequence[int]) -> list[int]:
    """Places of the lanes for which this process answers: each lane has the first process that reads it.

    Every process must make the call.

    Args:
        lanes: lanes that this process reads.
    """
    owners: dict[int, int] = {}
    for process, theirs in enumerate(gathered_facts(list(lanes))):
        for lane in theirs:
            owners.setdefault(lane, process)
    return [place for place, lane in enumerate(lanes) if owners[lane] == jax.process_index()]


def gathered_first_rows(mine: FirstRows) -> FirstRows:
    """The first rows of every process, in the order of processes; every process must make the call."""
    x = gathered_rows(mine.input)
    y = x if mine.target is mine.input else gathered_rows(mine.target)
    examined = sum(gathered_facts(mine.examined))
    return FirstRows(x, y, gathered_rows(mine.rows), examined, gathered_rows(mine.too_long))


def one_after_other(parts: Sequence[FirstRows]) -> FirstRows:
    """The first rows of several sources as one."""
    x = np.concatenate([one.input for one in parts])
    same = all(one.target is one.input for one in parts)
    return FirstRows(
        x,
        x if same else np.concatenate([one.target for one in parts]),
        np.concatenate([one.rows for one in parts]),
        sum(one.examined for one in parts),
        np.concatenate([one.too_long for one in parts]),
    )
