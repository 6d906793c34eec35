"""Batches of a stream made ahead of the one who takes them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from mergelab.activations.stream import Batch

__all__ = ["Prefetch", "PrefetchTrace"]

Ready = TypeVar("Ready")


@runtime_checkable
class _Batches(Protocol):
    """A stream of batches that knows its place."""

    def state(self) -> dict[str, Any]: ...

    def __next__(self) -> Batch: ...


_INTERRUPT_WAIT = 0.5
"""Seconds an interrupted consumer gives the batch that is being made."""


@dataclass
class PrefetchTrace:
    """How a consumer fared.

    Attributes:
        batches: taken so far.
        waited: seconds the consumer stood still for them.
        working: seconds the consumer spent between one batch and the next.
    """

    batches: int = 0
    waited: float = 0.0
    working: float = 0.0


class Prefetch(Generic[Ready]):
    """An iterator over the batches of a stream, prepared ahead; a context manager that ends its thread.

    Args:
        stream: the batches.
        prepare: what to make of each in the thread, such as putting it on the devices.
        ahead: how many are kept ready.
    """

    def __init__(self, stream: _Batches, prepare: Callable[[Batch], Ready], *, ahead: int = 2) -> None:
        self.trace = PrefetchTrace()
        self._state = stream.state()
        self._ready: queue.Queue[tuple[Any, Any, BaseException | None]] = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        self._last: float | None = None
        self._thread = threading.Thread(target=self._fill, args=(stream, prepare), daemon=True)
        self._thread.start()

    def _fill(self, stream: _Batches, prepare: Callable[[Batch], Ready]) -> None:
        try:
            while not self._stop.is_set():
                batch = prepare(next(stream))
                self._put((batch, stream.state(), None))
        except BaseException as error:  # whatever it is, the consumer must hear of it
            self._put((None, None, error))

    def _put(self, item: tuple[Any, Any, BaseException | None]) -> None:
        while not self._stop.is_set():
            try:
                return self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def state(self) -> dict[str, Any]:
        """The stream's state as the consumer sees it: the place of the next batch it will take."""
        return self._state

    def __iter__(self) -> Iterator[Ready]:
        return self

    def __next__(self) -> Ready:
        asked = time.perf_counter()
        batch, state, error = self._ready.get()
        if error is not None:
            raise error
        now = time.perf_counter()
        if self._last is not None:
            self.trace.working += asked - self._last
        self.trace.batches += 1
        self.trace.waited += now - asked
        self._last, self._state = now, state
        return batch

    def __enter__(self) -> Prefetch[Ready]:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop.set()
        # A user who interrupts does not wait for a slow source; the thread dies with the process.
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        self._thread.join(_INTERRUPT_WAIT if interrupted else None)
