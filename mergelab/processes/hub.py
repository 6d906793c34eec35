"""Process 0's end of every connection: who belongs to the run, who has ended, and the step at which all stop.

All processes reach one port. A connection begins with a line that says what it is: a member's, which carries
messages as long as the process lives, or a stream, whose bytes go to the service of JAX behind it.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from mergelab.processes.messages import LINE_BYTES, Ended, pump, receive, send

__all__ = ["Hub", "numbers"]

_FIRST_LINE = 20.0
"""Seconds within which a connection says what it is."""


@dataclass
class _Member:
    process: int
    facts: dict[str, Any]
    writer: asyncio.StreamWriter
    heard: float = field(default_factory=time.monotonic)
    at: int | None = None
    leaving: bool = False
    left: bool = False

    @property
    def host(self) -> str:
        return str(self.facts.get("host", ""))[:200]


class Hub:
    """The members of a run and what they have said; lives in one event loop.

    Attributes:
        service: port of JAX's own service on this machine.
        ended: why the run has ended; None while it goes on.
    """

    def __init__(self, processes: int, service: int, *, join_timeout: float, heartbeat: float) -> None:
        """Nothing is opened yet; times in seconds."""
        self.processes, self.service = processes, service
        self.join_timeout, self.heartbeat = join_timeout, heartbeat
        self.ended: Ended | None = None
        self._members: dict[int, _Member] = {}
        self._whole = False
        self._frozen = False
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self, host: str | None, port: int) -> None:
        """Listens, on all addresses of the machine if `host` is None.

        Raises:
            OSError: the port cannot be taken.
        """
        self._server = await asyncio.start_server(self._accept, host, port, limit=LINE_BYTES)
        for work in (self._wait_for_all(), self._listen_for_silence()):
            self._tasks.add(asyncio.create_task(work))

    def close(self) -> None:
        """Closes what is open, and ends what goes on by itself."""
        for task in self._tasks:
            task.cancel()
        if self._server is not None:
            self._server.close()
        for member in self._members.values():
            member.writer.transport.abort()

    def here(self) -> int:
        """How many members are still connected and have not left."""
        return sum(not member.left for member in self._members.values())

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            first = await asyncio.wait_for(receive(reader), _FIRST_LINE)
        except TimeoutError:
            first = None
        try:
            if first is not None and "hello" in first:
                await self._serve(first, reader, writer)
            elif first is not None and first.get("stream"):
                await self._hand_on(reader, writer)
        finally:
            writer.close()

    async def _hand_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        until = time.monotonic() + self.join_timeout
        while True:  # JAX opens its service a moment after the run is whole
            try:
                inner, outer = await asyncio.open_connection("127.0.0.1", self.service)
                break
            except OSError:
                if time.monotonic() > until:
                    return
                await asyncio.sleep(0.1)
        ways = [asyncio.create_task(pump(reader, outer)), asyncio.create_task(pump(inner, writer))]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        outer.close()

    async def _serve(
        self, hello: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        member = self._admitted(hello, writer)
        if member is None:
            return
        if len(self._members) == self.processes:
            self._whole = True
            self._tell(go=True)
        while (message := await receive(reader)) is not None:
            member.heard = time.monotonic()
            self._hear(member, message)
        if not member.left and self.ended is None:
            said = "was lost before the run had begun" if not self._whole else "vanished"
            self._end(Ended(member.process, member.host, "vanished", said))
        member.left = True

    def _admitted(self, hello: dict[str, Any], writer: asyncio.StreamWriter) -> _Member | None:
        """The new member; None if it was refused."""
        member = _Member(int(hello["hello"]), dict(hello.get("facts", {})), writer)
        process, host = member.process, member.host
        fault = None
        if hello.get("processes") != self.processes:
            fault = (
                f"process {process} ({host}) was started as one of {hello.get('processes')}, process 0 as "
                f"one of {self.processes}"
            )
        elif not 0 <= process < self.processes:
            fault = f"there is no process {process} of {self.processes}"
        elif process in self._members:
            other = self._members[process]
            fault = f"two processes say that they are number {process}, on {other.host} and on {host}"
        else:
            mine = self._members[0].facts if self._members and 0 in self._members else member.facts
            for what in ("mergelab", "jax"):
                if mine.get(what) != member.facts.get(what):
                    fault = (
                        f"process {process} ({host}) has {what} {member.facts.get(what)}, process 0 has "
                        f"{mine.get(what)}: install the same"
                    )
        if fault is not None:
            refusal = Ended(process, host, "unjoined", fault)
            send(writer, end=refusal.facts())
            if not self._whole:  # a run that is under way does not mind a stranger
                self._end(refusal)
            return None
        if self.ended is not None:
            send(writer, end=self.ended.facts())
            return None
        self._members[process] = member
        return member

    def _hear(self, member: _Member, message: dict[str, Any]) -> None:
        if "ended" in message:
            self._end(Ended.of_facts(message["ended"]))
        elif "stop" in message and not self._frozen:
            self._frozen = True
            self._tell(freeze=True, grace=message["stop"])
        elif "at" in message:
            member.at = int(message["at"])
            steps = [other.at for other in self._members.values() if other.at is not None]
            if len(steps) == self.processes:
                self._tell(stop_at=max(steps) + 1)
        elif "leaving" in message:
            member.leaving = True
            if all(other.leaving for other in self._members.values()):
                self._tell(leave=True)
        elif "left" in message:
            member.left = True

    def _end(self, ended: Ended) -> None:
        """The first reason is the one that all are told."""
        if self.ended is None:
            self.ended = ended
            self._tell(end=ended.facts())

    def _tell(self, **message: Any) -> None:
        for member in self._members.values():
            send(member.writer, **message)

    async def _wait_for_all(self) -> None:
        await asyncio.sleep(self.join_timeout)
        if not self._whole:
            missing = sorted({*range(self.processes)} - self._members.keys())
            self._end(
                Ended(
                    missing[0],
                    "",
                    "unjoined",
                    f"{numbers(missing)} of {self.processes} did not join the run within "
                    f"{self.join_timeout:g} s: look at what they say, and start all of them; --join-timeout "
                    "says how long they have",
                )
            )

    async def _listen_for_silence(self) -> None:
        pause, before = self.heartbeat / 5, time.monotonic()
        while True:
            await asyncio.sleep(pause)
            now = time.monotonic()
            late = now - before > 2 * pause  # this process stood still: what it has not read says nothing
            before = now
            for member in self._members.values():
                if late:
                    member.heard = now
                elif now - member.heard > self.heartbeat and not member.left:
                    said = f"gave no sign of life for {self.heartbeat:g} s"
                    self._end(Ended(member.process, member.host, "silent", said))
            self._tell(beat=True)


def numbers(processes: list[int]) -> str:
    """`[1, 2, 3, 7]` as `processes 1 to 3, 7`; at most ten ranges."""
    parts: list[list[int]] = []
    for process in processes:
        if parts and parts[-1][-1] == process - 1:
            parts[-1].append(process)
        else:
            parts.append([process])
    texts = [str(p[0]) if len(p) == 1 else f"{p[0]} to {p[-1]}" for p in parts]
    more = "" if len(texts) <= 10 else " and more"
    return f"process{'es' if len(processes) > 1 else ''} {', '.join(texts[:10])}{more}"
