"""What commands print: a progress bar on stderr, and a result on stdout, as text or as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import click

from mergelab.cli.verbosity import is_quiet

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["StageBar", "byte_bar", "count_bar", "print_result"]


def print_result(
    data: Callable[[], Any], text: Callable[[], str], *, as_json: bool, indent: int | None = 2
) -> None:
    """Prints a result on stdout in one of its two forms; only that one is made.

    Args:
        data: Function that gives the result as plain data.
        text: Function that gives it as lines for a reader.
        as_json: Whether the data is printed, as JSON.
        indent: Spaces by which JSON is indented; None prints one line.
    """
    click.echo(json.dumps(data(), indent=indent) if as_json else text())


def byte_bar(what: str, total: int | None = None) -> tqdm:
    """A bar of bytes, throughput and time left; nothing where stderr is not a terminal.

    Args:
        what: Verb that the bar begins with.
        total: Bytes that there are; unknown if None.
    """
    from tqdm import tqdm

    return tqdm(
        total=total,
        unit="B",
        unit_scale=True,
        desc=what,
        file=sys.stderr,
        disable=is_quiet() or None,
        leave=False,
    )


def count_bar(unit: str, *, quiet: bool = False) -> tqdm:
    """A bar of things that are counted, which stays when it is done.

    Args:
        unit: Name of one thing.
        quiet: Whether nothing is shown on a terminal either.
    """
    from tqdm import tqdm

    return tqdm(unit=unit, disable=quiet or is_quiet() or None, dynamic_ncols=True)


class StageBar:
    """One bar for each thing that is done, which replaces the one before."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet or is_quiet()
        self._what = ""
        self._bar: tqdm | None = None

    def show(self, what: str, done: int, total: int) -> None:
        """Moves the bar of `what` to `done` of `total`."""
        from tqdm import tqdm

        if self._bar is None or what != self._what:
            self._close()
            self._what = what
            self._bar = tqdm(
                total=total, desc=what, file=sys.stderr, disable=self._quiet or None, leave=False
            )
        self._bar.update(done - self._bar.n)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
