"""Notebooks as pages of the site: their text, their code, and what it printed and drew in a run."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

BADGE = re.compile(r"\[!\[([^\]]*)\]\([^)]*\)\]\(([^)]*)\)")
"""A picture of another server that is a link: its text and where it leads."""

NOT_RUN = "The page shows text and code; outputs appear where the notebook is run."
RUN = (
    "Outputs are those of a run on a CPU without a network, on {models}: they show what a cell prints, "
    "not what a large model does."
)
SMALL = "the small models that the notebook trains itself"


def page_of(notebook: Mapping[str, Any], name: str, pictures: Path) -> str:
    """A notebook as Markdown.

    Args:
        notebook: the content of an .ipynb file (version 4), with outputs or without.
        name: its name without `.ipynb`: pictures are called by it and a number.
        pictures: the folder that drawn pictures are written to, beside the page.
    """
    parts: list[str] = []
    cells = notebook["cells"]
    for number, cell in enumerate(cells):
        source = _text(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(BADGE.sub(r"[\1](\2)", source))
            if number == 0:
                parts.append(f"*{_origin(cells)}*")
        elif cell["cell_type"] == "code":
            parts.append(_fenced(source, "python"))
            parts += _outputs(cell.get("outputs", ()), f"{name}-{number}", pictures)
    return "\n\n".join(parts) + "\n"


def _origin(cells: Any) -> str:
    """What the page says about its outputs: `example_models` prints which models it took."""
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    if not outputs:
        return NOT_RUN
    printed = "\n".join(_text(output.get("text", "")) for output in outputs)
    taken = re.findall(r"^(models(?: of the quickstart)?): ([^\n(]*)", printed, flags=re.M)
    said = "; ".join(dict.fromkeys(f"{kind}: {which.strip()}" for kind, which in taken))
    return RUN.format(models=f"{SMALL} ({said})" if said else SMALL)


def _outputs(outputs: Any, name: str, pictures: Path) -> Iterator[str]:
    """What a cell printed, returned and drew; of several forms the one that a page can show."""
    for number, output in enumerate(outputs):
        data = output.get("data", {})
        if output["output_type"] == "stream" and output.get("name") != "stderr":  # bars and warnings
            yield _fenced(_text(output["text"]), "text")
        elif "image/png" in data:
            file = pictures / f"{name}-{number}.png"
            pictures.mkdir(parents=True, exist_ok=True)
            try:
                file.write_bytes(base64.b64decode(_text(data["image/png"])))
            except binascii.Error as error:
                raise ValueError(f"{name}: the picture of output {number} is not base64: {error}") from None
            yield f"![What the cell draws]({pictures.name}/{file.name})"
        elif "text/plain" in data:
            yield _fenced(_text(data["text/plain"]), "text")


def _text(lines: str | list[str]) -> str:
    """Text of a notebook, which is stored as one string or as lines."""
    return lines if isinstance(lines, str) else "".join(lines)


def _fenced(text: str, language: str) -> str:
    """A block of code, fenced by more ticks than stand in it."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def read_notebook(path: Path, executed: Path | None) -> Any:
    """A notebook of the repository, or its executed copy where the folder `executed` holds one.

    Raises:
        ValueError: the executed copy is that of another notebook, or of an earlier state of it.
    """
    stored = json.loads(path.read_text(encoding="utf-8"))
    copy = executed / path.name if executed else None
    if copy is None or not copy.is_file():
        return stored
    found = json.loads(copy.read_text(encoding="utf-8"))
    if [_text(cell["source"]) for cell in found["cells"]] != [
        _text(cell["source"]) for cell in stored["cells"]
    ]:
        raise ValueError(f"{copy} was made from another {path.name}: run the notebook again")
    return found
