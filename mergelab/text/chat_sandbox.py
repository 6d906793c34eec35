"""Runs chat templates in a child process, with limits on time, memory and what comes back.

A template may come from anyone. Jinja's sandbox keeps it from files and from the interpreter; that it ends,
and how much it takes, only the operating system can decide. So none runs here: `chat_worker` does it, in a
process without environment variables that is killed when its time is over. The process is started at the
first template and serves the later ones; a template that breaks its limits costs its process.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from mergelab.errors import ChatTemplateError, DependencyError
from mergelab.text.child_process import ChildProcess

__all__ = ["Budget", "run_template"]

_WORKER = Path(__file__).with_name("chat_worker.py")


@dataclass(frozen=True)
class Budget:
    """What one rendering may use.

    Attributes:
        seconds: processor time, where the operating system counts it; twice as much on the clock.
        characters: characters of the text.
        memory: bytes that the process may address, Python itself among them, where the operating system has
            such a limit (Linux).
    """

    seconds: float = 4.0
    characters: int = 16_000_000
    memory: int = 512_000_000


class _Workshop:
    """The child of this process, if one runs, and the lock of those who want to use it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.child: ChildProcess | None = None

    def ask(self, request: Mapping[str, Any], budget: Budget) -> dict[str, Any]:
        line = json.dumps(request).encode() + b"\n"
        with self.lock:
            child = self.child
            if child is None or not child.usable:
                self.discard()
                folders = dict.fromkeys([_folder_of("jinja2"), _folder_of("markupsafe")])
                self.child = child = ChildProcess(_WORKER, *folders)
            try:
                # A character takes at most six bytes, as \u0000.
                answer = child.ask(line, 2 * budget.seconds, 6 * budget.characters + 10_000)
            except BaseException:  # Ctrl-C: what the child is doing is of no use to anyone
                self.discard()
                raise
            if not answer.endswith(b"\n"):
                expired = child.expired
                self.child = None
                _refuse_end(child.end(), expired, budget)
            said = _parsed(answer)
            if said.get("fault") in ("memory", "depth"):
                self.discard()  # what the memory of it looks like now is anyone's guess
            return said

    def discard(self) -> None:
        """Ends the child, if there is one."""
        child, self.child = self.child, None
        if child is not None:
            child.process.kill()
            child.end()


def _folder_of(module: str) -> str:
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise DependencyError(f"chat templates need {module}; install it: pip install {module}")
    return str(Path(found.origin).parent.parent)


def _refuse_end(how: str, expired: bool, budget: Budget) -> NoReturn:
    """The error for a template whose process died."""
    if expired or how == f"signal {getattr(signal, 'SIGXCPU', None)}":
        message = f"does not end (it ran longer than {budget.seconds:g} seconds)"
    else:
        message = f"ended the process that rendered it ({how}), most likely for want of memory"
    raise ChatTemplateError(f"the chat template {message}; use another template, or shorter messages.")


def _parsed(answer: bytes) -> dict[str, Any]:
    """What the child said. A template that got hold of it could say anything, but nothing that is run."""
    try:
        said = json.loads(answer.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError):
        said = None
    if isinstance(said, dict) and all(isinstance(value, str) for value in said.values()):
        return said
    raise ChatTemplateError("the chat template disturbed the process that rendered it; do not use it.")


_workshop = _Workshop()


def _after_fork() -> None:
    """A forked process has the parent's pipes, and must not speak into them."""
    global _workshop
    _workshop = _Workshop()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
atexit.register(lambda: _workshop.discard())


def run_template(template: str, variables: Mapping[str, Any], now: Mapping[str, Any], budget: Budget) -> str:
    """Renders a template in the child process.

    Args:
        template: jinja.
        variables: plain JSON data.
        now: `time` (ISO, without zone), `offset` (seconds, or None) and `zone` (its name).
        budget: its limits.

    Raises:
        ChatTemplateError: it is not valid, fails, refuses its messages, or exceeds its limits.
    """
    request = {
        "template": template,
        "variables": variables,
        "now": now,
        "seconds": budget.seconds,
        "characters": budget.characters,
        "memory": budget.memory,
    }
    try:
        said = _workshop.ask(request, budget)
    except (OSError, RuntimeError, ValueError) as error:  # no such program, no more processes or threads
        raise ChatTemplateError(
            f"the chat template cannot be rendered: no process can be started for it ({error}); check "
            f"{sys.executable or 'the Python program'} and the limits of this system."
        ) from error
    text = said.get("text")
    if text is not None and len(text) <= budget.characters:
        return text
    words = said.get("words", "")[:600]
    raise ChatTemplateError(
        {
            "refusal": f"the chat template refuses these messages: {words}",
            "syntax": f"the chat template is not valid jinja: {words}; correct it.",
            "template": (
                f"the chat template cannot be rendered: {words}; give it what it reads, or use another."
            ),
            "memory": (
                f"the chat template takes more than {budget.memory // 10**6} MB of memory; use another "
                "template, or shorter messages."
            ),
            "depth": "the chat template is nested too deeply; use another template.",
            "error": f"the chat template fails on these messages ({words}); correct either.",
        }.get(
            said.get("fault", ""),
            f"the chat template makes more than {budget.characters} characters; use another template, or "
            "shorter messages.",
        )
    )
