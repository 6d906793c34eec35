"""Draws the measurements of benchmarks/merge.py as Markdown tables and puts them into the READMEs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["publish", "render", "render_summary", "replace_section"]

_MEMORY_AIM = 1.5e9


def render(results: Mapping[str, Any]) -> str:
    """The full table: one row per case, then the machine."""
    head = ["merge", "inputs", "floor s", "work s", "ratio", "aim", "wall s", "memory MB", "mergekit wall s",
             "times faster", "mergekit memory MB"]  # fmt: skip
    medians = {name: case["median"] for name, case in results["cases"].items()}
    rows = [
        _row(f"{name} (against {case['against']})" if case["against"] else name, case, medians)
        for name, case in results["cases"].items()
    ]
    machine = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    start_up = ", ".join(f"{program} {seconds:.2f} s" for program, seconds in results["start_up"].items())
    return "\n".join(
        [
            *_markdown(head, rows),
            "",
            f"Medians of {results['repeats']} turns of {results['passes']} passes each; models of "
            f"{results['parameters'] / 1e9:.3f}B bfloat16 parameters; memory is the peak of anonymous "
            f"memory. `--help`: {start_up}. Machine: {machine}.",
        ]
    )


def render_summary(results: Mapping[str, Any]) -> str:
    """The short table of the front page: what a user waits for and what it takes."""
    rows = []
    for name, case in results["cases"].items():
        m = case["median"]
        if "mergekit_seconds" not in m:
            continue
        theirs = (f"{m['mergekit_seconds']:.1f} s", f"{m['mergekit_anonymous_bytes'] / 1e6:.0f} MB")
        ours = (f"{m['mergelab_seconds']:.1f} s", f"{m['mergelab_anonymous_bytes'] / 1e6:.0f} MB")
        rows.append([f"{name} ({case['inputs']})", ours[0], theirs[0], ours[1], theirs[1]])
    return "\n".join(
        _markdown(["merge (inputs)", "mergelab", "mergekit 0.1.5", "memory", "its memory"], rows)
    )


def publish(results: Mapping[str, Any], repository: Path) -> None:
    """Replaces the tables in benchmarks/README.md and README.md."""
    for path, text in (
        (repository / "benchmarks" / "README.md", render(results)),
        (repository / "README.md", render_summary(results)),
    ):
        path.write_text(
            replace_section(path.read_text(encoding="utf-8"), "merge table", text), encoding="utf-8"
        )


def replace_section(document: str, name: str, text: str) -> str:
    """Returns `document` with what stands between `<!-- name -->` and `<!-- end of name -->` replaced."""
    opening, closing = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, _, rest = document.partition(opening)
    _, found, after = rest.partition(closing)
    if not found:
        raise ValueError(f"the document has no section between {opening} and {closing}")
    return f"{before}{opening}\n{text}\n{closing}{after}"


def _row(name: str, case: Mapping[str, Any], medians: Mapping[str, Mapping[str, float]]) -> list[str]:
    m, aim = case["median"], case["aim"]
    least = medians[case["against"]]["mergelab_work_seconds"] if case["against"] else m["floor_seconds"]
    ratio = m["mergelab_work_seconds"] / least
    row = [
        name,
        str(case["inputs"]),
        f"{m['floor_seconds']:.2f}",
        f"{m['mergelab_work_seconds']:.2f}",
        _against(f"{ratio:.2f}", ratio <= aim),
        f"{aim:g}",
        f"{m['mergelab_seconds']:.2f}",
        _against(f"{m['mergelab_anonymous_bytes'] / 1e6:.0f}", m["mergelab_anonymous_bytes"] <= _MEMORY_AIM),
    ]
    if "mergekit_seconds" not in m:
        return [*row, "-", "-", "-"]
    faster = m["mergekit_seconds"] / m["mergelab_seconds"]
    return [
        *row,
        f"{m['mergekit_seconds']:.1f}",
        f"{faster:.1f}",
        f"{m['mergekit_anonymous_bytes'] / 1e6:.0f}",
    ]


def _against(figure: str, met: bool) -> str:
    """A figure that misses its aim stands in bold."""
    return figure if met else f"**{figure}**"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]
