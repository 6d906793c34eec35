"""The map in docs/architecture.md is true: who may import whom, what no room imports, who prints."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "mergelab"
FILES = sorted(PACKAGE.rglob("*.py"))
FORBIDDEN = {"torch", "transformers", "peft", "mergekit", "tensorflow"}
TOP = {"__init__", "__main__"}  # the package's own front doors may name any room


def floors() -> dict[str, int]:
    """Room -> floor, read from the table of docs/architecture.md."""
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| (`.*?`) \|", text, flags=re.MULTILINE)
    return {
        re.sub(r"(/|\.py)$", "", room): int(floor)
        for floor, rooms in rows
        for room in re.findall(r"`([^`]+)`", rooms)
    }


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(source: str) -> Iterator[str]:
    """Absolute dotted names that Python source imports anywhere, lazily and for types too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which room is meant"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(room: str, source: str, floor: dict[str, int]) -> list[str]:
    """Rooms of mergelab that `source` in `room` imports though they are not below it."""
    others = {name.split(".")[1] for name in imported(source) if name.startswith("mergelab.")} - {room}
    return sorted(other for other in others & floor.keys() if floor[other] >= floor[room])


def test_the_map_names_every_room_and_no_other() -> None:
    rooms = {room_of(path) for path in FILES} - TOP
    assert rooms == floors().keys()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_imports_only_from_floors_below_it(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    names = set(imported(source))
    assert not {name.split(".")[0] for name in names} & FORBIDDEN
    if room_of(path) not in TOP:
        assert violations(room_of(path), source, floors()) == []


def test_a_wrong_import_would_be_seen() -> None:
    floor = {"cli": 6, "merging": 4, "operators": 2, "checkpoints": 2, "errors": 1}
    assert violations("merging", "def f():\n    from mergelab.cli import main", floor) == ["cli"]
    assert violations("operators", "import mergelab.checkpoints.source", floor) == ["checkpoints"]
    assert violations("operators", "from mergelab import merging, errors", floor) == ["merging"]
    assert violations("merging", "from mergelab.operators import OPERATORS", floor) == []


def file_imports(sources: dict[str, str]) -> dict[str, set[str]]:
    """Module -> modules of ours that its source imports; the front door counts as importing nothing."""

    def module_of(name: str) -> str | None:
        parent = name.rpartition(".")[0]
        return name if name in sources else parent if parent in sources else None

    found: dict[str, set[str]] = {}
    for module, source in sources.items():
        modules = {module_of(name) for name in imported(source)} - {None, module}
        found[module] = {m for m in modules if m} if "." in module else set()
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import one another, directly or through others."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        todo = [*graph[start]]
        while todo:
            module = todo.pop()
            if module not in seen:
                seen.add(module)
                todo += graph.get(module, ())
        reach[start] = seen
    tied = {module for module, seen in reach.items() if module in seen}
    groups = {tuple(sorted(m for m in reach[module] if module in reach[m])) for module in tied}
    return sorted(map(list, groups))


def all_sources() -> dict[str, str]:
    return {
        ".".join(("mergelab", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): (
            path.read_text(encoding="utf-8")
        )
        for path in FILES
    }


def test_no_files_import_one_another_in_a_circle() -> None:
    assert circles(file_imports(all_sources())) == []


def inner_floors() -> dict[str, dict[str, int]]:
    """Room -> what stands in it -> its floor, read from the list under the table of docs/architecture.md."""
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^- `(\w+)/`: (`.*`)$", text, flags=re.MULTILINE)
    return {
        room: {
            name: floor
            for floor, names in enumerate(order.split(" < "))
            for name in re.findall(r"`(\w+)`", names)
        }
        for room, order in rows
    }


def climbs(room: str, floor: dict[str, int], sources: dict[str, str]) -> list[str]:
    """Imports between what stands in one room that do not go down."""
    found: list[str] = []
    for module, imports in file_imports(sources).items():
        here = module.split(".")
        if here[:2] != ["mergelab", room] or len(here) < 3:
            continue
        for other in imports:
            there = other.split(".")
            siblings = there[:2] == here[:2] and len(there) > 2 and there[2] != here[2]
            if siblings and floor[there[2]] >= floor[here[2]]:
                found.append(f"{module} -> {other}")
    return sorted(found)


@pytest.mark.parametrize("room", ["merging", "sae"])
def test_folders_of_a_room_import_only_from_floors_below_them(room: str) -> None:
    inside = {
        path.relative_to(PACKAGE / room).parts[0].removesuffix(".py")
        for path in (PACKAGE / room).rglob("*.py")
    }
    floor = inner_floors()[room]
    assert inside - {"__init__"} <= floor.keys()
    assert climbs(room, floor, all_sources()) == []


def test_a_climb_would_be_seen() -> None:
    sources = {
        "mergelab.merging.plan.planner": "from mergelab.merging.soups.greedy import f",
        "mergelab.merging.soups.greedy": "from mergelab.merging.plan.planner import g",
    }
    assert climbs("merging", {"plan": 0, "soups": 1}, sources) == [
        "mergelab.merging.plan.planner -> mergelab.merging.soups.greedy"
    ]


def test_a_circle_would_be_seen() -> None:
    sources = {
        "mergelab": "import mergelab.a",
        "mergelab.a": "def f():\n    from mergelab.b import g",
        "mergelab.b": "if TYPE_CHECKING:\n    from mergelab import a",
        "mergelab.c": "from mergelab.a import f",
    }
    assert circles(file_imports(sources)) == [["mergelab.a", "mergelab.b"]]
    assert circles(file_imports({**sources, "mergelab.b": "import json"})) == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_command_line_prints_and_no_file_is_long(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") <= 500, "a file this long holds two concepts"
    assert ast.get_docstring(ast.parse(source)) or not source.strip(), "say in one sentence what it is for"
    calls = {
        node.func.id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert room_of(path) == "cli" or "print" not in calls


# Where text becomes data, and what reads only its own pipes, journals and torn lines.
PARSERS = {
    "checkpoints/json_data.py",
    "checkpoints/yaml_data.py",
    "checkpoints/journal.py",
    "checkpoints/output_target.py",
    "text/chat_sandbox.py",
    "text/chat_worker.py",
    "reasoning/pattern_search.py",
    "reasoning/pattern_worker.py",
    "processes/exchange.py",
    "processes/messages.py",
    "sae/training/tracking.py",
    "aot/compiler.py",
    "aot/worker.py",
}


def loads(source: str) -> set[str]:
    """Calls of a parser that sets no bounds: `json.loads`, `yaml.safe_load`, ...."""
    return {
        f"{node.func.value.id}.{node.func.attr}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id in ("json", "yaml")
        and re.match(r"(safe_|full_|unsafe_)?(load|parse|compose)", node.func.attr)
    }


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_json_and_yaml_are_read_in_one_place(path: Path) -> None:
    found = loads(path.read_text(encoding="utf-8"))
    assert not found or path.relative_to(PACKAGE).as_posix() in PARSERS, (
        f"{found}: use mergelab.checkpoints.json_data or yaml_data, which bound what they read"
    )


def test_an_unbounded_parser_would_be_seen() -> None:
    assert loads("import json\ndef f(x):\n    return json.loads(x)") == {"json.loads"}
    assert loads("yaml.safe_load(text)") == {"yaml.safe_load"}
    assert loads("json.dumps(x); yaml.safe_dump(x); parse_json(x)") == set()


def test_third_party_imports_are_declared() -> None:
    import tomllib

    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [project["optional-dependencies"][name] for name in ("remote", "tensorboard", "wandb")]
    requirements = [*project["dependencies"], *(line for extra in extras for line in extra)]
    declared = {re.split(r"[<>=\[;]", r)[0].replace("-", "_").lower() for r in requirements}
    distribution = {"yaml": "pyyaml", "orbax": "orbax_checkpoint"}
    used = {name.split(".")[0] for path in FILES for name in imported(path.read_text(encoding="utf-8"))}
    used -= {"mergelab", *sys.stdlib_module_names}
    assert {distribution.get(name, name) for name in used} <= declared


def names_given_twice(sources: dict[str, str]) -> dict[str, list[str]]:
    """Names that several modules give to a class, with the modules."""
    found: dict[str, list[str]] = {}
    for module, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(module)
    return {name: modules for name, modules in found.items() if len(modules) > 1}


def test_no_two_classes_have_one_name() -> None:
    assert names_given_twice(all_sources()) == {}


def test_a_name_given_twice_would_be_seen() -> None:
    sources = {
        "mergelab.a": "class Trace: ...",
        "mergelab.b": "if True:\n    class Trace: ...\nclass Row: ...",
    }
    assert names_given_twice(sources) == {"Trace": ["mergelab.a", "mergelab.b"]}
