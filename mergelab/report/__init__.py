"""Draws results (tables, figures, pages); computes none."""

from typing import TYPE_CHECKING

from mergelab.lazy import lazy_names

if TYPE_CHECKING:
    from mergelab.report.comparison import ComparedScore, ScoredModels, figure_files, score_figure
    from mergelab.report.curves import Panel, curves_figure
    from mergelab.report.explanation import render_explanation
    from mergelab.report.heatmap import heatmap_figure
    from mergelab.report.pages import render_features, render_page
    from mergelab.report.sections import Section, render_sections
    from mergelab.report.tables import html_table, markdown_table, text_table
    from mergelab.report.traces import render_traces

__all__ = [
    "ComparedScore",
    "Panel",
    "ScoredModels",
    "Section",
    "curves_figure",
    "figure_files",
    "heatmap_figure",
    "html_table",
    "markdown_table",
    "render_explanation",
    "render_features",
    "render_page",
    "render_sections",
    "render_traces",
    "score_figure",
    "text_table",
]

__getattr__, __dir__ = lazy_names(__name__)
