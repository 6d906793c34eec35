"""Commands that pages, help, notebooks and configurations show: every option exists, every value fits."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import mergelab as ml
from mergelab.cli.main import cli

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/*.md", "benchmarks/README.md", "colab/*.md", "examples/*.md")
    for page in REPOSITORY.glob(pattern)
    if page.name != "CHANGELOG.md"
)


def lines_of_code(text: str) -> Iterator[str]:
    """Lines of a page that stand in indented or fenced blocks, continued ones joined."""
    text = text.replace("\\\n", " ")
    for language, block in re.findall(r"^```(\S*)\n(.*?)^```", text, flags=re.M | re.S):
        if language in ("", "bash", "sh", "console"):
            yield from block.splitlines()
    yield from re.findall(r"^    (\S.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.M)


def commands_in(line: str) -> Iterator[list[str]]:
    """The `mergelab` commands of a shell line, as words after the name."""
    line = re.sub(r"^\s*[$!]\s*", "", line).replace("...", "")
    try:
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>()")
        lexer.whitespace_split = True
        words = list(lexer)
    except ValueError:
        return
    command: list[str] | None = None
    for number, word in enumerate([*words, ";"]):
        if word == "mergelab" and command is None and (number == 0 or starts(words[:number])):
            command = []
        elif command is not None and set(word) <= set("&|;<>()"):
            yield command
            command = None
        elif command is not None:
            command.append(word)


def starts(before: list[str]) -> bool:
    """Whether a command begins behind these words: an operator, or variables that are set for it."""
    return set(before[-1]) <= set("&|;()") or all("=" in word or word == "nice" for word in before)


def fault(words: list[str]) -> str | None:
    """What the command line has against a command, without running it; files need not be there."""
    if not words:
        return None  # prints the help
    command: click.Command = cli
    context = click.Context(cli, info_name="mergelab")
    rest = list(words)
    while isinstance(command, click.Group):
        while rest and rest[0].startswith("-"):
            if rest.pop(0) in ("--help", "--version", "-h"):
                return None
        if not rest:
            return "no command"
        found = command.get_command(context, rest[0])
        if found is None:
            return f"no command {rest[0]}"
        command, context = found, click.Context(found, info_name=rest.pop(0), parent=context)
    if "--help" in rest:
        return None
    parser = command.make_parser(context)
    try:
        given, arguments, _ = parser.parse_args(list(rest))
        for parameter in command.params:
            value = given.get(str(parameter.name))
            if parameter.required and value is None and (parameter.nargs != -1 or not rest):
                return f"{parameter.name} is missing"
            if not isinstance(parameter.type, click.Path | click.File) and value is not None:
                parameter.type_cast_value(context, value)
        return f"unexpected {arguments}" if arguments else None
    except click.UsageError as error:
        return error.format_message()


def shown() -> list[tuple[str, list[str]]]:
    """Every command that is shown, with its place."""
    found = [
        (str(page.relative_to(REPOSITORY)), words)
        for page in PAGES
        for line in lines_of_code(page.read_text("utf-8"))
        for words in commands_in(line)
    ]
    for notebook in sorted(REPOSITORY.glob("colab/*.ipynb")):
        cells = json.loads(notebook.read_text("utf-8"))["cells"]
        source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        for line in re.findall(r"^!\s*(mergelab .*)$", source, re.M):
            found += [(notebook.name, words) for words in commands_in(line)]
    for file in sorted((REPOSITORY / "configs").rglob("*.yaml")):
        for line in re.findall(r"^#\s+(mergelab .*)$", file.read_text("utf-8"), re.M):
            found += [(file.name, words) for words in commands_in(line)]
    for path, text in helps(cli, click.Context(cli, info_name="mergelab")):
        for line in re.findall(r"^\s+(mergelab .*)$", text.replace("\\\n", " "), re.M):
            found += [(f"{path} --help", words) for words in commands_in(line)]
    return found


def helps(group: click.Group, context: click.Context) -> Iterator[tuple[str, str]]:
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        inner = click.Context(command, info_name=name, parent=context)
        yield inner.command_path, command.help or ""
        if isinstance(command, click.Group):
            yield from helps(command, inner)


def is_a_form(words: list[str]) -> bool:
    """Whether a line shows a form rather than a command: `mergelab COMMAND`, `[--option]`."""
    return any(re.fullmatch(r"COMMAND|\[.*|.*\]", word) for word in words)


def test_every_command_that_is_shown_is_one() -> None:
    commands = [(place, words) for place, words in shown() if not is_a_form(words)]
    wrong = [
        f"{place}: mergelab {shlex.join(words)}: {f}" for place, words in commands if (f := fault(words))
    ]
    assert wrong == []
    assert len(commands) > 150
    assert {"README.md", "toy.yaml", "mergelab merge --help"} <= {place for place, _ in commands}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("mergelab merg recipe.yaml", "no command merg"),
        ("mergelab merge recipe.yaml --out merged tensors", "unexpected"),
        ("mergelab merge recipe.yaml --ot merged", "--ot"),
        ("mergelab sae train sae.yaml", "out is missing"),
        ("X=1 mergelab quickstart --preset huge && echo", "huge"),
    ],
)
def test_a_wrong_command_would_be_seen(line: str, message: str) -> None:
    (words,) = commands_in(line)
    assert message in str(fault(words))


# Python that is shown without its results, and so is not run as a doctest.


def blocks_of_python() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for text in re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), flags=re.M | re.S):
            if ">>>" not in text:
                found.append((page.name, text))
    return found


def unknown_names(text: str) -> list[str]:
    """Dotted names of mergelab, as `ml` or imported, that there are not."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute):
            place, names = node, []
            while isinstance(place, ast.Attribute):
                names.insert(0, place.attr)
                place = place.value
            if isinstance(place, ast.Name) and place.id == "ml":
                value: object = ml
                for name in names:
                    value = getattr(value, name, None)
                    if value is None:
                        found.append(".".join(names))
                        break
    return found


def test_python_that_is_shown_compiles_and_names_what_there_is() -> None:
    blocks = blocks_of_python()
    wrong = [f"{page}: {names}" for page, text in blocks if (names := unknown_names(text))]
    assert wrong == [] and len(blocks) > 15
    assert unknown_names("import mergelab as ml\nml.load_modl('x')") == ["load_modl"]
