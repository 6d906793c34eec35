"""Calls into Orbax whose failure is one error: nothing of it is printed by other threads."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

__all__ = ["call_orbax", "orbax_reason", "quiet_orbax"]

T = TypeVar("T")

_CODE = re.compile(r"os_error_code='?(\d+)")


def orbax_reason(error: BaseException) -> str:
    """Why Orbax failed, in a few words: the system's own where it was the system that refused."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return seen.strerror
        if code := _CODE.search(str(seen)):
            return os.strerror(int(code[1]))
        seen = seen.__cause__ or seen.__context__
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return said if len(said) <= 200 else f"{said[:197]}..."


def call_orbax(work: Callable[[], T]) -> T:
    """The result of a call made in a thread of its own, where no event loop runs (a notebook has one).

    Raises:
        Exception: what the call raised.
    """
    result: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            with quiet_orbax():
                result.append(work())
        except BaseException as error:  # whatever it is, the caller must hear of it
            errors.append(error)

    thread = threading.Thread(target=run, name="orbax", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return result[0]


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Keeps what Orbax's and TensorStore's own threads print of a failure off the screen: it is raised too.

    A write that fails leaves others under way, whose end TensorStore tells an event loop that Orbax has
    closed by then; so after a failure the hook that drops these reports stays.
    """
    _Quiet.enter()
    try:
        yield
    except BaseException:
        _Quiet.failed = True
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        raise
    finally:
        _Quiet.leave()


class _Quiet:
    """The filters, for as long as a call is under way or one has failed."""

    _lock = threading.Lock()
    _calls = 0
    _before: Any = None
    failed = False

    @classmethod
    def enter(cls) -> None:
        with cls._lock:
            cls._calls += 1
            if cls._before is None:
                cls._before, sys.unraisablehook = sys.unraisablehook, _drop_late_reports
                for name in _LOGS:
                    logging.getLogger(name).addFilter(_is_no_report)

    @classmethod
    def leave(cls) -> None:
        with cls._lock:
            cls._calls -= 1
            if not cls._calls and not cls.failed:
                for name in _LOGS:
                    logging.getLogger(name).removeFilter(_is_no_report)
                if sys.unraisablehook is _drop_late_reports:
                    sys.unraisablehook = cls._before
                cls._before = None

    @classmethod
    def report(cls, unraisable: Any) -> None:
        (cls._before or sys.__unraisablehook__)(unraisable)


_LOGS = ("absl", "asyncio")


def _drop_late_reports(unraisable: Any) -> None:
    if not (isinstance(unraisable.exc_value, RuntimeError) and "loop is closed" in str(unraisable.exc_value)):
        _Quiet.report(unraisable)


def _is_no_report(record: logging.LogRecord) -> bool:
    """Whether a record is none of a failure inside Orbax."""
    if record.name == "absl":
        return f"{os.sep}orbax{os.sep}" not in record.pathname
    return "never retrieved" not in record.getMessage()
