"""What mergelab reads and runs of the world outside, measured against the originals: benchmarks/world.md.

    python -m benchmarks.world                       # every section
    python -m benchmarks.world formats smollm        # these alone; the others keep their last figures
    python -m benchmarks.world runtimes merges --environments DIR --turns 3

A section is one function in `benchmarks/world_parts/` that takes a `Place` and returns a `Section`; what it
measured is kept in `benchmarks/results/world.json`, from which the whole page is written anew each time.
`--environments` keeps the virtual environments that `runtimes` and `merges` make (minutes and gigabytes) for
the next run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.machine import describe
from benchmarks.world_parts.section import Place, Section

SECTIONS = {
    "configs": "Configs accepted",
    "formats": "Formats read",
    "runtimes": "Runtimes passed",
    "smollm": "SmolLM2-135M-Instruct beside transformers",
    "merges": "SmolLM2-135M-Instruct merged beside mergekit",
}
"""Title by section, in the order of the page; `benchmarks/world_parts/NAME.py` has its `measure(place)`."""

RESULTS = Path(__file__).parent / "results" / "world.json"
PAGE = Path(__file__).parent / "world.md"


def measure(names: Sequence[str], place: Place) -> dict[str, Section]:
    """Runs the sections of these names, each in a folder of its own."""
    found: dict[str, Section] = {}
    for name in names:
        function: Callable[[Place], Section] = importlib.import_module(
            f"benchmarks.world_parts.{name}"
        ).measure
        folder = place.work / name
        folder.mkdir()
        found[name] = function(replace(place, work=folder))
    return found


def render(sections: Mapping[str, Section], machine: Mapping[str, str]) -> str:
    """The page: one table per section that was measured."""
    lines = [
        "# The world outside",
        "",
        "Written by `python -m benchmarks.world`; edit the program, not this page.",
    ]
    for name, title in SECTIONS.items():
        section = sections.get(name)
        if section is None or not section.rows:
            continue
        rule = ["---"] * len(section.head)
        table = [f"| {' | '.join(cells)} |" for cells in (section.head, rule, *section.rows)]
        lines += ["", f"## {title}", "", section.note, "", *table]
    return "\n".join([*lines, "", f"Machine: {', '.join(f'{k} {v}' for k, v in machine.items())}.", ""])


def main() -> None:
    """Measures and writes the page."""
    parser = argparse.ArgumentParser(description="Writes benchmarks/world.md.")
    parser.add_argument(
        "sections", nargs="*", choices=[*SECTIONS, []], help="sections to measure; all if none"
    )
    parser.add_argument(
        "--environments",
        type=Path,
        help="folder that keeps the virtual environments; a temporary one if none",
    )
    parser.add_argument("--turns", type=int, default=3, help="turns of each pair of programs that are timed")
    options = parser.parse_args()
    chosen = options.sections or [*SECTIONS]
    kept = json.loads(RESULTS.read_text())["sections"] if RESULTS.is_file() else {}
    with tempfile.TemporaryDirectory() as work:
        machine = describe(Path(work))
        environments = (options.environments or Path(work) / "environments").resolve()
        measured = measure(chosen, Place(Path(work), environments, options.turns))
    sections = {**{name: Section(**fields) for name, fields in kept.items()}, **measured}
    plain = {name: asdict(section) for name, section in sections.items()}
    RESULTS.write_text(json.dumps({"machine": machine, "sections": plain}, indent=1) + "\n")
    PAGE.write_text(render(sections, machine), encoding="utf-8")


if __name__ == "__main__":
    main()
