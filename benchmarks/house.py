"""How the code is laid out, in numbers: files, circles, and what two walks through it touch.

    python benchmarks/house.py                        # of the checkout it stands in
    python benchmarks/house.py --quickstart DIR       # walks too, over the models that `mergelab quickstart` left

A walk runs a command in this process under a profiler and counts the files of mergelab whose functions were
called, and the rooms those files are in: for a tensor from a recipe to the merged file, and for a token from a
text to the features page. Nothing here is timed.
"""

from __future__ import annotations

import argparse
import ast
import statistics
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mergelab"


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path, modules: set[str]) -> set[str]:
    """Modules of mergelab that a file imports, within functions and for types too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in modules else node.module)
    return (found & modules) - {module_of(path), "mergelab"}


def circles(graph: dict[str, set[str]]) -> int:
    """The number of groups of modules that import one another, directly or through others."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        todo = [*graph[start]]
        while todo:
            module = todo.pop()
            if module not in seen:
                seen.add(module)
                todo += graph[module]
        reach[start] = seen
    tied = {module for module, seen in reach.items() if module in seen}
    return len({frozenset(m for m in reach[module] if module in reach[m]) for module in tied})


def layout() -> dict[str, float]:
    """Files (without the faces of rooms), their lines, circles, and files that only one other file imports."""
    paths = sorted(PACKAGE.rglob("*.py"))
    modules = {module_of(path) for path in paths}
    graph = {module_of(path): imported(path, modules) for path in paths}
    graph["mergelab"] = set()  # the front door names every room
    files = [path for path in paths if path.name not in ("__init__.py", "__main__.py")]
    lines = [len(path.read_text(encoding="utf-8").splitlines()) for path in files]
    importers = [sum(module_of(path) in graph[other] for other in graph) for path in files]
    return {
        "files": len(files),
        "lines": sum(lines),
        "median lines": statistics.median(lines),
        "largest": max(lines),
        "circles of files": circles(graph),
        "files with one importer": importers.count(1),
    }


def walked(arguments: list[str]) -> dict[str, int]:
    """Runs a command in this process; the files and rooms of mergelab that it called into."""
    from mergelab.cli.main import cli

    seen: set[str] = set()
    prefix = str(PACKAGE) + "/"

    def note(frame: FrameType, event: str, _: Any) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(prefix) and frame.f_code.co_name != "<module>":
            seen.add(name.removeprefix(prefix))

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        cli(arguments, standalone_mode=False)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    inner = {name for name in seen if not name.startswith("cli/")}
    return {"files": len(seen), "rooms": len({name.split("/")[0] for name in inner})}


def walks(quickstart: Path) -> Iterator[tuple[str, dict[str, int]]]:
    """What a tensor and a token pass on their way."""
    models = quickstart / "models"
    with tempfile.TemporaryDirectory() as scratch:
        recipe = Path(scratch) / "ties.yaml"
        listed = "".join(
            f"  - {{model: {models / name}, parameters: {{weight: 1.0, density: 0.5}}}}\n"
            for name in ("code", "prose")
        )
        recipe.write_text(f"merge_method: ties\nbase_model: {models / 'base'}\nmodels:\n{listed}")
        yield "tensor", walked(["merge", str(recipe), "--out", f"{scratch}/merged"])
        text, page = quickstart / "held-out.txt", f"{scratch}/features.html"
        sae = ["sae", "features", str(quickstart / "sae"), "--model", str(models / "base")]
        yield "token", walked([*sae, "--text", str(text), "--out", page, "--latents", "8"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quickstart", type=Path, help="folder that `mergelab quickstart` wrote")
    options = parser.parse_args()
    for name, value in layout().items():
        print(f"{name}: {value:g}")
    if options.quickstart is not None:
        for name, found in walks(options.quickstart.resolve()):
            print(f"a {name} passes {found['files']} files in {found['rooms']} rooms")


if __name__ == "__main__":
    main()
