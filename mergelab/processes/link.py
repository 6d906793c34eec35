"""A member's connection to process 0: signs of life, messages, and the way of JAX's own client through it.

JAX's client aborts its process when its connection to process 0 is cut. So that a process can say in words
what has happened, the client speaks to a port of its own machine, whose connections stay open whatever
becomes of process 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any

from mergelab.processes.messages import LINE_BYTES, Ended, pump, receive, send

__all__ = ["Link"]


class Link:
    """One member's connection; lives in one event loop.

    Attributes:
        port: port of this machine at which JAX's client reaches the service of process 0.
    """

    def __init__(
        self, host: str, port: int, process: int, *, heartbeat: float, hear: Callable[[dict[str, Any]], None]
    ) -> None:
        """Nothing is opened yet.

        Args:
            host: machine of process 0.
            port: its port.
            process: number of this process.
            heartbeat: seconds without a sign of life after which the other side counts as gone.
            hear: function that is called with every message but signs of life, in the event loop.
        """
        self.host, self.remote_port, self.process = host, port, process
        self.heartbeat, self.hear = heartbeat, hear
        self.port = 0
        self.leaving = False
        self._writer: asyncio.StreamWriter | None = None
        self._server: asyncio.Server | None = None
        self._heard = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._held: list[asyncio.StreamWriter] = []

    async def open(self, hello: dict[str, Any], timeout: float) -> None:
        """Connects, trying again for `timeout` seconds, and says who this is.

        Raises:
            TimeoutError: nobody answered.
        """
        until = time.monotonic() + timeout
        while True:
            try:
                left = max(until - time.monotonic(), 0.1)
                reader, self._writer = await asyncio.wait_for(
                    asyncio.open_connection(self.host, self.remote_port, limit=LINE_BYTES), min(left, 10)
                )
                break
            except (OSError, TimeoutError) as error:
                if time.monotonic() > until:
                    raise TimeoutError(str(error)) from error
                await asyncio.sleep(0.2)
        self._heard = time.monotonic()
        send(self._writer, **hello)
        self._server = await asyncio.start_server(self._hand_on, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        for work in (self._listen(reader), self._beat()):
            self._tasks.add(asyncio.create_task(work))

    def say(self, **message: Any) -> None:
        """Sends a message to process 0."""
        if self._writer is not None:
            send(self._writer, **message)

    async def flush(self) -> None:
        """Waits until what was said is on its way."""
        if self._writer is not None:
            with contextlib.suppress(OSError, TimeoutError):
                await asyncio.wait_for(self._writer.drain(), 2)

    def close(self) -> None:
        """Closes what is open, and ends what goes on by itself."""
        for task in self._tasks:
            task.cancel()
        if self._server is not None:
            self._server.close()
        for writer in (self._writer, *self._held):
            if writer is not None:
                writer.transport.abort()

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        while (message := await receive(reader)) is not None:
            self._heard = time.monotonic()
            if "beat" not in message:
                self.hear(message)
        if not self.leaving:
            self.hear({"end": Ended(0, self.host, "vanished", "vanished").facts()})

    async def _beat(self) -> None:
        pause, before = self.heartbeat / 5, time.monotonic()
        while not self.leaving:
            self.say(beat=True)
            await asyncio.sleep(pause)
            now = time.monotonic()
            if now - before > 2 * pause:  # this process itself stood still
                self._heard = now
            before = now
            if now - self._heard > self.heartbeat and not self.leaving:
                said = f"gave no sign of life for {self.heartbeat:g} s"
                self.hear({"end": Ended(0, self.host, "silent", said).facts()})
                return

    async def _hand_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._held.append(writer)  # never closed from here
        try:
            inner, outer = await asyncio.open_connection(self.host, self.remote_port)
        except OSError:
            return
        send(outer, stream=True)
        back = asyncio.create_task(pump(inner, writer))
        await pump(reader, outer)
        outer.close()
        back.cancel()
