"""A corpus read into contexts: resumable where a folder keeps them, and shared by processes in lanes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np

from mergelab.checkpoints.json_data import read_json_object
from mergelab.checkpoints.manifest import write_whole
from mergelab.checkpoints.output_target import disk_errors
from mergelab.errors import CheckpointError, CorpusError, MergelabError
from mergelab.platform import DELETES_OPEN_FILES
from mergelab.text.contexts import Cutter, TextContexts
from mergelab.text.corpus import (
    CorpusPosition,
    Document,
    TextOptions,
    corpus_places,
    documents,
    sections,
)
from mergelab.text.corpus_files import CorpusFile
from mergelab.text.corpus_tokens import token_pieces
from mergelab.text.token_rows import HELD
from mergelab.text.tokenizer import Tokenizer

__all__ = ["Share", "corpus_contexts", "forgotten_if_refused", "lane_contexts"]

_SAVE_EVERY = 10.0
"""Seconds of tokenizing that a kill may undo."""

_STATE = "state.json"
_UNITS, _CHARACTERS = 4, 64
"""Documents of a lane, and characters for each token of its contexts, from which on lanes read apart."""


@dataclass(frozen=True)
class Share:
    """What one of several processes reads of a corpus: some of its lanes.

    Document `i` belongs to lane `i mod lanes`, and lanes to processes in equal ranges. What a lane holds does
    not depend on the number of processes.

    Attributes:
        index: number of the process, from 0 on.
        count: number of processes.
        lanes: number of lanes, at least as many as processes.

    Raises:
        CorpusError: there is no such share.
    """

    index: int = 0
    count: int = 1
    lanes: int = 64

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count <= self.lanes:
            raise CorpusError(
                f"share {self.index} of {self.count} of {self.lanes} lanes does not exist; shares are "
                "counted from 0, and there are no more of them than lanes."
            )

    @property
    def mine(self) -> Sequence[int]:
        """The lanes of this process."""
        begin, end = (self.lanes * number // self.count for number in (self.index, self.index + 1))
        return range(begin, end)


@contextmanager
def forgotten_if_refused(folder: Path | None) -> Iterator[None]:
    """Deletes a folder of kept tokens where the work ends with an error that the same call would meet again.

    What a kill or an interruption leaves stays, for the call that goes on.
    """
    stood = folder is not None and folder.parent.exists()
    try:
        yield
    except MergelabError:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
            if not stood:
                with suppress(OSError):
                    folder.parent.rmdir()
        raise


Places = str | Path | Sequence[str | Path] | Sequence[CorpusFile]


def corpus_contexts(
    tokenizer: Tokenizer,
    places: Places,
    length: int,
    options: TextOptions | None = None,
    *,
    folder: Path | None = None,
    check: Callable[[np.ndarray], None] = lambda ids: None,
    progress: Callable[[int], object] = lambda tokens: None,
) -> TextContexts:
    """A corpus as contexts of `length` tokens: those that `text_contexts` makes of its documents.

    Args:
        tokenizer: the model's.
        places: what `documents` takes.
        length: tokens of a context.
        options: how.
        folder: folder in which the tokens are kept as they are made. A call that was killed goes on there: at
            the document, or the piece of a long text, at which the tokens were last saved, ten seconds before
            at most. It belongs to calls of this kind alone; of other texts or settings nothing is taken.
        check: function that is called with all ids once, and raises for those a model does not have.
        progress: function that is called with the tokens so far.

    Raises:
        CorpusError: a text cannot be read, or they do not fill one context.
        OutputError: the folder cannot be written.
    """
    job = _Job(tokenizer, corpus_places(places), length, options or TextOptions(), 1, check, progress)
    return job.read([0], folder)[0]


def lane_contexts(
    tokenizer: Tokenizer,
    places: Places,
    length: int,
    options: TextOptions | None = None,
    *,
    share: Share,
    folder: Path | None = None,
    check: Callable[[np.ndarray], None] = lambda ids: None,
    progress: Callable[[int], object] = lambda tokens: None,
) -> dict[int, TextContexts]:
    """The contexts of a process's lanes, by the lane's number; only their documents are tokenized.

    Texts of more than 131,072 characters are dealt out in sections that end with a line. Of a small corpus
    (fewer than four documents or sections a lane, or 64 characters for each token of a context) every process
    reads all, and the contexts are dealt out. Either way a lane holds the same for any number of processes.

    Args:
        tokenizer: the model's.
        places: what `documents` takes.
        length: tokens of a context.
        options: how; `tokens` is what all lanes together read.
        share: the process.
        folder: folder in which each lane keeps its tokens as they are made, as for `corpus_contexts`; a
            resumed call may have another share of the same lanes.
        check: function that is called with all ids once, and raises for those a model does not have.
        progress: function that is called with the tokens so far.

    Raises:
        CorpusError: a text cannot be read, or the texts do not fill a context of each lane.
        OutputError: the folder cannot be written.
    """
    options, files = options or TextOptions(), corpus_places(places)
    if not _is_large(files, length, options, share.lanes):
        whole = _Job(tokenizer, files, length, options, 1, check, progress).read([0], None)[0]
        if len(whole.tokens) < share.lanes:
            raise CorpusError(
                f"the texts fill {len(whole.tokens)} contexts of {length} tokens, fewer than the "
                f"{share.lanes} lanes that processes share; give more text, or shorter contexts."
            )
        return {lane: _dealt(whole, lane, share.lanes) for lane in share.mine}
    if options.tokens is not None:
        options = replace(options, tokens=-(-options.tokens // share.lanes))
    return _Job(tokenizer, files, length, options, share.lanes, check, progress).read(share.mine, folder)


def _is_large(files: Sequence[CorpusFile], length: int, options: TextOptions, lanes: int) -> bool:
    """Whether lanes read apart: told by the documents at the beginning."""
    characters = 0
    for units, document in enumerate(sections(documents(files, options)), 1):
        turns = [str(turn.get("content", "")) for turn in document.messages or ()]
        characters += sum(map(len, [*document.pieces, *turns]))
        if units >= _UNITS * lanes and characters >= _CHARACTERS * length * lanes:
            return True
    return False


def _dealt(whole: TextContexts, lane: int, lanes: int) -> TextContexts:
    counted = None if whole.counted is None else whole.counted[lane::lanes]
    return replace(whole, tokens=whole.tokens[lane::lanes], counted=counted)


@dataclass
class _Lane:
    """A lane on its way.

    Attributes:
        cutter: its contexts.
        folder: where they are kept; None for nowhere.
        start: position behind what is in them.
        exhausted: whether all its documents are in them.
        closed: whether no more is wanted, or there is no more.
    """

    cutter: Cutter
    folder: Path | None
    start: CorpusPosition = field(default_factory=CorpusPosition)
    exhausted: bool = False
    closed: bool = False


@dataclass(frozen=True)
class _Job:
    """A corpus to be read into contexts, in one lane or several."""

    tokenizer: Tokenizer
    files: Sequence[CorpusFile]
    length: int
    options: TextOptions
    count: int
    check: Callable[[np.ndarray], None]
    progress: Callable[[int], object]

    def read(self, numbers: Sequence[int], folder: Path | None) -> dict[int, TextContexts]:
        """The contexts of some of the lanes."""
        folder = folder if DELETES_OPEN_FILES else None  # who deletes it has the tokens mapped
        identity = "" if folder is None else self._identity()
        with ExitStack() as stack:
            lanes = {}
            for number in numbers:
                lanes[number] = self._lane(folder, number, identity, len(numbers))
                stack.callback(lanes[number].cutter.close)
            still = {number: lane for number, lane in lanes.items() if not lane.closed}
            if still:
                self._fill(lanes, still, identity)
            return {number: lane.cutter.finished(lane.exhausted) for number, lane in lanes.items()}

    def _fill(self, lanes: dict[int, _Lane], still: dict[int, _Lane], identity: str) -> None:
        owners: deque[int] = deque()
        saved = monotonic()
        for piece in token_pieces(self.tokenizer, self._mine(still, owners), self.options):
            number = owners[0]
            if piece.last:
                owners.popleft()
            if number not in still:
                continue
            lane = still[number]
            lane.cutter.add(piece, None)
            self.progress(sum(one.cutter.tokens.count for one in lanes.values()))
            if lane.cutter.full:
                lane.closed = True
                _save(lane, piece.after, identity)
                del still[number]
            if monotonic() - saved >= _SAVE_EVERY:
                for one in still.values():
                    _save(one, piece.after, identity)
                saved = monotonic()
            if not still:
                return
        for lane in still.values():
            lane.closed = lane.exhausted = True
            _save(lane, lane.start, identity)

    def _mine(self, still: dict[int, _Lane], owners: deque[int]) -> Iterator[Document]:
        """The documents of lanes that want more; whose each is goes to `owners`."""
        start = min((lane.start for lane in still.values()), key=astuple)
        read = documents(self.files, self.options, start)
        for document in read if self.count == 1 else sections(read):
            number = document.before.units % self.count
            if number in still and document.before.units >= still[number].start.units:
                owners.append(number)
                yield document

    def _lane(self, folder: Path | None, number: int, identity: str, among: int) -> _Lane:
        """A lane as it was last saved, or a new one."""
        home = None if folder is None else folder / f"{number:05d}"

        def cutter() -> Cutter:
            return Cutter(
                self.tokenizer, self.length, self.options, self.check, folder=home, held=HELD // among
            )

        lane = _Lane(cutter(), home)
        if home is None or not (home / _STATE).is_file():
            return lane
        try:
            said = read_json_object(home / _STATE)
            if said["identity"] == identity and lane.cutter.restore(said["contexts"]):
                lane.start = CorpusPosition(**said["position"])
                lane.closed, lane.exhausted = bool(said["closed"]), bool(said["exhausted"])
                return lane
        except (CheckpointError, KeyError, TypeError, ValueError):
            pass
        lane.cutter.close()
        (home / _STATE).unlink(missing_ok=True)
        return _Lane(cutter(), home)

    def _identity(self) -> str:
        """Digest of what the tokens depend on; of files on this machine the size and the time of change."""
        files = [[file.name, *_changed(file.path)] for file in self.files]
        of_tokenizer = {
            "backend": hashlib.sha256(self.tokenizer.backend.to_str().encode()).hexdigest(),
            "special": dict(self.tokenizer.special),
            "end": list(self.tokenizer.end_ids),
            "chat": dict(self.tokenizer.chat_templates),
        }
        facts: list[Any] = ["1", files, of_tokenizer, self.length, asdict(self.options), self.count]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _changed(path: Path | None) -> list[int]:
    """Size and time of change of a file on this machine; that on the hub is named with its commit."""
    if path is None:
        return []
    try:
        facts = path.stat()
    except OSError:  # which is said, with its reason, where the file is read
        return []
    return [facts.st_size, facts.st_mtime_ns]


def _save(lane: _Lane, position: CorpusPosition, identity: str) -> None:
    """Keeps a lane, if it is kept: its tokens first, then what says that they are there."""
    lane.start = position
    if lane.folder is None:
        return
    with disk_errors(lane.folder):
        lane.folder.mkdir(parents=True, exist_ok=True)
        told = {
            "identity": identity,
            "position": asdict(position),
            "contexts": lane.cutter.save(),
            "closed": lane.closed,
            "exhausted": lane.exhausted,
        }
        write_whole(lane.folder / _STATE, json.dumps(told))
