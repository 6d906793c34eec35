"""The root command: help, versions, mistyped names, and how failures reach the user."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
import warnings

import click
import pytest
from click.testing import CliRunner

import mergelab
from mergelab.cli.main import SECTIONS, CommandTable, cli, run
from mergelab.errors import OutputError, RecipeError

COMMANDS = [name for names in SECTIONS.values() for name in names]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> CommandTable:
    """The root command with a `merge` that raises what its one argument names."""
    errors = {
        "recipe": RecipeError(["a.yaml: first fault", "a.yaml: second fault"]),
        "output": OutputError("the folder out is not empty: pass --overwrite"),
        "interrupt": KeyboardInterrupt(),
        "bug": ZeroDivisionError("a bug, not a message"),
    }

    @click.command()
    @click.argument("kind")
    def command(kind: str) -> None:
        raise errors[kind]

    monkeypatch.setattr(CommandTable, "get_command", lambda self, ctx, name: command)
    return cli


@pytest.mark.parametrize("name", COMMANDS)
def test_every_listed_command_exists_and_shows_examples(name: str) -> None:
    command = importlib.import_module(f"mergelab.cli.{name.replace('-', '_')}").command
    assert isinstance(command, click.Command)
    assert command.name == name
    help_text = CliRunner().invoke(cli, [name, "--help"]).output
    assert f"mergelab {name}" in help_text.split("Examples:")[1], "the help has no example of its command"


def test_help_reads_like_a_table_of_contents() -> None:
    result = CliRunner().invoke(cli, ["--help"])
    assert result.exit_code == 0, result.output
    positions = [result.output.index(f"{heading}:") for heading in SECTIONS]
    assert positions == sorted(positions)
    lines = [line.split() for line in result.output.splitlines()]
    for name in COMMANDS:
        assert any(line[:1] == [name] and len(line) > 3 for line in lines), f"{name} has no line in the help"


def test_a_warning_of_the_library_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.command()
    def command() -> None:
        warnings.warn("config.json has a field unknown here", stacklevel=1)

    monkeypatch.setattr(CommandTable, "get_command", lambda self, ctx, name: command)
    with warnings.catch_warnings():  # which also puts back how warnings are shown
        warnings.simplefilter("always")
        assert run(["inspect"]) == 0
    assert capsys.readouterr().err == "warning: config.json has a field unknown here\n"


def test_version() -> None:
    assert CliRunner().invoke(cli, ["--version"]).output == f"mergelab {mergelab.__version__}\n"


def test_a_mistyped_command_names_the_nearest() -> None:
    result = CliRunner().invoke(cli, ["mrege"])
    assert result.exit_code == 2
    assert "there is no command 'mrege' (did you mean 'merge'?)" in result.stderr


def test_every_fault_of_a_recipe_is_one_error_line(failing: CommandTable) -> None:
    result = CliRunner().invoke(failing, ["merge", "recipe"])
    assert result.exit_code == 2
    assert result.stderr.splitlines() == ["error: a.yaml: first fault", "error: a.yaml: second fault"]
    assert result.stdout == ""


def test_other_errors_are_one_line(failing: CommandTable) -> None:
    result = CliRunner().invoke(failing, ["merge", "output"])
    assert (result.exit_code, result.stderr) == (2, "error: the folder out is not empty: pass --overwrite\n")


def test_an_interrupt_exits_130(failing: CommandTable) -> None:
    result = CliRunner().invoke(failing, ["merge", "interrupt"])
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def test_a_closed_pipe_is_quiet() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    run = subprocess.run(
        [sys.executable, "-m", "mergelab", "--help"], stdout=write_end, stderr=subprocess.PIPE
    )
    os.close(write_end)
    assert run.stderr == b""


def test_help_is_quick() -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "mergelab", "--help"], check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    # Aimed at .5 s and measured in benchmarks/; a busy shared machine gets four times that.
    assert min(seconds) < 2.0
