"""Names of files inside a model folder: one plain file name under POSIX and Windows rules, nothing else."""

from __future__ import annotations

from pathlib import PureWindowsPath

from mergelab.errors import CheckpointError

__all__ = ["check_file_name"]

_FORBIDDEN = frozenset('/\\:*?"<>|')
_DEVICES = frozenset(
    ["CON", "PRN", "AUX", "NUL", *(f"{port}{number}" for port in ("COM", "LPT") for number in range(1, 10))]
)


def check_file_name(name: object, place: str) -> str:
    """Returns `name` if it is one relative file name on every system.

    An index is written by a stranger: a separator, a drive, `..`, a device name or a control character in it
    could make a reader or writer leave the model's folder.

    Raises:
        CheckpointError: it is not; `place` says where it stood.
    """
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"{place} gives {name!r} where a file name was expected; correct the file")
    unsafe = (
        name in (".", "..")
        or any(character in _FORBIDDEN or ord(character) < 32 for character in name)
        or name[-1] in " ."
        or PureWindowsPath(name).stem.upper() in _DEVICES
        or len(name) > 255
    )
    if unsafe:
        raise CheckpointError(
            f"{place} gives the file name {name!r}, which is not one plain name inside the model's folder; "
            "do not use this copy of the model"
        )
    return name
