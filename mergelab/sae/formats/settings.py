"""The settings in other programs' configuration files, each read as the type it has to have."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.checkpoints import TensorSource, is_float, read_whole
from mergelab.checkpoints.json_data import read_json_object
from mergelab.errors import CheckpointError, NonFiniteError

__all__ = ["FormatSettings", "check_tensors", "faults_at_once", "number_in"]

_LARGEST = 2**31 - 1


@dataclass(frozen=True)
class FormatSettings:
    """A mapping of a configuration file, and where it stands.

    Every method takes what a key says, or `default` where the key is missing or says null; without a default
    it has to be there. They raise CheckpointError, which names the file and the key; within `faults_at_once`
    they note it, and go on with a value of the right type.
    """

    path: Path
    values: Mapping[str, Any]
    within: str = ""
    faults: list[str] | None = None

    @classmethod
    def read(cls, path: Path) -> FormatSettings:
        """The object of a JSON file; errors are those of `read_json_object`."""
        return cls(path, read_json_object(path))

    def refuse(self, what: str, path: Path | None = None) -> None:
        """Says, or notes, that something in the file, or in another one beside it, is wrong."""
        fault = f"{path or self.path}: {what}; correct it or get the file again"
        if self.faults is None:
            raise CheckpointError(fault)
        self.faults.append(fault)

    def _refuse(self, key: str, expected: str) -> None:
        found = repr(self.values[key])[:100] if key in self.values else "missing"
        self.refuse(f"{self.within}{key} is {found}, but {expected} was expected")

    def whole(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number of at least `least`."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, float) and math.isfinite(value) and value == int(value):
            value = int(value)
        if type(value) is not int or not least <= value <= _LARGEST:
            self._refuse(key, f"a whole number of at least {least}")
            return least
        return value

    def positive(self, key: str) -> float:
        """A finite number above 0."""
        value = self.values.get(key)
        number = float(value) if type(value) is float or (type(value) is int and value <= _LARGEST) else 0.0
        if not math.isfinite(number) or number <= 0:
            self._refuse(key, "a number above 0")
            return 1.0
        return number

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.values.get(key)
        if value is None:
            return default
        if type(value) is not bool:
            self._refuse(key, "true or false")
            return default
        return value

    def word(self, key: str, choices: Collection[str], default: str | None = None) -> str:
        """One of some words."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str) or value not in choices:
            self._refuse(key, f"one of {', '.join(choices)}")
            return next(iter(choices))
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        """A mapping, by default an empty one."""
        value = self.values.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self._refuse(key, "an object {...}")
            return {}
        return dict(value)

    def inner(self, key: str) -> FormatSettings:
        """The settings in a mapping; it has to be there."""
        if not isinstance(self.values.get(key), dict):
            self._refuse(key, "an object {...}")
            return FormatSettings(self.path, {}, f"{self.within}{key}.", [])  # what is in it is not known
        return FormatSettings(self.path, self.mapping(key), f"{self.within}{key}.", self.faults)


@contextlib.contextmanager
def faults_at_once(told: FormatSettings) -> Iterator[FormatSettings]:
    """The settings, of which all that is wrong is said when the block ends, not at the first fault.

    Raises:
        CheckpointError: something was wrong; `faults` has a sentence for each.
    """
    faults: list[str] = []
    try:
        yield replace(told, faults=faults)
    except CheckpointError as error:
        raise CheckpointError([*faults, *error.faults]) from None
    if faults:
        raise CheckpointError(faults)


def check_tensors(path: Path, tensors: Mapping[str, TensorSource], axes: Mapping[str, int]) -> None:
    """Checks what tensors are before any is read.

    Args:
        path: path of their file.
        tensors: tensors by name.
        axes: number of axes of those that are looked at; missing ones are passed over.

    Raises:
        CheckpointError: one has other axes, or holds no floats.
    """
    for name, count in axes.items():
        tensor = tensors.get(name)
        if tensor is not None and (len(tensor.shape) != count or not is_float(tensor.dtype)):
            raise CheckpointError(
                f"{path}: {name} is {tensor.dtype} of shape {list(tensor.shape)}, but floats with "
                f"{count} {'axis' if count == 1 else 'axes'} were expected; get or write the SAE again"
            )


def number_in(path: Path, name: str, tensor: TensorSource) -> float | int:
    """The one number that a tensor holds.

    Raises:
        CheckpointError: it holds several, none, or one that is not finite.
    """
    real = tensor.dtype.kind in "iu" or is_float(tensor.dtype)
    if not real or math.prod(tensor.shape) != 1:
        raise CheckpointError(
            f"{path}: {name} is {tensor.dtype} of shape {list(tensor.shape)}, but a single number was "
            "expected; get or write the SAE again"
        )
    value = np.asarray(read_whole(tensor)).reshape(())
    found = int(value) if tensor.dtype.kind in "iu" else float(value)
    if not math.isfinite(found):
        raise NonFiniteError(f"{path}: {name} is {found}, but a finite number was expected; get it again")
    return found
