"""What a comparison of models must offer to be drawn, and its numbers as the cells of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

__all__ = ["Comparison", "Score", "cells", "in_reading_order"]


class Score(Protocol):
    """One model: bits per byte by domain and what it keeps of each specialist's gain (None: undefined)."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def bits(self) -> Mapping[str, float]: ...
    @property
    def retained(self) -> Mapping[str, float | None]: ...
    @property
    def mean(self) -> float: ...


class Comparison(Protocol):
    """Models of the kinds `base`, `specialist` and `merge`, scored on the same domains."""

    @property
    def domains(self) -> Sequence[str]: ...
    @property
    def scores(self) -> Sequence[Score]: ...
    @property
    def verdict(self) -> Sequence[str]: ...
    @property
    def facts(self) -> Mapping[str, str]: ...
    @property
    def seconds(self) -> Mapping[str, float]: ...
    @property
    def features(self) -> Mapping[str, Any]: ...


def in_reading_order(comparison: Comparison) -> list[Score]:
    """The base, the specialists, then the merges from best to worst mean."""
    order = {"base": 0, "specialist": 1, "merge": 2}
    return sorted(comparison.scores, key=lambda s: (order[s.kind], s.mean if s.kind == "merge" else 0.0))


def cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows, in reading order; the best value of every score column is marked with `*`."""
    domains = list(comparison.domains)
    scores = in_reading_order(comparison)
    best = {d: min(s.bits[d] for s in scores) for d in domains}
    best_mean = min(s.mean for s in scores)
    header = ["model", *domains, "mean", *(f"keeps {d}" for d in domains)]
    rows = [
        [
            s.name,
            *(_marked(s.bits[d], best[d]) for d in domains),
            _marked(s.mean, best_mean),
            *(_percent(s.retained[d]) if s.kind == "merge" else "" for d in domains),
        ]
        for s in scores
    ]
    return header, rows


def _marked(value: float, best: float) -> str:
    return f"{value:.3f}" + ("*" if value == best else " ")


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{fraction:.0%}"
