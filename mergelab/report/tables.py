"""Tables of words and numbers as aligned plain text, as Markdown and as HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence

__all__ = ["html_table", "markdown_table", "text_table"]


def text_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, rules_before: Sequence[int] = ()
) -> str:
    """Aligned columns, the first to the left and the others to the right, with a rule under the header.

    Args:
        header: column titles.
        rows: cells, as many to a row as there are titles.
        rules_before: indices of rows that a further rule precedes.

    Example:
        >>> print(text_table(["model", "bits"], [["base", "2.10"], ["merge", "1.9"]]))
        model  bits
        -----  ----
        base   2.10
        merge   1.9
    """
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    rule = "  ".join("-" * width for width in widths)
    lines = [_aligned(header, widths), rule]
    for number, row in enumerate(rows):
        if number in rules_before:
            lines.append(rule)
        lines.append(_aligned(row, widths))
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A GitHub table, the first column to the left and the others to the right.

    Example:
        >>> print(markdown_table(["model", "a|b"], [["base", "2.10"]]))
        | model | a\\|b |
        | :-- | --: |
        | base | 2.10 |
    """
    rules = [":--", *["--:"] * (len(header) - 1)]
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (escaped[0], rules, *escaped[1:]))


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for notebooks and pages, the first column to the left and the others to the right.

    Cells are text: what would be markup in them is shown as it is written.

    Example:
        >>> html_table(["model"], [["a<b"]]).count("a&lt;b")
        1
    """

    def line(cells: Sequence[str], kind: str) -> str:
        sides = ("left", *["right"] * (len(cells) - 1))
        made = (
            f'<{kind} style="text-align:{side}">{html.escape(cell)}</{kind}>'
            for cell, side in zip(cells, sides, strict=True)
        )
        return f"<tr>{''.join(made)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<table><thead>{line(header, 'th')}</thead><tbody>{body}</tbody></table>"


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = (
        cell.ljust(width) if i == 0 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join([first, *rest]).rstrip()
