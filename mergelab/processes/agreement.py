"""What all processes of a run do at the same point: steps that fail on all if on one, numbers, folders."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mergelab.errors import MeshError, OutputError
from mergelab.processes.joining import current_run

__all__ = ["agree", "check_shared", "preempted", "span_processes", "together"]

_MESSAGE_BYTES = 1024

_SHOWN_AFTER = 5.0
"""Seconds after which a file that one machine has made is to be seen on another."""


def span_processes(devices: Iterable[Any]) -> bool:
    """Whether these JAX devices belong to more than one process."""
    return len({device.process_index for device in devices}) > 1


@contextlib.contextmanager
def together(step: str, *, distributed: bool) -> Iterator[None]:
    """Runs the body in every process and waits for all; if one fails, all raise.

    Every process must enter it at the same point of the program. In the process that failed its own error is
    raised.

    Args:
        step: what the body does, for the message.
        distributed: False runs the body without asking anyone.

    Raises:
        MeshError: the body failed in another process; the message is that process's.
    """
    if not distributed:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    failures = _failures("" if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    if failures:
        import jax

        process, message = failures[0]
        raise MeshError(f"{step} failed in process {process} of {jax.process_count()}: {message}")


def agree(number: int, *, distributed: bool) -> int:
    """The number that process 0 holds, in every process."""
    if not distributed:
        return number
    import numpy as np
    from jax.experimental import multihost_utils

    return int(np.asarray(multihost_utils.broadcast_one_to_all(np.array(number, np.int32))))


def preempted(step: int) -> bool:
    """Whether some process of a distributed run got SIGTERM and this is the step at which all of them stop.

    Every process must ask at every step, counted alike. In a run that was joined (`join_run`) the processes
    find the step themselves; else JAX's own service does, and where it is switched off the answer is False.
    """
    run = current_run()
    if run is not None:
        return run.stops_at(step)
    from jax.experimental import multihost_utils

    try:
        return multihost_utils.reached_preemption_sync_point(step)
    except RuntimeError:
        return False


def check_shared(folder: Path, *, distributed: bool) -> None:
    """Refuses a folder that other processes do not see as process 0 does.

    Every process must call it at the same point of the program. Process 0 puts a file there for a moment, for
    which the others look; a network's file system has five seconds to show it.

    Args:
        folder: an existing folder in which process 0 may write.
        distributed: False asks nobody.

    Raises:
        OutputError: this process does not find the file.
        MeshError: that happened in another process.
    """
    if not distributed:
        return
    import jax

    name = folder / f".seen-{agree(secrets.randbits(31), distributed=True)}"
    first = jax.process_index() == 0
    try:
        with together("looking for the shared folder", distributed=True):
            if first:
                name.touch()
        with together("looking for the shared folder", distributed=True):
            until = time.monotonic() + _SHOWN_AFTER
            while not name.exists():
                if time.monotonic() > until:
                    raise OutputError(
                        f"{folder} is not the folder that process 0 writes: all processes must see the same; "
                        "give one on a file system that all machines share"
                    )
                time.sleep(0.1)
    finally:
        if first:
            name.unlink(missing_ok=True)


def _failures(mine: str) -> list[tuple[int, str]]:
    """Exchanges messages; returns process and message of every one that is not empty."""
    import numpy as np
    from jax.experimental import multihost_utils

    data = np.frombuffer(mine.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0"), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(data))
    texts = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows]
    return [(process, text) for process, text in enumerate(texts) if text]
