"""SIGTERM noted by a training, which ends after the step it came in with a checkpoint of it."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from mergelab.processes.agreement import preempted
from mergelab.processes.grace import end_after
from mergelab.processes.joining import current_run
from mergelab.processes.termination import Terminated

__all__ = ["Termination"]


class Termination:
    """Notes SIGTERM instead of obeying it; a context manager that puts the earlier handler back.

    Only the main thread of a process can take signals; elsewhere nothing is changed. In a run of several
    processes the step at which all of them stop is found together (`mergelab.processes.preempted`).

    Attributes:
        unsaved: whether a step has been made that no checkpoint holds; without one a process that trains
            alone obeys the signal at once.
    """

    def __init__(self, grace: float | None = None) -> None:
        """Touches nothing yet.

        Args:
            grace: seconds after the signal at which the process is ended, kept or not; None for no limit.
        """
        self.unsaved = False
        self._came = False
        self._grace = grace
        self._run = current_run()
        import jax

        self._distributed = jax.process_count() > 1
        self._before: Any = None
        self._installed = False
        self._clock: threading.Timer | None = None

    def due(self, step: int) -> bool:
        """Whether the run is to be kept and ended after this step; every process gets the same answer."""
        return preempted(step) if self._distributed else self._came

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        came, self._came = self._came, True
        if came:  # a second one does not disturb the end
            return
        if self._run is not None:
            self._run.request_stop(self._grace)
        elif not self.unsaved:
            raise Terminated
        elif self._grace is not None:
            self._clock = end_after(self._grace)

    def __enter__(self) -> Self:
        alone_or_joined = not self._distributed or self._run is not None
        if alone_or_joined and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._on_signal)
            self._installed = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._clock is not None:
            self._clock.cancel()
        if self._installed:
            self._installed = False
            # None stands for a handler that Python did not install and cannot put back.
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._before is None else self._before)
