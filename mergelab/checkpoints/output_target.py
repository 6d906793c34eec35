"""What an output may be: where nothing of the user's would be lost, and what `--overwrite` may replace."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from mergelab.checkpoints.json_data import read_json_object
from mergelab.errors import CheckpointError, OutputError

__all__ = ["MARKER", "check_target", "check_vacant", "disk_errors", "recorded_identity"]

MARKER = "mergelab.json"
"""The file by which a folder is known to be mergelab's own: only such a folder is ever replaced."""

_NAME_BYTES = 255
_LONGEST_SUFFIX = len("..replaced")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)


def check_target(out: Path, inputs: Iterable[Path | str] = (), *, folder: bool = True) -> None:
    """Refuses an output that is not a plain new or replaceable name, or by which an input could be lost.

    Symbolic links are resolved before paths are compared. Reads names only and writes nothing.

    Args:
        out: the file or folder that is asked for.
        inputs: files and folders that the command reads: models, adapters, recipes, texts, data.
        folder: whether the output is a folder; a file may lie inside an input's folder.

    Raises:
        OutputError: the output is the root, a link, of the other kind, or has too long a name; it is or
            contains an input or the working directory; or it lies inside an input.
    """
    out = Path(os.path.abspath(out))
    kind, other = ("folder", "file") if folder else ("file", "folder")
    if not out.name:
        raise OutputError(f"{out} is the root of the file system; choose a {kind} inside it")
    length = len(os.fsencode(out.name))
    if length + _LONGEST_SUFFIX > _NAME_BYTES:
        raise OutputError(
            f"{out.name[:40]}...: the name has {length} bytes, but at most {_NAME_BYTES - _LONGEST_SUFFIX} "
            "can be used; choose a shorter one"
        )
    with disk_errors(out):
        if out.is_symlink():
            there = os.readlink(out)
            end = f"; name that {kind} itself" if out.exists() else ", which does not exist; remove the link"
            raise OutputError(f"{out} is a link to {there}{end} or choose another name")
        if out.exists() and out.is_dir() != folder:
            raise OutputError(f"{out} is a {other}; choose a {kind}")
        _check_inputs(out, inputs, folder)


def _check_inputs(out: Path, inputs: Iterable[Path | str], folder: bool) -> None:
    real, here = out.resolve(), Path.cwd().resolve()
    if folder and (here == real or real in here.parents):
        raise OutputError(
            f"{out} {'is' if here == real else 'contains'} the working directory; choose another folder"
        )
    for given in inputs:
        found = Path(given).resolve()
        if found == real:
            raise OutputError(f"{out} is an input of this command; choose another name for the output")
        if real in found.parents:
            raise OutputError(f"{out} contains the input {given}; choose another folder for the output")
        if folder and found in real.parents and found.is_dir():
            raise OutputError(f"{out} lies inside the input {given}; choose a folder outside it")


def check_vacant(out: Path, *, overwrite: bool) -> None:
    """Refuses a folder that holds files, unless it is mergelab's own and may be overwritten.

    Raises:
        OutputError: the folder is not empty, or has no `mergelab.json` and so is not replaced.
        OSError: the file system refuses.
    """
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"{out} is not empty; choose another folder or pass --overwrite")
    if not (out / MARKER).is_file():
        raise OutputError(
            f"{out} was not written by mergelab (it has no {MARKER}), so it is not replaced; choose another "
            "folder, or delete it yourself"
        )


def recorded_identity(out: Path) -> str | None:
    """The identity of the work that `out` is the result of, or None; folders appear only when complete."""
    try:
        found = read_json_object(out / MARKER).get("identity")
    except CheckpointError:
        return None
    return found if isinstance(found, str) else None


@contextlib.contextmanager
def disk_errors(out: Path, then: str = "run again") -> Iterator[None]:
    """Turns what the file system refuses into an OutputError about `out`; `then` ends its advice."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _FULL:
            message = f"{out}: the disk is full ({reason}); free some space and {then}"
        elif error.errno in _REFUSED:
            message = f"{out} cannot be written ({reason}); choose a place that you may write to"
        else:
            where = f" at {error.filename}" if error.filename else ""
            message = f"{out}: writing failed{where} ({reason}); check the path and the disk and {then}"
        raise OutputError(message) from error
