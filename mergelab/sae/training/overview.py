"""What the rows of a training look like before its first step: what decides whether latents die."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergelab.activations.kept import DEFAULT_RULE, row_norms
from mergelab.activations.lane_rows import LaneStream
from mergelab.activations.left_out import LeftOut
from mergelab.activations.stream import ActivationStream, Batch

__all__ = ["Overview", "draw_sample"]

_QUANTILES = {"min": 0.0, "1 %": 0.01, "median": 0.5, "99 %": 0.99, "max": 1.0}

_FAR = 3.0
"""A mean so many times as long as the spread is worth a warning: many latents may never fire."""


_LONG = DEFAULT_RULE.max_norm_multiple or 10.0


@dataclass(frozen=True)
class Overview:
    """Rows of a sample, less those that do not count.

    Attributes:
        rows: number of rows of the source.
        kept_rows: number of rows of an epoch: those that count by their place.
        epochs: times that the training goes through them.
        sampled: what of the sample was left out for its norm, and where.
        limit: largest norm of a row that counts.
        context: tokens in a context, where that is known.
        offset: norm of the mean.
        spread: root of the mean squared distance from the mean.
        norms: quantiles of the norms of the rows that count, by name.
    """

    rows: int
    kept_rows: int
    epochs: float
    sampled: LeftOut
    limit: float
    context: int | None
    offset: float
    spread: float
    norms: Mapping[str, float]

    def facts(self) -> dict[str, Any]:
        """The figures as plain JSON data."""
        return {
            "rows": self.rows,
            "kept_rows": self.kept_rows,
            "epochs": self.epochs,
            "sampled": self.sampled.facts(),
            "norm_limit": self.limit if math.isfinite(self.limit) else None,
            "offset": self.offset,
            "spread": self.spread,
            "norms": dict(self.norms),
        }

    def lines(self) -> list[str]:
        """The figures in words, one line for each thing."""
        left = self.rows - self.kept_rows
        by_place = f", {left:,} of them left out by place" if left else ""
        found = [f"data: {self.rows:,} rows{by_place}; {self.epochs:.3g} epochs of {self.kept_rows:,}"]
        if self.sampled.by_norm:
            of = "row" if self.context is None else "position"
            found.append(
                f"attention sinks: of {self.sampled.rows:,} rows {self.sampled.by_norm:,} are longer than "
                f"{self.limit:,.4g} and left out, at {of} {self.sampled.where()}"
            )
        elif self.norms["max"] > _LONG * self.norms["median"] > 0:
            found.append(
                f"attention sinks: the longest row is {self.norms['max'] / self.norms['median']:.3g} medians "
                "long, and none is left out; data.max_norm_multiple would"
            )
        norms = ", ".join(f"{name} {value:.4g}" for name, value in self.norms.items())
        ratio = self.offset / self.spread if self.spread else math.inf
        far = "; many latents may die: train.center and train.normalize help" if ratio > _FAR else ""
        found.append(f"norms: {norms}; the mean is {ratio:.3g} times as long as the spread about it{far}")
        return found


def draw_sample(stream: ActivationStream | LaneStream, count: int, *, tokens: int) -> tuple[Batch, Overview]:
    """The first rows of a training, less those that are too long, and what they look like.

    Rows that the training shuffles first: they are read once for both. The same in every process; every
    process must make the call.

    Args:
        stream: the training's, at its first row; its place stays what it is.
        count: rows to draw, at most.
        tokens: rows of the whole training.

    Raises:
        SAEError: all of the rows are too long.
    """
    drawn = stream.draw(count)
    context = stream.kept.context
    places = drawn.too_long if context is None else drawn.too_long % context
    left_out = LeftOut(drawn.examined, by_norm=len(places))
    left_out.places.update(places.tolist())
    sample = Batch(drawn.input, drawn.target, drawn.rows)
    return sample, _overview(stream, sample.input, left_out, tokens)


def _overview(
    stream: ActivationStream | LaneStream, x: np.ndarray, left_out: LeftOut, tokens: int
) -> Overview:
    mean = x.mean(axis=0, dtype=np.float64)
    norms = row_norms(x)
    square = float((norms * norms).mean()) - float(mean @ mean)
    return Overview(
        rows=stream.source.rows,
        kept_rows=stream.rows,
        epochs=tokens / stream.rows,
        sampled=left_out,
        limit=stream.kept.limit,
        context=stream.kept.context,
        offset=float(np.linalg.norm(mean)),
        spread=math.sqrt(max(square, 0.0)),
        norms={
            name: float(value)
            for name, value in zip(_QUANTILES, np.quantile(norms, list(_QUANTILES.values())), strict=True)
        },
    )
