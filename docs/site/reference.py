"""The API reference: every name of every face, read from the sources, with shapes, units and errors."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import griffe

FRONT = "mergelab"
HIDDEN = ("mergelab.cli",)
"""Faces that are not for import."""

_TITLES = {"parameters": "Arguments", "attributes": "Attributes", "raises": "Raises", "returns": "Returns"}
_TITLES |= {"yields": "Yields", "examples": "Examples"}


class Reference:
    """Faces and what they offer; each name is described at one face, its home, and listed at the others."""

    def __init__(self, repository: Path) -> None:
        logging.getLogger("griffe").setLevel(logging.CRITICAL)
        self.package: Any = griffe.load(FRONT, search_paths=[str(repository)])
        self.faces = {face.path: face for face in self._faces(self.package)}
        self.homes: dict[str, str] = {}
        """The face that describes an object, by the object's own path."""
        rooms = sorted(
            (path for path in self.faces if path != FRONT), key=lambda path: (path.count("."), path)
        )
        for path in [*rooms, FRONT]:
            for name in self.names(path):
                target = self.target(path, name)
                if target is not None and not target.is_module:
                    self.homes.setdefault(target.path, path)

    def _faces(self, module: Any) -> Iterator[Any]:
        if module.exports and module.is_init_module and not module.path.startswith(HIDDEN):
            yield module
        for member in module.modules.values():
            if not member.is_alias:
                yield from self._faces(member)

    def names(self, face: str) -> list[str]:
        """What a face lists, in its order."""
        return [str(getattr(name, "name", name)) for name in self.faces[face].exports]

    def target(self, face: str, name: str) -> Any:
        """The object that a name of a face stands for; None for what has no source of its own."""
        member = self.faces[face].members.get(name)
        if member is None:
            return None
        found = member.final_target if member.is_alias else member
        if found.is_module and not found.is_init_module and name in found.members:
            return found.members[name]  # `capture`, of the file of that name
        return found

    def place(self, face: str, name: str) -> str | None:
        """The full name under which a name of a face is described."""
        target = self.target(face, name)
        if target is None:
            return None
        if target.is_module:
            return target.path if target.path in self.faces else None
        return f"{self.homes[target.path]}.{target.name}" if target.path in self.homes else None

    def with_links(self, text: str) -> str:
        """A page whose `ml.NAME` and `mergelab.ROOM.NAME` lead to the reference."""

        def linked(match: re.Match[str]) -> str:
            code, path = match[1], match[2]
            face, _, name = (FRONT + path.removeprefix("ml").removeprefix(FRONT)).rpartition(".")
            place = self.place(face, name) if face in self.faces else None
            if place is None or "<" in code or "\\" in code:
                return match[0]
            kind = "mod" if place in self.faces else "obj"
            return f"{{py:{kind}}}`{code} <{place}>`"

        pattern = re.compile(r"(?<![`\[{}])`((ml(?:\.\w+)+|mergelab(?:\.\w+)+)(?:\([^`\n]*\))?)`(?![`\]])")
        parts = re.split(
            r"(^```.*?^```[ \t]*$|^(?:    [^\n]*\n)+|\[[^\]]*\]\([^)]*\))", text, flags=re.M | re.S
        )
        return "".join(part if n % 2 else pattern.sub(linked, part) for n, part in enumerate(parts))


def markdown(text: str) -> str:
    """A docstring's prose as Markdown: examples fenced, angle brackets and headings as they are written."""
    lines: list[str] = []
    fenced = False
    for line in text.splitlines():
        is_example = line.lstrip().startswith((">>> ", "... ")) or (fenced and line.strip() != "")
        if is_example and not fenced:
            lines += ["", "```python"]
        if fenced and not is_example:
            lines += ["```", ""]
        fenced = is_example
        if is_example or line.startswith("    "):
            lines.append(line)
        else:
            pieces = re.split(r"(`[^`]*`)", re.sub(r"^(\s*)#", r"\1\\#", line))
            kept = [p if p.startswith("`") else re.sub(r"([<*|$])", r"\\\1", p) for p in pieces]
            lines.append("".join(kept))
    return "\n".join([*lines, "```"] if fenced else lines)


def _signature(function: Any, *, method: bool = False) -> str:
    """A function's arguments and result as its source writes them."""
    shown: list[str] = []
    star = slash = False
    parameters = list(function.parameters)
    for number, parameter in enumerate(parameters):
        kind = parameter.kind.value
        if method and number == 0 and parameter.name in ("self", "cls"):
            continue
        if kind == "positional-only":
            slash = True
        elif slash:
            shown.append("/")
            slash = False
        if kind == "keyword-only" and not star:
            shown.append("*")
            star = True
        prefix = {"variadic positional": "*", "variadic keyword": "**"}.get(kind, "")
        star = star or prefix == "*"
        text = prefix + parameter.name
        if parameter.annotation is not None:
            text += f": {_plain(parameter.annotation)}"
        if parameter.default is not None and not prefix:
            text += f"{' = ' if parameter.annotation is not None else '='}{parameter.default}"
        shown.append(text)
    result = f" -> {_plain(function.returns)}" if getattr(function, "returns", None) else ""
    return f"({', '.join(shown)}){result}".replace("\n", " ")


