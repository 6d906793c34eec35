"""Curves over layers, densities or sizes, side by side in panels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Panel", "curves_figure"]

_COLORS = ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#6e7781", "#bf3989", "#9a6700", "#0a3069")
_INK, _FAINT = "#1f2328", "#d8dee4"


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: Heading.
        across: What the horizontal axis measures, with its unit.
        curves: Values by the name of a curve: places across, and heights; None where there is no value.
        log_across: Whether the horizontal axis is logarithmic.
        from_zero: Whether the vertical axis begins at zero.
    """

    title: str
    across: str
    curves: Mapping[str, tuple[Sequence[float], Sequence[float | None]]]
    log_across: bool = False
    from_zero: bool = True


def curves_figure(panels: Sequence[Panel]) -> Figure:
    """Panels in rows of two, each with its curves and, for several, their names."""
    from matplotlib.figure import Figure

    columns = min(2, len(panels))
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(5.2 * columns, 3.0 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    for ax, panel in zip(axes, panels, strict=False):
        for number, (name, (across, heights)) in enumerate(panel.curves.items()):
            known = [(x, y) for x, y in zip(across, heights, strict=True) if y is not None]
            ax.plot(
                [x for x, _ in known],
                [y for _, y in known],
                marker="o",
                markersize=3,
                linewidth=1.4,
                color=_COLORS[number % len(_COLORS)],
                label=name.replace("$", r"\$"),
            )
        ax.set_title(panel.title.replace("$", r"\$"), loc="left", fontsize=10, fontweight="bold", color=_INK)
        ax.set_xlabel(panel.across, fontsize=8, color=_INK)
        if panel.log_across:
            ax.set_xscale("log")
        if panel.from_zero:
            ax.set_ylim(bottom=0)
        if len(panel.curves) > 1:
            ax.legend(fontsize=7, frameon=False)
        ax.tick_params(colors=_INK, labelsize=8, length=0)
        ax.grid(color=_FAINT, linewidth=0.6)
        ax.set_axisbelow(True)
        for side in ax.spines.values():
            side.set_visible(False)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    return figure
