"""What ends or fails processes: the signal that asks one to stop, and a step that fails on all if on one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from mergelab.errors import MeshError

__all__ = ["Terminated", "agree", "preempted", "span_processes", "together"]

_MESSAGE_BYTES = 1024


class Terminated(KeyboardInterrupt):
    """SIGTERM was received: what clusters send before they take the machine away."""


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

    Every process must ask at every step, counted alike. JAX's own service passes the notice on and finds the
    step; where it is switched off the answer is False.
    """
    from jax.experimental import multihost_utils

    try:
        return multihost_utils.reached_preemption_sync_point(step)
    except RuntimeError:
        return False


def _failures(mine: str) -> list[tuple[int, str]]:
    """Exchanges messages; returns process and message of every one that is not empty."""
    import numpy as np
    from jax.experimental import multihost_utils

    data = np.frombuffer(mine.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0"), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(data))
    texts = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows]
    return [(process, text) for process, text in enumerate(texts) if text]