def _plain(annotation: Any) -> str:
    """An annotation without the marks that recipes read: `Annotated[float, PerModel()]` is `float`."""
    text = " ".join(str(annotation).split())
    return re.sub(r"^Annotated\[(\w+)(?: \| None)?,.*\]$", r"\1", text)


def _sections(thing: Any) -> Iterator[str]:
    """The docstring, section by section."""
    if thing.docstring is None:
        return
    for section in thing.docstring.parse("google"):
        kind = section.kind.value
        if kind == "text":
            yield markdown(section.value)
        elif kind == "admonition":
            yield f"**{section.title}**\n\n{markdown(section.value.description)}"
        elif kind == "examples":
            yield "**Examples**"
            for part, text in section.value:
                yield markdown(text) if part.value == "text" else f"```python\n{text}\n```"
        elif kind in _TITLES:
            yield f"**{_TITLES[kind]}**\n\n" + "\n".join(_item(kind, item) for item in section.value)


def _item(kind: str, item: Any) -> str:
    name = getattr(item, "name", "")
    annotation = getattr(item, "annotation", None)
    text = markdown(item.description).strip().replace("\n", "\n  ")
    if kind in ("raises", "returns", "yields"):
        head = f"`{annotation}`: " if kind == "raises" else ""
        return f"- {head}{text}"
    return f"- `{name}`: {text}"


def _fields(kind: Any) -> str:
    """The arguments of a class: those of `__init__`, or a dataclass's fields."""
    init = kind.members.get("__init__")
    if init is not None and init.is_function:
        return _signature(init, method=True).removesuffix(" -> None")
    if any("dataclass" in str(d.value) for d in kind.decorators):
        fields = [
            f"{name}: {_plain(member.annotation)}" + ("" if member.value is None else " = ...")
            for name, member in kind.members.items()
            if member.is_attribute
            and not name.startswith("_")
            and member.annotation is not None
            and "property" not in member.labels
            and not str(member.annotation).startswith("ClassVar")
        ]
        return f"({', '.join(fields)})"
    return ""


def _described(target: Any, place: str) -> str:
    """One object of a face as a directive of Sphinx's Python domain."""
    home, _, name = place.rpartition(".")
    options = f":module: {home}"
    if target.is_function:
        kind, signature = "function", _signature(target)
    elif target.is_class:
        kind, signature = "class", _fields(target)
    else:
        kind, signature = "data", ""
        if target.annotation is not None:
            options += f"\n:type: {_plain(target.annotation)}"
    lines = [f"::::::{{py:{kind}}} {name}{signature}\n{options}", "", *_sections(target), ""]
    if target.is_class:
        for member in target.members.values():
            if member.is_alias or (member.name.startswith("_") and member.name != "__call__"):
                continue
            lines += _member(member)
    return "\n\n".join(lines) + "\n\n::::::\n"


def _member(member: Any) -> list[str]:
    if member.docstring is None:
        return []
    if member.is_function:
        head = f":::::{{py:method}} {member.name}{_signature(member, method=True)}"
    elif member.is_attribute and "property" in member.labels:
        head = f":::::{{py:property}} {member.name}"
    else:
        return []
    return [head, *_sections(member), ":::::"]


def _first_sentence(target: Any) -> str:
    text = target.docstring.value.strip() if target.docstring is not None else ""
    return (
        markdown(" ".join(re.split(r"\n\n|(?<=\.)\s", text)[0].split()))
        .replace("\n", " ")
        .replace("|", "\\|")
    )


def _page(reference: Reference, face: str) -> str:
    module = reference.faces[face]
    rows, described = [], []
    for name in reference.names(face):
        target, place = reference.target(face, name), reference.place(face, name)
        if target is None or place is None:
            continue
        kind = "mod" if place in reference.faces else "obj"
        rows.append(f"| {{py:{kind}}}`{name} <{place}>` | {_first_sentence(target)} |")
        if place == f"{face}.{target.name}" and kind == "obj" and not target.is_module:
            described.append(_described(target, place))
    # `import mergelab as ml`: the table of contents of the front door keeps its columns.
    text = module.docstring.value if module.docstring else ""
    head = f"```text\n{text}\n```" if face == FRONT else markdown(text)
    lines = [
        f"# {face}",
        "",
        f"```{{py:module}} {face}",
        "```",
        "",
        head,
        "",
        "| name | |",
        "|---|---|",
        *rows,
        "",
    ]
    return "\n".join([*lines, *described])


def write_reference(reference: Reference, folder: Path) -> None:
    """Writes `index.md` and a page for each face."""
    folder.mkdir(parents=True, exist_ok=True)
    faces: Sequence[str] = [FRONT, *sorted(set(reference.faces) - {FRONT})]
    for face in faces:
        (folder / f"{face}.md").write_text(_page(reference, face), encoding="utf-8")
    rows = [f"| [{face}]({face}.md) | {_first_sentence(reference.faces[face])} |" for face in faces]
    lines = [
        "# API reference",
        "",
        "`import mergelab as ml` has the names of the ordinary day; each room has more. A name is described "
        "once, in its room, with shapes, units and errors. Names load when they are first used.",
        "",
        "| face | |",
        "|---|---|",
        *rows,
        "",
        "```{toctree}",
        ":hidden:",
        "",
        *faces,
        "```",
        "",
    ]
    (folder / "index.md").write_text("\n".join(lines), encoding="utf-8")
