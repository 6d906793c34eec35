"""What an interrupted run has written: a journal of receipts for each piece."""

from __future__ import annotations

import bisect
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from mergelab.checkpoints.source import TensorSource
from mergelab.errors import CheckpointError, OutputError

__all__ = ["LEAF", "Journal", "Receipts", "WrittenPiece", "digest_leaves", "leaf_bounds", "tensor_digest"]


LEAF = 1 << 20


def leaf_bounds(offset: int, count: int) -> Iterator[tuple[int, int]]:
    """Yields the bytes `[offset, offset + count)` of a tensor as ranges cut at leaf boundaries."""
    end = offset + count
    while offset < end:
        stop = min(end, (offset // LEAF + 1) * LEAF)
        yield offset, stop
        offset = stop


def digest_leaves(data: memoryview, offset: int) -> list[int]:
    """Returns the XXH3-64 digests of a piece at byte `offset`, one per range of `leaf_bounds`."""
    return [
        xxhash.xxh3_64_intdigest(data[low - offset : high - offset])
        for low, high in leaf_bounds(offset, len(data))
    ]


class Receipts:
    """What has been written of a tensor of `nbytes` bytes. Not thread-safe: the writer holds its lock."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._starts: list[int] = []
        self._stops: list[int] = []
        self._leaves = np.zeros(-(-nbytes // LEAF), np.uint64)
        self._known = np.zeros(self._leaves.shape, np.bool_)

    @property
    def complete(self) -> bool:
        """True if every byte has been written."""
        return self.nbytes == 0 or (self._starts == [0] and self._stops == [self.nbytes])

    @property
    def empty(self) -> bool:
        """True if nothing has been written."""
        return not self._starts

    def add(self, offset: int, count: int, leaves: list[int]) -> None:
        """Notes that bytes `[offset, offset + count)` have been written and hash to `leaves`.

        Raises:
            ValueError: some of them had been written before.
        """
        if not count:
            return
        end = offset + count
        at = bisect.bisect_left(self._starts, offset)
        if (at and self._stops[at - 1] > offset) or (at < len(self._starts) and self._starts[at] < end):
            raise ValueError(f"bytes [{offset}, {end}) of a tensor are written twice")
        if at < len(self._starts) and self._starts[at] == end:
            end = self._stops[at]
            del self._starts[at], self._stops[at]
        if at and self._stops[at - 1] == offset:
            self._stops[at - 1] = end
        else:
            self._starts.insert(at, offset)
            self._stops.insert(at, end)
        for (low, high), leaf in zip(leaf_bounds(offset, count), leaves, strict=True):
            if low % LEAF == 0 and (high % LEAF == 0 or high == self.nbytes):
                self._leaves[low // LEAF] = leaf
                self._known[low // LEAF] = True

    def digest(self, read: Callable[[int, int], bytes]) -> str:
        """Returns the tensor's digest in hex; `read(offset, count)` rereads leaves cut between pieces."""
        for leaf in np.flatnonzero(~self._known):
            low = int(leaf) * LEAF
            data = read(low, min(LEAF, self.nbytes - low))
            self._leaves[leaf] = xxhash.xxh3_64_intdigest(data)
            self._known[leaf] = True
        return xxhash.xxh3_128_hexdigest(self._leaves.astype("<u8").tobytes())


def tensor_digest(tensor: TensorSource) -> str:
    """The digest that `Receipts.digest` gives of a tensor with these values; reads it leaf by leaf."""
    width = tensor.dtype.itemsize
    receipts = Receipts(math.prod(tensor.shape) * width)

    def read(offset: int, count: int) -> bytes:
        values = np.empty(count // width, tensor.dtype)
        tensor.read_into(offset // width, values)
        return values.tobytes()

    return receipts.digest(read)


_VERSION = 1


@dataclass(frozen=True)
class WrittenPiece:
    """A receipt: elements `[start, start + count)` of tensor `name` are in place, with these leaf digests."""

    name: str
    start: int
    count: int
    leaves: tuple[int, ...]


class Journal:
    """JSON lines: a head that says what is being made, then one line per piece, each written in one call.

    A process killed at any moment leaves at most one torn last line, which is cut off on the next start.
    Whoever uses it holds the output's lock (`WorkFolder`).
    """

    def __init__(self, path: Path) -> None:
        """Opens the journal at `path`, creating it if need be.

        Raises:
            OSError: it cannot be created.
        """
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)

    def start(self, identity: Mapping[str, str], layout: str) -> None:
        """Empties the journal and writes its head."""
        os.ftruncate(self._file, 0)
        self._append({"version": _VERSION, "identity": dict(identity), "layout": layout})

    def resume(self, identity: Mapping[str, str], layout: str) -> list[WrittenPiece] | None:
        """Returns the recorded pieces, or None if the journal holds nothing to go on from.

        Raises:
            OutputError: the journal belongs to another merge; the message names what differs.
            CheckpointError: a line is damaged.
        """
        lines = self._whole_lines()
        if not lines:
            return None
        self._check_head(lines.pop(0), identity, layout)
        pieces: dict[str, list[WrittenPiece]] = {}
        for number, line in enumerate(lines, 2):
            record = self._parse(line, number)
            try:
                for name in record.get("redo", ()):
                    pieces.pop(name, None)
                if "name" in record:
                    leaves = bytes.fromhex(record["leaves"])
                    digests = tuple(
                        int.from_bytes(leaves[i : i + 8], "big") for i in range(0, len(leaves), 8)
                    )
                    piece = WrittenPiece(record["name"], int(record["start"]), int(record["count"]), digests)
                    pieces.setdefault(piece.name, []).append(piece)
            except (KeyError, TypeError, ValueError) as error:
                raise self._damaged(number) from error
        return [piece for group in pieces.values() for piece in group]

    def add(self, piece: WrittenPiece) -> None:
        """Appends a receipt."""
        leaves = b"".join(leaf.to_bytes(8, "big") for leaf in piece.leaves).hex()
        self._append({"name": piece.name, "start": piece.start, "count": piece.count, "leaves": leaves})

    def forget(self, names: Iterable[str]) -> None:
        """Withdraws the receipts of tensors that will be written again from their beginning."""
        if names := list(names):
            self._append({"redo": names})

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)

    def _append(self, record: dict[str, Any]) -> None:
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        while line:
            line = line[os.write(self._file, line) :]

    def _whole_lines(self) -> list[bytes]:
        """Returns the complete lines, cutting off a torn last one for good."""
        text = self.path.read_bytes()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            os.ftruncate(self._file, whole)
        return text[:whole].splitlines()

    def _check_head(self, line: bytes, identity: Mapping[str, str], layout: str) -> None:
        head = self._parse(line, 1)
        recorded = head.get("identity")
        if head.get("version") != _VERSION or not isinstance(recorded, dict):
            raise self._damaged(1)
        differing = [key for key in sorted({*recorded, *identity}) if recorded.get(key) != identity.get(key)]
        if head.get("layout") != layout:
            differing.append("layout of the output (tensors, dtypes or shard size)")
        if differing:
            raise OutputError(
                f"{self.path.name} records another merge: {', '.join(differing)} differ; "
                "run without --resume to start anew, or with what the first run was given"
            )

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise self._damaged(number) from error
        if not isinstance(record, dict):
            raise self._damaged(number)
        return record

    def _damaged(self, number: int) -> CheckpointError:
        return CheckpointError(f"{self.path}: line {number} is damaged; run without --resume to start anew")
