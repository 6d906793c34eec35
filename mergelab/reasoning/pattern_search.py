"""A user's pattern searched for in a process of its own: one that backtracks for ever ends in a sentence."""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
from pathlib import Path

from mergelab.errors import EvaluationError, quoted
from mergelab.text.child_process import ChildProcess

__all__ = ["find_last"]

SECONDS = 20.0
"""Time of one search on the clock. Ordinary ones take less than a thousandth of a second."""

_WORKER = Path(__file__).with_name("pattern_worker.py")


class _Searcher:
    """The child of this process, if one runs, and the lock of those who want to use it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.child: ChildProcess | None = None

    def ask(self, pattern: str, text: str, seconds: float) -> bytes:
        with self.lock:
            if self.child is None or not self.child.usable:
                self.discard()
                self.child = ChildProcess(_WORKER)
            try:
                answer = self.child.ask(json.dumps([pattern, text]).encode() + b"\n", seconds, -1)
            except BaseException:  # Ctrl-C: what the child is doing is of no use to anyone
                self.discard()
                raise
            if not answer.endswith(b"\n"):
                self.discard()
            return answer

    def discard(self) -> None:
        """Ends the child, if there is one."""
        child, self.child = self.child, None
        if child is not None:
            child.process.kill()
            child.end()


_searcher = _Searcher()


def _after_fork() -> None:
    """A forked process has the parent's pipes, and must not speak into them."""
    global _searcher
    _searcher = _Searcher()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
atexit.register(lambda: _searcher.discard())


def find_last(pattern: str, text: str, seconds: float = SECONDS) -> str | None:
    """The first group of a pattern's last match in a text, or the match where it has no groups.

    Args:
        pattern: a regular expression that compiles; lines have ends of their own in it.
        text: where to look.
        seconds: time of the search.

    Raises:
        EvaluationError: it does not end in that time, or no process can be started for it.
    """
    try:
        answer = _searcher.ask(pattern, text, seconds)
    except (OSError, RuntimeError, ValueError) as error:  # no such program, no more processes or threads
        raise EvaluationError(
            f"the pattern {quoted(pattern)} cannot be searched for: no process can be started for it "
            f"({error}); check {sys.executable or 'the Python program'} and the limits of this system"
        ) from error
    if not answer.endswith(b"\n"):
        raise EvaluationError(
            f"the pattern {quoted(pattern)} was not done with {len(text)} characters of a trace after "
            f"{seconds:g} seconds; give one without repetitions inside repetitions, such as (a+)+"
        )
    found = json.loads(answer)
    return found if isinstance(found, str) else None
