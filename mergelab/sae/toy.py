"""Toy ground truth: activations made of known sparse features, on which an SAE's recovery can be measured.

    row = codes @ features + mean + noise,        codes[i] = (feature i is on) * |N(0, 1)|

Features are directions drawn uniformly from the unit sphere. Feature i, counted from 1, is on with
probability proportional to `i^-exponent`, at most 1, scaled so that `l0` features are on in an average row;
what is on has a half-normal magnitude. This is the setting of "Toy models of superposition"
(transformer-circuits.pub, 2022) with the frequencies of words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.sparse import csr_array

from mergelab.errors import SAEError

__all__ = ["BLOCK_ROWS", "ToyGroundTruth"]

BLOCK_ROWS = 1024
"""Rows that are drawn together: the unit in which the generator can be started anywhere."""

_FEATURES, _MEAN, _ROWS, _SAMPLE = range(4)  # separate streams of random numbers under one seed


@dataclass(frozen=True)
class ToyGroundTruth:
    """A source of activations with known features.

    A row depends on `seed` and its number alone, so that a reader may start anywhere and still see the rows
    an uninterrupted one sees. Two sources that differ only in `rows` agree on the rows both have.

    Attributes:
        d_in: width of an activation.
        n_features: number of true features.
        l0: features on in an average row.
        exponent: exponent of the power law of their frequencies; 0 makes all equally frequent.
        group_size: number of features, neighbors in frequency, that tend to be on together; 1 makes all
            independent.
        lift: factor by which two features of a group are likelier on together than if they were independent;
            less where a feature is on in more than one of `lift` rows. Frequencies stay as they are.
        mean_norm: norm of a vector that is added to every row.
        noise: standard deviation of Gaussian noise in each coordinate.
        rows: number of rows of the source.
        seed: seed of features and rows.
    """

    d_in: int = 128
    n_features: int = 1024
    l0: float | int = 8
    exponent: float | int = 0.7
    group_size: int = 1
    lift: float | int = 1.0
    mean_norm: float | int = 0.0
    noise: float | int = 0.0
    rows: int = 2_560_000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("d_in", "n_features", "group_size", "rows"):
            value = getattr(self, name)
            if value < 1:
                raise SAEError(f"{name} of the toy ground truth is {value}; it must be at least 1.")
        for name in ("exponent", "mean_norm", "noise", "seed"):
            value = getattr(self, name)
            if not value >= 0:
                raise SAEError(f"{name} of the toy ground truth is {value}; it must be at least 0.")
        if not 0 < self.l0 <= self.n_features:
            raise SAEError(
                f"l0 of the toy ground truth is {self.l0}; it must be above 0 and at most "
                f"n_features={self.n_features}."
            )
        if not self.lift >= 1:
            raise SAEError(f"lift of the toy ground truth is {self.lift}; it must be at least 1.")

    @property
    def d_out(self) -> int:
        """Width of the targets: the activations themselves."""
        return self.d_in

    @cached_property
    def features(self) -> np.ndarray:
        """`[n_features, d_in]`, float32, rows of norm 1, the most frequent first."""
        rows = self._stream(_FEATURES).standard_normal((self.n_features, self.d_in))
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    @cached_property
    def mean(self) -> np.ndarray:
        """`[d_in]`, float32, of norm `mean_norm`: what is added to every row."""
        direction = self._stream(_MEAN).standard_normal(self.d_in)
        return (direction * (self.mean_norm / np.linalg.norm(direction))).astype(np.float32)

    @cached_property
    def probabilities(self) -> np.ndarray:
        """`[n_features]`, float64, falling: how often each feature is on; they sum to `l0`."""
        weights = np.arange(1, self.n_features + 1, dtype=np.float64) ** -self.exponent
        found = np.zeros(self.n_features)
        # What would be on more than always is always on, and the rest share what is left of l0.
        for certain in range(self.n_features + 1):
            found[:certain] = 1.0
            if certain < self.n_features:
                found[certain:] = weights[certain:] * ((self.l0 - certain) / weights[certain:].sum())
            if found.max() <= 1:
                break
        return found

    def codes(self, start: int, stop: int) -> np.ndarray:
        """True magnitudes behind rows `start` to `stop`: `[stop - start, n_features]`, float32, >= 0."""
        return self._between(start, stop, self.n_features, lambda codes, _: codes.toarray())

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop`: `[stop - start, d_in]`, float32.

        Raises:
            SAEError: the source does not have these rows.
        """
        return self._between(start, stop, self.d_in, self._rows)

    def sample(self, count: int, seed: int = 0) -> np.ndarray:
        """Rows that are none of those that `read` gives: `[count, d_in]`, float32.

        Args:
            count: number of rows.
            seed: another one gives other rows of the same features.
        """
        blocks = -(-count // BLOCK_ROWS)
        streams = [self._stream(_SAMPLE, seed, block) for block in range(blocks)]
        rows = [self._rows(*self._draw(stream)) for stream in streams]
        return np.concatenate([np.empty((0, self.d_in), np.float32), *rows])[:count]

    def _between(
        self,
        start: int,
        stop: int,
        width: int,
        make: Callable[[csr_array, np.random.Generator], np.ndarray],
    ) -> np.ndarray:
        if not 0 <= start <= stop <= self.rows:
            raise SAEError(
                f"rows {start} to {stop} were asked of a toy ground truth that has rows 0 to {self.rows}; "
                "raise its `rows` or read fewer."
            )
        pieces = [np.empty((0, width), np.float32)]
        for block in range(start // BLOCK_ROWS, -(-stop // BLOCK_ROWS)):
            first = block * BLOCK_ROWS
            drawn = make(*self._draw(self._stream(_ROWS, block)))
            pieces.append(drawn[max(start - first, 0) : stop - first])
        return np.concatenate(pieces)

    def _stream(self, *path: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *path])

    def _draw(self, stream: np.random.Generator) -> tuple[csr_array, np.random.Generator]:
        """Codes of one block, `[BLOCK_ROWS, n_features]`, and the stream, which noise is drawn from."""
        chance = self.probabilities
        group = np.arange(self.n_features) // self.group_size
        gates = np.ones(group[-1] + 1)
        if self.lift > 1 and self.group_size > 1:
            # A gate for each group and row; given an open gate, features are independent. P(i and j) is then
            # gate * (p_i / gate) * (p_j / gate) = p_i p_j / gate, and P(i) is p_i.
            starts = np.arange(0, self.n_features, self.group_size)
            gates = np.maximum(1 / self.lift, np.maximum.reduceat(chance, starts))
            chance = chance / gates[group]
        row, feature = _independent_events(chance, stream)
        if (gates < 1).any():
            is_open = stream.random((BLOCK_ROWS, len(gates)), np.float32) < gates
            kept = is_open[row, group[feature]]
            row, feature = row[kept], feature[kept]
        magnitudes = np.abs(stream.standard_normal(len(row), np.float32))
        return csr_array((magnitudes, (row, feature)), shape=(BLOCK_ROWS, self.n_features)), stream

    def _rows(self, codes: csr_array, stream: np.random.Generator) -> np.ndarray:
        rows = codes @ self.features + self.mean
        if self.noise:
            rows += self.noise * stream.standard_normal(rows.shape, np.float32)
        return rows


def _independent_events(chance: np.ndarray, stream: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Rows and features that are on in one block, where feature i is on with probability `chance[i]`.

    A cell that receives at least one event of a Poisson process of rate -log(1 - p) is on with probability p,
    independently of all others: far fewer random numbers than cells.
    """
    certain = np.flatnonzero(chance >= 1)
    rate = -np.log1p(-np.where(chance < 1, chance, 0))
    total = np.cumsum(rate)
    count = stream.poisson(BLOCK_ROWS * total[-1])
    feature = np.searchsorted(total, total[-1] * stream.random(count), side="right")
    row = stream.integers(0, BLOCK_ROWS, count)
    # A draw at the very end of the range would fall behind the last feature of positive rate.
    cells = np.unique(row * len(chance) + np.minimum(feature, np.flatnonzero(rate).max(initial=0)))
    always = (np.arange(BLOCK_ROWS)[:, None] * len(chance) + certain).ravel()
    return np.divmod(np.concatenate([cells, always]), len(chance))
