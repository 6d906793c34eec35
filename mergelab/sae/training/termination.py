"""SIGTERM in a training: the step under way is finished and kept before the run ends."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

import jax

from mergelab.processes import Terminated, preempted

__all__ = ["Termination"]


class Termination:
    """Notes SIGTERM instead of obeying it; a context manager that puts the earlier handler back.

    Only the main thread of a process can take signals; elsewhere nothing is changed. In a distributed run JAX
    takes the signal and finds a step at which all processes stop.

    Attributes:
        unsaved: whether a step has been made that no checkpoint holds; without one the signal is obeyed at
            once.
    """

    def __init__(self) -> None:
        self.unsaved = False
        self._came = False
        self._distributed = jax.process_count() > 1
        self._before: Any = None
        self._installed = False

    def due(self, step: int) -> bool:
        """Whether the run is to be kept and ended after this step; every process gets the same answer."""
        return preempted(step) if self._distributed else self._came

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        came, self._came = self._came, True
        if not self.unsaved and not came:  # a second one does not disturb the end
            raise Terminated

    def __enter__(self) -> Self:
        if not self._distributed and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._on_signal)
            self._installed = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._installed:
            self._installed = False
            # None stands for a handler that Python did not install and cannot put back.
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._before is None else self._before)
