"""A heat map of numbers: rows of texts, columns of names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["heatmap_figure"]

_LONGEST = 48  # characters of a row's label


def heatmap_figure(
    values: np.ndarray, rows: Sequence[str], columns: Sequence[str], *, title: str = "", scale: str = ""
) -> Figure:
    """Numbers as colors, from white at zero to blue; negative ones to orange.

    Args:
        values: `[rows, columns]`.
        rows: label of each row; of a long one the end is shown, where texts differ.
        columns: label of each column.
        title: heading.
        scale: what the colors measure, with its unit.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    size = (
        2.5 + 0.42 * len(columns) + 0.07 * min(_LONGEST, max(map(len, rows), default=0)),
        1.2 + 0.26 * len(rows),
    )
    figure = Figure(figsize=size, layout="constrained")
    ax = figure.subplots()
    most = float(np.abs(values).max(initial=0)) or 1.0
    signed = bool((np.asarray(values) < 0).any())
    colors = (["#bc4c00"] if signed else []) + ["#ffffff", "#0969da"]
    image = ax.imshow(
        values,
        aspect="auto",
        cmap=LinearSegmentedColormap.from_list("latents", colors),
        vmin=-most if signed else 0,
        vmax=most,
    )
    ax.set_xticks(range(len(columns)), columns, rotation=90, fontsize=8)
    ax.set_yticks(range(len(rows)), [_end(row) for row in rows], fontsize=8)
    ax.set_title(title, loc="left", fontsize=10, fontweight="bold")
    figure.colorbar(image, ax=ax, label=scale, fraction=0.05)
    return figure


def _end(text: str) -> str:
    shown = text.replace("\n", "\\n").replace("$", r"\$")
    return shown if len(shown) <= _LONGEST else "…" + shown[1 - _LONGEST :]
