"""What commands say besides their result: `-q` silences it, `-v` adds what mergelab does, by `logging`."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import click

__all__ = ["add_options", "is_quiet", "note", "warn"]

_STARTED = time.monotonic()
_COUNT = "mergelab.verbosity"  # key of `Context.meta`: -v less -q, as given so far
_state = {"quiet": False}


def is_quiet() -> bool:
    """Whether progress, notes and warnings are unwanted (`-q`)."""
    return _state["quiet"]


def warn(sentence: object) -> None:
    """Says what the user should know though the command goes on, on stderr; nothing with `-q`."""
    _say("warning", sentence)


def note(sentence: object) -> None:
    """Says what the user may want to know, on stderr; nothing with `-q`."""
    _say("note", sentence)


def _say(kind: str, sentence: object) -> None:
    if not is_quiet():
        click.echo(f"{kind}: {sentence}", err=True)


def add_options(command: click.Command) -> click.Command:
    """The command, with `-v` and `-q`; they may stand before its name, too."""
    if not any(option.name == "verbose" for option in command.params):
        command.params += [
            click.Option(
                ["-v", "--verbose"], count=True, expose_value=False, callback=_louder,
                help="What is done, on standard error; -vv also what libraries log.",
            ),
            click.Option(
                ["-q", "--quiet"], is_flag=True, expose_value=False, callback=_softer,
                help="No progress, notes or warnings; errors and the result alone.",
            ),
        ]  # fmt: skip
    return command


def _louder(ctx: click.Context, option: click.Parameter, value: int) -> None:
    _set(ctx, value)


def _softer(ctx: click.Context, option: click.Parameter, value: bool) -> None:
    _set(ctx, -1 if value else 0)


def _set(ctx: click.Context, change: int) -> None:
    count = ctx.meta[_COUNT] = ctx.meta.get(_COUNT, 0) + change
    _state["quiet"] = count < 0
    logger = logging.getLogger("mergelab")
    for handler in [handler for handler in logger.handlers if isinstance(handler, _Lines)]:
        logger.removeHandler(handler)
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _Lines)]:
        root.removeHandler(handler)
    if count > 0:
        (root if count > 1 else logger).addHandler(_Lines())
        logger.setLevel(logging.INFO if count == 1 else logging.DEBUG)
        if count > 1:
            root.setLevel(logging.INFO)


class _Lines(logging.Handler):
    """One line of standard error for each record, with the seconds since the command began."""

    def emit(self, record: logging.LogRecord) -> None:
        text = f"[{time.monotonic() - _STARTED:7.1f} s] {record.name}: {record.getMessage()}"
        tqdm: Any = sys.modules.get("tqdm")
        if tqdm is None:
            click.echo(text, err=True)
        else:  # above the bars that are shown
            tqdm.tqdm.write(text, file=sys.stderr)
