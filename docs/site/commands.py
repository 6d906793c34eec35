"""The page of commands: the help of each, as the command line prints it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from mergelab.cli.main import SECTIONS, cli


def _commands(group: click.Group, parent: click.Context) -> Iterator[tuple[str, str]]:
    for name in group.list_commands(parent):
        command = group.get_command(parent, name)
        assert command is not None
        context = click.Context(
            command, info_name=name, parent=parent, max_content_width=88, terminal_width=88
        )
        yield context.command_path, command.get_help(context)
        if isinstance(command, click.Group):
            yield from _commands(command, context)


def write_commands(folder: Path) -> None:
    """Writes `index.md`: every command with its options and examples."""
    folder.mkdir(parents=True, exist_ok=True)
    helps = dict(_commands(cli, click.Context(cli, info_name="mergelab")))
    lines = [
        "# Commands",
        "",
        "What `mergelab COMMAND --help` prints. [How commands end](../docs/command_line.md)",
        "",
    ]
    for heading, names in SECTIONS.items():
        lines += [f"## {heading}", ""]
        for path, text in helps.items():
            if path.split()[1] in names:
                lines += [f"### {path}", "", "```text", text, "```", ""]
    (folder / "index.md").write_text("\n".join(lines), encoding="utf-8")
