"""The edge of a command: signals end it within seconds and without noise, from first import to last step.

A command runs in the main thread, where Python raises a signal's exception between two of its instructions:
never while XLA compiles or TensorStore writes. A second thread therefore hears of every signal at once, gives
the command a moment to clean up, and then ends the process. Every output gets its name in one step when it is
whole, so this loses no more than a power failure would.
"""

from __future__ import annotations

import atexit
import os
import select
import signal
import sys
import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import NoReturn

__all__ = ["EXIT_INTERRUPTED", "EXIT_TERMINATED", "Guard", "guarded"]

EXIT_INTERRUPTED = 130  # 128 + SIGINT, what a shell reports for Ctrl-C
EXIT_TERMINATED = 143  # 128 + SIGTERM

_STATUS = {signal.SIGINT: EXIT_INTERRUPTED, signal.SIGTERM: EXIT_TERMINATED}

_GRACE = 1.2
"""Seconds for a command to clean up after a signal; people and clusters wait for two."""


def guarded(command: Callable[[], int]) -> NoReturn:
    """Runs a command in this process and ends the process with its exit status.

    Args:
        command: imports, runs and reports; returns the exit status.
    """
    guard = Guard()
    try:
        try:
            guard.arm()
            status = command()
            guard.leave()
        except BaseException as error:
            if guard.status is None and not isinstance(error, KeyboardInterrupt):
                raise
            guard.end(EXIT_TERMINATED if type(error).__name__ == "Terminated" else EXIT_INTERRUPTED)
    except KeyboardInterrupt:  # while the lines above were on their way
        guard.end(EXIT_INTERRUPTED)
    if guard.status is not None:  # a library made something else of the interruption
        guard.end(guard.status)
    if status:
        # Threads that a failure left waiting would keep the interpreter from ending.
        flush()
        os._exit(status)
    sys.exit(0)


class Guard:
    """The handlers of SIGINT and SIGTERM of one process, and the thread that enforces them.

    Attributes:
        status: the exit status that the first signal asks for; None before there was one.
    """

    def __init__(self) -> None:
        """Touches nothing yet."""
        self.status: int | None = None
        self._leaving = False
        self._ending = threading.Lock()
        self._read = -1

    def arm(self) -> None:
        """Takes the signals that the process was not started to ignore."""
        for number in _STATUS:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                signal.signal(number, self._take)
        atexit.register(_ignore)  # registered first, so it runs last: nothing is left to be interrupted
        if not hasattr(os, "register_at_fork"):  # Windows wakes threads otherwise
            return
        _open_standard_streams()  # before anything else takes a number
        self._read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self._disarm)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()

    def leave(self) -> None:
        """The end of what needs cleaning up: a signal ends the process where it is."""
        self._leaving = True

    def end(self, status: int) -> NoReturn:
        """Says `interrupted` and ends the process, whatever its threads do."""
        self.status = self.status or status
        _ignore()
        _silence()
        flush()
        self._end()

    def _take(self, number: int, frame: FrameType | None) -> None:
        """The handler: raises in the main thread, for the first signal only."""
        if self.status is not None:
            return
        self.status = _STATUS[signal.Signals(number)]
        _ignore()
        _silence()
        # An extension module that is interrupted while it initializes crashes the process.
        if self._leaving or _imports(frame):
            self._end()
        processes = sys.modules.get("mergelab.processes")
        kind = getattr(processes, "Terminated", KeyboardInterrupt)
        raise kind if number == signal.SIGTERM else KeyboardInterrupt

    def _watch(self) -> None:
        """Ends the process if the command has not ended some time after a signal."""
        while True:
            for number in os.read(self._read, 64):
                status = _STATUS.get(number)  # pyright: ignore[reportArgumentType, reportCallIssue]
                # A training that took SIGTERM over finishes its checkpoint and then ends by itself.
                if status and (self.status is not None or signal.getsignal(number) == self._take):
                    time.sleep(_GRACE / 10)
                    if self.status is None:
                        # It may have come just before the main thread began to wait for something.
                        signal.pthread_kill(threading.main_thread().ident or 0, number)
                    time.sleep(_GRACE * 0.9)
                    self.status = self.status or status
                    self._end()

    def _end(self) -> NoReturn:
        """Exits once; a second thread that comes here waits for the first to do it."""
        if not self._ending.acquire(blocking=False):
            while True:
                time.sleep(_GRACE)
        _say_interrupted()
        assert self.status is not None
        if joining := sys.modules.get("mergelab.processes.joining"):
            joining.last_word("terminated" if self.status == EXIT_TERMINATED else "interrupted")
        os._exit(self.status)

    def _disarm(self) -> None:
        """Undoes `arm` in a forked child, whose signals are not this process's."""
        signal.set_wakeup_fd(-1)
        for number in _STATUS:
            if signal.getsignal(number) == self._take:
                standard = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
                signal.signal(number, standard)


def _imports(frame: FrameType | None) -> bool:
    """Whether the code that a signal found running is run by an import."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def flush() -> None:
    """Writes out what is buffered for standard output and error, as far as they take it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            pass


def _ignore() -> None:
    """Lets further signals pass unheard, also by native threads, whose system calls they would break."""
    if threading.current_thread() is threading.main_thread():
        for number in _STATUS:
            signal.signal(number, signal.SIG_IGN)


def _silence() -> None:
    """What threads, finalizers and loggers of libraries say of an interruption is of use to nobody."""
    threading.excepthook = lambda arguments: None
    sys.unraisablehook = lambda unraisable: None
    for module, function, argument in (("warnings", "simplefilter", "ignore"), ("logging", "disable", 50)):
        if call := getattr(sys.modules.get(module), function, None):  # none while it is being imported
            call(argument)
    if "logging" in sys.modules:
        sys.modules["logging"].raiseExceptions = False  # pyright: ignore[reportAttributeAccessIssue]


def _say_interrupted() -> None:
    """Writes past Python's streams, whose locks another thread may hold, and never waits for a reader."""
    try:
        if select.select([], [2], [], 0.1)[1]:
            # On a terminal the line holds a progress bar, or the ^C.
            os.write(2, b"\ninterrupted\n" if os.isatty(2) else b"interrupted\n")
    except (OSError, ValueError):
        pass


def _open_standard_streams() -> None:
    """Opens the null device where the caller closed a stream: else the next file would take its place."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
