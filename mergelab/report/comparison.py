"""A comparison of models: what it must offer, its cells, and its dot plot."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "ComparedScore",
    "ScoredModels",
    "change_of",
    "figure_files",
    "in_reading_order",
    "kept_cells",
    "score_cells",
    "score_figure",
    "svg",
]


class ComparedScore(Protocol):
    """One model: bits per byte by domain, and what it keeps of each specialist's gain (None: undefined).

    `change` is how far its mean is from the base's (`value`, `interval`); None of the base, or if unknown.
    """

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def bits(self) -> Mapping[str, float]: ...
    @property
    def retained(self) -> Mapping[str, float | None]: ...
    @property
    def change(self) -> Mapping[str, Any] | None: ...
    @property
    def mean(self) -> float: ...


class ScoredModels(Protocol):
    """Models of the kinds `base`, `specialist` and `merge`, scored on the same domains."""

    @property
    def domains(self) -> Sequence[str]: ...
    @property
    def scores(self) -> Sequence[ComparedScore]: ...
    @property
    def verdict(self) -> Sequence[str]: ...
    @property
    def facts(self) -> Mapping[str, str]: ...
    @property
    def seconds(self) -> Mapping[str, float]: ...
    @property
    def features(self) -> Mapping[str, Any]: ...


def in_reading_order(comparison: ScoredModels) -> list[ComparedScore]:
    """The base, the specialists, then the merges from best to worst mean."""
    order = {"base": 0, "specialist": 1, "merge": 2}
    return sorted(comparison.scores, key=lambda s: (order[s.kind], s.mean if s.kind == "merge" else 0.0))


def score_cells(comparison: ScoredModels) -> tuple[list[str], list[list[str]]]:
    """Header and rows, in reading order; the best value of every score column is marked with `*`."""
    domains = list(comparison.domains)
    scores = in_reading_order(comparison)
    best = {d: min(s.bits[d] for s in scores) for d in domains}
    best_mean = min(s.mean for s in scores)
    rows = [
        [
            s.name,
            *(_marked(s.bits[d], best[d]) for d in domains),
            _marked(s.mean, best_mean),
            change_of(s),
        ]
        for s in scores
    ]
    return ["model", *domains, "mean", "mean - base [95 %]"], rows


def kept_cells(comparison: ScoredModels) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the merges, in reading order: the fraction kept of each specialist's gain."""
    merges = [s for s in in_reading_order(comparison) if s.kind == "merge"]
    rows = [[s.name, *(_percent(s.retained[d]) for d in comparison.domains)] for s in merges]
    return ["keeps of the gain of", *comparison.domains], rows


def change_of(score: ComparedScore) -> str:
    """A model's mean minus the base's with its interval, `-0.012 [-0.015, -0.009]`; empty if unknown."""
    if score.change is None:
        return ""
    interval = score.change["interval"]
    ends = "" if interval is None else f" [{interval[0]:+.3f}, {interval[1]:+.3f}]"
    return f"{score.change['value']:+.3f}{ends}"


def _marked(value: float, best: float) -> str:
    return f"{value:.3f}" + ("*" if value == best else " ")


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{fraction:.0%}"


@dataclass(frozen=True)
class _Palette:
    """Colors; those of the kinds are told apart by the color-blind and in grey."""

    ink: str
    faint: str
    base: str
    specialist: str
    merge: str

    def of(self, kind: str) -> str:
        return {"base": self.base, "specialist": self.specialist, "merge": self.merge}[kind]


_LIGHT = _Palette(ink="#1f2328", faint="#d8dee4", base="#6e7781", specialist="#0969da", merge="#bc4c00")
_DARK = _Palette(ink="#e6edf3", faint="#30363d", base="#8b949e", specialist="#58a6ff", merge="#f0883e")
_MARKERS = {"base": "s", "specialist": "D", "merge": "o"}


def score_figure(comparison: ScoredModels, *, dark: bool = False) -> Figure:
    """Bits per byte (lower is better) of every model on every domain and on the mean.

    A dashed line marks the base, so that what lies left of it is an improvement.
    """
    from matplotlib.figure import Figure

    palette = _DARK if dark else _LIGHT
    scores = in_reading_order(comparison)
    panels = {
        **{d: [s.bits[d] for s in scores] for d in comparison.domains},
        "mean": [s.mean for s in scores],
    }
    figure = Figure(figsize=(2.0 + 2.1 * len(panels), 1.0 + 0.28 * len(scores)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (title, values) in zip(axes, panels.items(), strict=True):
        _panel(ax, title, values, scores, palette)
    axes[0].set_yticks(range(len(scores)), [s.name for s in scores])
    axes[0].set_ylim(len(scores) - 0.4, -0.6)
    for label, score in zip(axes[0].get_yticklabels(), scores, strict=True):
        label.set_color(palette.of(score.kind))
    figure.supxlabel("bits per byte of held-out text (left is better)", color=palette.ink, fontsize=9)
    return figure


def svg(figure: Figure) -> str:
    """The figure as SVG text without a date, the same for equal figures."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "mergelab"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return text.getvalue()


def figure_files(comparison: ScoredModels) -> dict[str, bytes]:
    """Contents of `figure.png` (200 dpi, white) and `figure.svg` (transparent), by name."""
    image = io.BytesIO()
    score_figure(comparison).savefig(image, format="png", dpi=200, facecolor="white")
    # A figure of its own: drawing moves the layout of one already drawn by a hair.
    return {"figure.png": image.getvalue(), "figure.svg": svg(score_figure(comparison)).encode()}


def _panel(ax: Axes, title: str, values: list[float], scores: list[ComparedScore], palette: _Palette) -> None:
    ax.set_title(title, loc="left", color=palette.ink, fontsize=10, fontweight="bold")
    ax.set_facecolor("none")
    ax.axvline(values[0], color=palette.base, linestyle=(0, (4, 3)), linewidth=1, zorder=1)
    ax.hlines(range(len(values)), values[0], values, colors=palette.faint, linewidth=2, zorder=1)
    best = min(values)
    for row, (value, score) in enumerate(zip(values, scores, strict=True)):
        color = palette.of(score.kind)
        ax.plot(value, row, _MARKERS[score.kind], color=color, markersize=7 if value == best else 5, zorder=2)
        if value == best:
            ax.annotate(
                f"{value:.3f}",
                (value, row),
                (0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=color,
            )
    ax.margins(x=0.12)
    ax.locator_params(axis="x", nbins=4)
    ax.tick_params(colors=palette.ink, labelsize=8, length=0)
    ax.grid(axis="x", color=palette.faint, linewidth=0.6)
    ax.set_axisbelow(True)
    for side in ax.spines.values():
        side.set_visible(False)
