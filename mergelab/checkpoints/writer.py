"""Writes a checkpoint whose layout is known: pieces in any order, from any thread, straight to their place.

Everything is written into a work folder beside the target and renamed when complete, so the final name never
shows a half-written model; a journal of receipts lets a killed run go on where it stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from mergelab.checkpoints.file_tensor import check_piece
from mergelab.checkpoints.folder import open_checkpoint
from mergelab.checkpoints.journal import (
    Journal,
    Receipts,
    WrittenPiece,
    digest_leaves,
    leaf_bounds,
    tensor_digest,
)
from mergelab.checkpoints.json_data import read_json_object
from mergelab.checkpoints.model_files import put_file
from mergelab.checkpoints.output_target import MARKER, disk_errors, recorded_identity
from mergelab.checkpoints.publish import WorkFolder
from mergelab.checkpoints.shard_plan import ShardPlan
from mergelab.errors import CheckpointError, OutputError
from mergelab.platform import read_at, reserve, write_at
from mergelab.version import __version__

__all__ = ["CheckpointWriter", "check_digests", "identity_digest"]

_THEN = "run again with --resume"
_AGAIN = "the disk or another program changed it: write it again with --overwrite, without --resume"


def identity_digest(identity: Mapping[str, str]) -> str:
    """SHA-256 over all that determines an output, by which its finished folder is known again."""
    return hashlib.sha256(json.dumps(dict(identity), sort_keys=True).encode()).hexdigest()


def check_digests(out: Path) -> None:
    """Compares every tensor of a finished output with the digest that `mergelab.json` has of it.

    Raises:
        CheckpointError: a tensor or a file is not as it was written.
    """
    recorded = read_json_object(out / MARKER).get("tensors")
    adapter = (
        out / "adapter_model.safetensors"
    )  # a folder that holds no model, as far as `open_checkpoint` goes
    found = open_checkpoint(adapter if adapter.is_file() else out)
    if not isinstance(recorded, dict) or recorded.keys() != found.tensors.keys():
        raise CheckpointError(f"{out}: its tensors are not those that {MARKER} lists; {_AGAIN}")
    for name, tensor in found.tensors.items():
        if tensor_digest(tensor) != recorded[name]:
            raise CheckpointError(f"{out}: tensor {name!r} is not as it was written; {_AGAIN}")


class CheckpointWriter:
    """Writes the tensors and files of one checkpoint folder; `write` may be called from several threads.

    Example:
        >>> with CheckpointWriter(out, plan, identity="recipe sha256") as writer:  # doctest: +SKIP
        ...     for name in plan.places.keys() - writer.done:
        ...         writer.write(name, 0, array)
        ...     writer.add_file("config.json", config_bytes)
        ...     writer.commit()

    Left by an exception, the work folder `.<name>.partial` stays for a resumed run, unless it holds nothing
    that could be reused.

    Attributes:
        out: the folder the checkpoint will have.
        plan: its layout.
        done: tensors that an earlier run completed and whose bytes have been verified.
    """

    def __init__(
        self,
        out: Path | str | WorkFolder,
        plan: ShardPlan,
        identity: str | Mapping[str, str],
        *,
        resume: bool = False,
        overwrite: bool = False,
        inputs: Iterable[Path | str] = (),
    ) -> None:
        """Checks the target and the free space, and creates (or reopens) the work folder.

        Args:
            out: the target folder, whose parents are created; or the work folder of one, which the caller has
                entered and leaves.
            plan: the layout.
            identity: what determines the content (hashes of recipe and inputs, seed, ...): an unfinished
                output is only continued if it is equal. A mapping lets the error name what differs.
            resume: go on from an unfinished output of the same identity, if there is one.
            overwrite: replace a non-empty target that mergelab wrote; the old folder stays until the new one
                is complete.
            inputs: files and folders that are read, which the output must not endanger.

        Raises:
            OutputError: the target may not be written or replaced, the disk is too small or not writable,
                another run writes there, or the unfinished output belongs to another merge.
            CheckpointError: the unfinished output does not match its receipts.
        """
        self.plan = plan
        self._lock = threading.Condition()
        self._in_flight = 0
        self._broken = False
        self._finished = False
        self._fresh = False
        self._fds: list[int] = []
        self._receipts = {name: Receipts(place.spec.nbytes) for name, place in plan.places.items()}
        identity = {"identity": identity} if isinstance(identity, str) else identity
        self._identity = identity_digest(identity)
        self._journal: Journal | None = None
        self._owned = contextlib.ExitStack()
        if isinstance(out, WorkFolder):
            self._work = out
        else:
            self._work = self._owned.enter_context(WorkFolder(out, inputs=inputs, overwrite=overwrite))
        self.out = self._work.out
        try:
            # A run that was killed just after it had published has left nothing to do.
            self._finished = self._work.finished(self._identity)
            if resume and not self._finished and recorded_identity(self.out) == self._identity:
                check_digests(self.out)
                self._finished = True
                self._work.abandon()
            self.done = frozenset(plan.places)
            if not self._finished:
                with disk_errors(self.out, _THEN):
                    self._work.prepare(plan.nbytes)
                    self._journal = Journal(self._work.journal)
                    self.done = self._begin(self._journal, identity, resume)
        except BaseException:
            if self._fresh:
                self.abandon()
            else:
                self._close()
            raise

    def _begin(self, journal: Journal, identity: Mapping[str, str], resume: bool) -> frozenset[str]:
        layout = self.plan.digest()
        pieces = journal.resume(identity, layout) if resume and self._work.path.is_dir() else None
        self._fresh = pieces is None
        if pieces is None:
            self._work.clear()
            journal.start(identity, layout)
        self._work.keep_only(shard.file for shard in self.plan.shards)
        for shard in self.plan.shards:
            file = os.open(self._work.path / shard.file, os.O_RDWR | os.O_CREAT, 0o666)
            self._fds.append(file)
            if os.fstat(file).st_size != shard.size:
                reserve(file, shard.size)
            write_at(file, shard.head, 0)
        return self._verify(journal, pieces or [])

    def _verify(self, journal: Journal, pieces: list[WrittenPiece]) -> frozenset[str]:
        """Compares every recorded piece with the bytes on disk; returns the tensors that are complete."""
        try:
            for piece in pieces:
                width = self.plan.places[piece.name].spec.dtype.itemsize
                self._receipts[piece.name].add(piece.start * width, piece.count * width, list(piece.leaves))
        except (KeyError, IndexError, ValueError) as error:
            message = f"{journal.path} contradicts itself ({error}); run without --resume to start anew"
            raise CheckpointError(message) from error
        partial = {name for name, receipts in self._receipts.items() if not receipts.complete}
        with ThreadPoolExecutor(max_workers=4) as pool:
            list(pool.map(self._verify_piece, (piece for piece in pieces if piece.name not in partial)))
        journal.forget(name for name in partial if not self._receipts[name].empty)
        for name in partial:
            self._receipts[name] = Receipts(self.plan.places[name].spec.nbytes)
        return frozenset(self._receipts.keys() - partial) if pieces else frozenset()

    def _verify_piece(self, piece: WrittenPiece) -> None:
        width = self.plan.places[piece.name].spec.dtype.itemsize
        bounds = leaf_bounds(piece.start * width, piece.count * width)
        for (low, high), recorded in zip(bounds, piece.leaves, strict=True):
            if digest_leaves(memoryview(self._read(piece.name, low, high - low)), low) != [recorded]:
                file = self.plan.shards[self.plan.places[piece.name].shard].file
                raise CheckpointError(
                    f"{self._work.path / file}: tensor {piece.name!r} is not as it was written (bytes {low} "
                    f"to {high}); the disk or another program changed it: run without --resume to start anew"
                )

    def _read(self, name: str, offset: int, count: int) -> bytes:
        place = self.plan.places[name]
        data = bytearray(count)
        found = read_at(self._fds[place.shard], memoryview(data), place.offset + offset)
        return bytes(data[:found])

    @property
    def finished(self) -> bool:
        """Whether this very output has its final name already, so that nothing is left to write."""
        return self._finished

    def write(self, name: str, start: int, array: np.ndarray) -> None:
        """Writes flat elements `[start, start + array.size)` of a tensor, from the array's own memory.

        Args:
            name: the tensor's name in the plan.
            start: the first element.
            array: 1-D, contiguous, of the tensor's dtype.

        Raises:
            OutputError: the disk is full or fails; the work folder stays for a resumed run.
            ValueError: no such tensor, the wrong dtype or range, or elements that were written before.
        """
        place = self.plan.places.get(name)
        if place is None:
            raise ValueError(f"tensor {name!r} is not in the plan")
        check_piece(place.spec, place.spec.size, start, array)
        data = array.view(np.uint8).data
        offset = start * array.itemsize
        leaves = digest_leaves(data, offset)
        with disk_errors(self.out, _THEN), self._writing() as files:
            write_at(files[place.shard], data, place.offset + offset)
            with self._lock:
                if self._broken or self._journal is None:
                    raise OutputError(f"{self.out}: an earlier write failed; run again with --resume")
                self._receipts[name].add(offset, len(data), leaves)
                self._journal.add(WrittenPiece(name, start, array.size, tuple(leaves)))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[list[int]]:
        """Keeps the files open while a thread writes: a closed descriptor's number may name another file."""
        with self._lock:
            if not self._fds:
                raise OutputError(f"{self.out}: the writer is closed; run again with --resume")
            self._in_flight += 1
        try:
            yield self._fds
        except OSError:
            # A receipt may be torn: nothing may follow it.
            self._broken = True
            raise
        finally:
            with self._lock:
                self._in_flight -= 1
                self._lock.notify_all()

    def digests(self) -> dict[str, str]:
        """Returns a digest of every tensor's bytes by name (XXH3, see `receipts`), for the model card.

        Independent of shards and of the pieces written; rereads only what was cut between pieces.

        Raises:
            OutputError: a tensor is not complete.
        """
        self._check_complete()
        return {
            name: receipts.digest(lambda offset, count, name=name: self._read(name, offset, count))
            for name, receipts in self._receipts.items()
        }

    def add_file(self, name: str, content: bytes | Path) -> None:
        """Puts a further file (config, tokenizer, card) into the folder: bytes, or a copy of a file.

        Raises:
            OutputError: the disk is full or fails, or the file cannot be read.
            CheckpointError: `name` is not of a file in the folder or in one in it, or is that of the weights.
        """
        if self._finished:
            return
        if name in {shard.file for shard in self.plan.shards} or name == "model.safetensors.index.json":
            raise CheckpointError(f"the output file {name!r} would replace the weights; choose another name")
        with disk_errors(self.out, _THEN):
            put_file(self._work.path, name, content)

    def commit(self, *, durable: bool = True) -> Path:
        """Gives the complete checkpoint its final name and returns that folder.

        Args:
            durable: wait until everything is on the medium (fsync), so that a power cut cannot leave the
                final name on incomplete files; without it the system writes it out in the next seconds.

        Raises:
            OutputError: a tensor is not complete, the target was taken meanwhile, or the disk fails.
        """
        if not self._finished:
            self._check_complete()
            with disk_errors(self.out, _THEN):
                if (index := self.plan.index) is not None:
                    (self._work.path / "model.safetensors.index.json").write_bytes(index)
                if not (self._work.path / MARKER).exists():
                    facts = {"mergelab": __version__, "identity": self._identity, "tensors": self.digests()}
                    (self._work.path / MARKER).write_text(json.dumps(facts, indent=2) + "\n")
                self._close_files()
                self._work.publish(self._identity, durable=durable)
            self._finished = True
        self._close()
        return self.out

    def abandon(self) -> None:
        """Deletes the work folder and its journal; the target stays as it was."""
        self._close_files()
        self._work.clear(recreate=False)
        self._work.journal.unlink(missing_ok=True)
        self._finished = True
        self._close()

    def _check_complete(self) -> None:
        missing = [name for name, receipts in self._receipts.items() if not receipts.complete]
        if missing:
            raise OutputError(
                f"{self.out}: {len(missing)} tensors are not completely written, first {missing[0]!r}; "
                "run again with --resume"
            )

    def _close_files(self) -> None:
        with self._lock:
            files, self._fds = self._fds, []
            self._lock.wait_for(lambda: not self._in_flight)
        for file in files:
            os.close(file)

    def _close(self) -> None:
        self._close_files()
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        self._owned.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._finished:
            self._close()
        elif kind is not None and all(receipts.empty for receipts in self._receipts.values()):
            self.abandon()
        else:
            self._close()
