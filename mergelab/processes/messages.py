"""What processes of a run tell each other: lines of JSON, and bytes that are handed on."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["LINE_BYTES", "Ended", "pump", "receive", "send"]

LINE_BYTES = 1 << 16
"""Length of a line, at most; a longer one ends the connection."""

Kind = Literal["failed", "vanished", "silent", "terminated", "interrupted", "unjoined"]


@dataclass(frozen=True)
class Ended:
    """Why a run has ended.

    Attributes:
        process: the process that it came from.
        host: name of that process's machine.
        kind: `failed` (it says why), `vanished` (its connection was cut), `silent` (no sign of life within
            the heartbeat), `terminated` (SIGTERM), `interrupted` (Ctrl-C), `unjoined` (the run never was
            whole).
        sentence: what that process said, or what was missed.
    """

    process: int
    host: str
    kind: Kind
    sentence: str

    def facts(self) -> dict[str, Any]:
        """Plain data, for a message."""
        return asdict(self)

    @staticmethod
    def of_facts(facts: dict[str, Any]) -> Ended:
        """The end that `facts` were made of."""
        return Ended(int(facts["process"]), str(facts["host"]), facts["kind"], str(facts["sentence"]))


def send(writer: asyncio.StreamWriter, **message: Any) -> None:
    """Sends one message; what a closed connection refuses is nobody's loss."""
    if not writer.is_closing():
        writer.write(json.dumps(message).encode() + b"\n")


async def receive(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """The next message; None at the end of the connection, or where something else speaks there."""
    try:
        line = await reader.readline()
        message = json.loads(line) if line.endswith(b"\n") else None
    except (OSError, ValueError, RecursionError, asyncio.LimitOverrunError):
        return None
    return message if isinstance(message, dict) else None


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Hands bytes on until either side ends."""
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
