"""The page of traces: what was asked, every text that was written to it, and which of them were right."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["render_traces"]

_TASKS, _TRACES, _CHARACTERS = 100, 16, 4000
"""Tasks, traces of each, and characters of a text that the page shows; the log has all."""


def render_traces(
    title: str,
    *,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    verifiers: Sequence[Sequence[str]],
    figure: str,
    described: str,
    tasks: Sequence[Mapping[str, Any]],
) -> str:
    """The page, in one file; light and dark. What would be markup in texts is shown as it is written.

    Args:
        title: the page's heading.
        header: titles of the table of figures.
        rows: its cells.
        verifiers: rows of the table of verifiers: name, best of n, weighted vote, AUROC; empty for none.
        figure: SVG of accuracy against compute.
        described: what the figure shows.
        tasks: `number`, `prompt`, `answer`, `reference`, `correct` and `traces` of each task.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mergelab.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = [
        {**task, "traces": task["traces"][:_TRACES], "of": len(task["traces"])} for task in tasks[:_TASKS]
    ]
    return environment.get_template("traces.html").render(
        title=title,
        header=header,
        rows=rows,
        verifiers=verifiers,
        figure="data:image/svg+xml;base64," + base64.b64encode(figure.encode()).decode(),
        described=described,
        tasks=shown,
        total=len(tasks),
        most=_CHARACTERS,
    )
