"""The end of a grace period: a process that was asked to stop, and has not by then, is ended."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import NoReturn

__all__ = ["EXIT_TERMINATED", "end_after", "out_of_time"]

EXIT_TERMINATED = 143  # 128 + SIGTERM


def end_after(grace: float) -> threading.Timer:
    """A clock, running, that ends this process after `grace` seconds unless it is cancelled."""
    clock = threading.Timer(grace, out_of_time, [grace])
    clock.daemon = True
    clock.start()
    return clock


def out_of_time(grace: float) -> NoReturn:
    """Says past Python's streams, whose locks others may hold, what was not done, and ends this process."""
    said = f"error: no checkpoint could be written within the grace period of {grace:g} s\ninterrupted\n"
    with contextlib.suppress(OSError):
        os.write(2, said.encode())
    os._exit(EXIT_TERMINATED)
