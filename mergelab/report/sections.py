"""A page of sections: sentences, figures and tables under headings, in one HTML file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergelab.report.comparison import svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Section", "render_sections"]


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        heading: Its heading; empty for none.
        sentences: Paragraphs of text.
        figure: Figure, with `described` for those who cannot see it.
        described: What the figure shows.
        header, rows: Table, its first column to the left; empty for none.
    """

    heading: str
    sentences: Sequence[str] = ()
    figure: Figure | None = None
    described: str = ""
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


def render_sections(title: str, sections: Sequence[Section]) -> str:
    """The page; it works from a file. What would be markup in texts is shown as it is written.

    Args:
        title: Heading of the page.
        sections: Parts, from the top.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mergelab.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    images = [None if section.figure is None else _data_uri(section.figure) for section in sections]
    return environment.get_template("sections.html").render(
        title=title, sections=list(zip(sections, images, strict=True))
    )


def _data_uri(figure: Figure) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg(figure).encode()).decode()
