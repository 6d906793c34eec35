"""One process's membership in a run: what it asks and tells the others, and its end when theirs has come."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Callable
from typing import Any, NoReturn

from mergelab.errors import MeshError
from mergelab.processes.grace import EXIT_TERMINATED, out_of_time
from mergelab.processes.hub import Hub
from mergelab.processes.launch import Launch
from mergelab.processes.link import Link
from mergelab.processes.messages import Ended

__all__ = ["Run"]

_STATUS = {"terminated": EXIT_TERMINATED, "interrupted": 130}
"""Exit status of a process whose run has ended for a reason; 2 for all other reasons."""

_BROKEN_OFF = (
    *("Gloo", "NCCL", "RCCL", "onnection", "Socket closed", "peer", "heartbeat", "coordination service"),
    *("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED"),
)
"""Words of JAX's errors where another process was waited for."""

_PATIENCE = 1.5
"""Seconds a process has to end by itself after the run has; then it is ended."""

_LAST_WORDS = 5.0
"""Seconds in which a process that fails reaches the others."""


class Run:
    """A run of several processes that this one has joined.

    Two threads work behind it: one speaks with process 0, the other ends this process when the run has ended
    and the main thread, which may wait for ever in an exchange of arrays, has not.

    Attributes:
        launch: the place of this process in the run.
        process: its number.
        processes: number of processes.
        ended: why the run has ended; None while it goes on.
        advice: what to do when another process has ended the run, for the message.
    """

    def __init__(self, launch: Launch, *, join_timeout: float = 300.0, heartbeat: float = 100.0) -> None:
        """Touches nothing yet.

        Args:
            launch: place of this process.
            join_timeout: seconds within which all processes have to come.
            heartbeat: seconds without a sign of life after which a process counts as gone.
        """
        self.launch, self.process, self.processes = launch, launch.process_id, launch.processes
        self.join_timeout, self.heartbeat = join_timeout, heartbeat
        self.ended: Ended | None = None
        self.advice = "start all processes again"
        self._loop = asyncio.new_event_loop()
        self._hub: Hub | None = None
        self._thread: threading.Thread | None = None
        self._service = 0
        host, _, port = launch.coordinator.rpartition(":")
        host = host.strip("[]")
        self._bind = "127.0.0.1" if host.startswith("127.") else os.environ.get("MERGELAB_BIND_ADDRESS")
        self._port = int(port)
        target = "127.0.0.1" if self.process == 0 and self._bind is None else host
        self._link = Link(target, self._port, self.process, heartbeat=heartbeat, hear=self._hear)
        self._whole, self._over, self._may_leave = threading.Event(), threading.Event(), threading.Event()
        self._state = threading.Condition()
        self._step, self._step_asked, self._frozen = 0, 0, False
        self._stop_at: int | None = None
        self._grace: float | None = None
        self._concluding = self._left = False

    def connect(self, facts: dict[str, Any]) -> None:
        """Waits until all processes are here.

        Args:
            facts: what must be the same in all of them, `mergelab` and `jax`, their versions, among it.

        Raises:
            MeshError: they are not, or do not fit together.
        """
        self._thread = threading.Thread(target=self._loop.run_forever, name="run", daemon=True)
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._open(facts), self._loop).result()
        except TimeoutError as error:
            why = f" ({error})" if str(error) else ""
            raise MeshError(
                f"process 0 does not answer at {self.launch.coordinator} after {self.join_timeout:g} s{why}: "
                "start it with the same address, or open the port; --join-timeout says how long it has"
            ) from error
        except OSError as error:
            raise MeshError(
                f"process 0 cannot listen on port {self._port} ({error.strerror or error}): choose another "
                "port for all processes"
            ) from error
        while not self._whole.wait(0.05):
            if self.ended is not None:
                raise MeshError(self._said(self.ended))
        threading.Thread(target=self._enforce, name="run-end", daemon=True).start()

    @property
    def service(self) -> str:
        """Address at which JAX's client of this process finds JAX's service."""
        return f"127.0.0.1:{self._link.port if self.process else self._service}"

    async def _open(self, facts: dict[str, Any]) -> None:
        if self.process == 0:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self._service = probe.getsockname()[1]
            times = {"join_timeout": self.join_timeout, "heartbeat": self.heartbeat}
            self._hub = Hub(self.processes, self._service, **times)
            await self._hub.open(self._bind, self._port)
        hello = {
            "hello": self.process,
            "processes": self.processes,
            "facts": {"host": socket.gethostname(), "pid": os.getpid(), **facts},
        }
        await self._link.open(hello, self.join_timeout)

    def _hear(self, message: dict[str, Any]) -> None:
        if "go" in message:
            self._whole.set()
        elif "end" in message and not self._left and self.ended is None:
            self.ended = Ended.of_facts(message["end"])
            self._over.set()
        elif "freeze" in message:
            with self._state:
                self._frozen, self._grace = True, message.get("grace")
                self._link.say(at=self._step)
            if self._grace is not None:
                self._loop.call_later(self._grace, out_of_time, self._grace)
        elif "stop_at" in message:
            with self._state:
                self._stop_at = int(message["stop_at"])
                self._state.notify_all()
        elif "leave" in message:
            self._link.leaving = self._left = True
            self._may_leave.set()

    def request_stop(self, grace: float | None) -> None:
        """Asks all processes to stop at one step; a signal's handler may call it.

        Args:
            grace: seconds after which processes that have not stopped are ended; None for no limit.
        """
        self._loop.call_soon_threadsafe(lambda: self._link.say(stop=grace))

    def stops_at(self, step: int) -> bool:
        """Whether this is the step at which all processes stop.

        Every process must ask after every step, counted alike. While the step is being found it waits.
        """
        with self._state:
            self._step_asked = step
            if not self._frozen:
                self._step = step
                return False
            self._state.wait_for(lambda: self._stop_at is not None)
            assert self._stop_at is not None
            return step >= self._stop_at

    def fail(self, sentence: str, kind: str = "failed") -> Ended | None:
        """Tells the others that this process ends, and why; call it before the process ends.

        Returns:
            Why the run had ended already, if another process was first; None if this one's word counts.
        """
        with self._state:
            self._concluding = True
        if self.ended is None:
            mine = Ended(self.process, socket.gethostname(), kind, sentence[:8000])  # pyright: ignore[reportArgumentType]
            self._loop.call_soon_threadsafe(lambda: self._link.say(ended=mine.facts()))
            self._over.wait(_LAST_WORDS)
        if self._hub is not None:  # the others hear of it through this process
            self._wait(lambda: self._hub is None or self._hub.here() <= 1, _LAST_WORDS)
        first = self.ended
        return None if first is None or first.process == self.process else first

    def last_word(self, kind: str) -> None:
        """Tells the others that a signal ends this process, in a fifth of a second."""
        if not self._left and self.ended is None:
            mine = Ended(self.process, socket.gethostname(), kind, "")  # pyright: ignore[reportArgumentType]
            self._loop.call_soon_threadsafe(lambda: self._link.say(ended=mine.facts()))
            self._over.wait(0.2)

    def cause(self, timeout: float | None = None) -> Ended | None:
        """Why the run has ended, waited for: what failed here may only follow from it.

        Args:
            timeout: seconds; those in which a vanished process is noticed if None.
        """
        self._over.wait(self.heartbeat * 1.5 if timeout is None else timeout)
        return self.ended

    def leave(self, finish: Callable[[], None], timeout: float | None = None) -> bool:
        """Waits for the others to have done their part, and takes the run apart.

        Args:
            finish: what then ends the exchange of arrays, in all processes at once.
            timeout: seconds to wait for the others; without limit if None.

        Returns:
            Whether all had come.
        """
        if self._left:
            return True
        self._loop.call_soon_threadsafe(lambda: self._link.say(leaving=True))
        if not self._may_leave.wait(timeout):
            return False
        finish()
        self._loop.call_soon_threadsafe(lambda: self._link.say(left=True))
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(self._link.flush(), self._loop).result(2)
        if self._hub is not None:
            self._wait(lambda: self._hub is None or self._hub.here() == 0, 2 * _LAST_WORDS)
        return True

    def close(self) -> None:
        """Closes every connection; the run is over for this process."""
        self._left = True
        self._link.leaving = True
        if self._thread is None:
            self._loop.close()
            return

        async def close() -> None:
            self._link.close()
            if self._hub is not None:
                self._hub.close()
            mine = asyncio.current_task()
            if tasks := [task for task in asyncio.all_tasks() if task is not mine]:
                await asyncio.wait(tasks, timeout=_LAST_WORDS / 2)  # they see their connections end

        asyncio.run_coroutine_threadsafe(close(), self._loop).result(_LAST_WORDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_LAST_WORDS)
        self._thread = None
        self._loop.close()
        self._over.set()  # lets the thread that waits for an end go

    @property
    def stopped(self) -> bool:
        """Whether all processes have stopped at one step, as `request_stop` asked."""
        return self._stop_at is not None and self._step_asked >= self._stop_at

    @staticmethod
    def follows(error: BaseException) -> bool:
        """Whether an exception may only follow from another's end: an exchange of arrays broke off."""
        kinds = {kind.__name__ for kind in type(error).__mro__}
        return bool(kinds & {"JaxRuntimeError", "XlaRuntimeError"}) and any(
            word in str(error) for word in _BROKEN_OFF
        )

    @staticmethod
    def status(ended: Ended) -> int:
        """Exit status of a process whose run has ended."""
        return _STATUS.get(ended.kind, 2)

    def lines(self, ended: Ended) -> list[str]:
        """What to say in this process of an end that came from another: one sentence a line."""
        return self._said(ended).splitlines()

    def _said(self, ended: Ended) -> str:
        if ended.kind == "unjoined":
            return ended.sentence
        host = f" ({ended.host})" if ended.host else ""
        who = f"process {ended.process} of {self.processes}{host}"
        what = {
            "vanished": f"{who} vanished: it was killed, ran out of memory or lost its machine",
            "silent": f"{who} {ended.sentence}: its machine stands still or is cut off; --heartbeat says how "
            "long it may be silent",
            "terminated": f"{who} was terminated",
            "interrupted": f"{who} was interrupted",
        }.get(ended.kind, f"{who} failed: {ended.sentence}")
        return what if ended.kind == "failed" else f"{what}; {self.advice}"

    def _wait(self, done: Callable[[], bool], timeout: float) -> None:
        pause = threading.Event()
        for _ in range(int(timeout / 0.05)):
            if done():
                return
            pause.wait(0.05)

    def _enforce(self) -> None:
        self._over.wait()
        if self.ended is None:  # the run was closed
            return
        threading.Event().wait(_PATIENCE)
        with self._state:
            concluding = self._concluding
        if concluding:
            threading.Event().wait(2 * _LAST_WORDS)
        if not self._left:
            self._exit(self.ended, quiet=concluding)

    def _exit(self, ended: Ended, *, quiet: bool = False) -> NoReturn:
        """Speaks past Python's streams, whose locks others may hold, and ends this process."""
        if not quiet:
            text = "".join(f"error: {line}\n" for line in self.lines(ended))
            if ended.kind in _STATUS:
                text += "interrupted\n"
            with contextlib.suppress(OSError):
                os.write(2, text.encode("utf-8", "backslashreplace"))
        os._exit(self.status(ended))
