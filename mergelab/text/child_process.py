"""A Python program in a process of its own, which answers line by line, and is killed when its time is up."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

__all__ = ["ChildProcess"]

_START_SECONDS = 30.0


class ChildProcess:
    """A running worker: asked by one thread at a time."""

    def __init__(self, worker: Path, *arguments: str) -> None:
        """Starts it.

        Args:
            worker: a program that says `ready`, and then answers each line with one.
            arguments: what it is told.

        Raises:
            OSError: it cannot be started, or did not say so.
            ValueError: the program's name cannot be one.
        """
        # Without the user's environment, start files and folders; Windows starts nothing without its root.
        kept = {name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ}
        self.expired = False
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-X", "utf8", str(worker), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=kept,
            start_new_session=True,  # Ctrl-C is for this process, which then ends the child
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
        try:
            if self.ask(b"", _START_SECONDS, 100) != b"ready\n":
                raise ChildProcessError(f"{sys.executable} {worker} did not start ({self.end()})")
        except BaseException:
            self.end()
            raise

    def ask(self, line: bytes, seconds: float, longest: int) -> bytes:
        """Sends a line and returns the one that comes back: less than a line if the child died."""
        stdin, stdout = _pipe(self.process.stdin), _pipe(self.process.stdout)
        timer = threading.Timer(seconds, self._expire)
        timer.daemon = True
        timer.start()
        try:
            with contextlib.suppress(OSError):  # a broken pipe: the child's status says more
                stdin.write(line)
                stdin.flush()
                return stdout.readline(longest)
            return b""
        finally:
            timer.cancel()
            timer.join()  # it cannot strike later, at another template

    def _expire(self) -> None:
        self.expired = True
        self.process.kill()

    @property
    def usable(self) -> bool:
        """Whether it can be asked again."""
        return not self.expired and self.process.poll() is None

    def end(self) -> str:
        """Kills it, if it still runs, and waits for its end; returns how it ended, in words."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(0.1)  # one that died by itself says of what
        self.process.kill()
        status = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                _pipe(pipe).close()
        return f"signal {-status}" if status < 0 else f"status {status}"


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe
