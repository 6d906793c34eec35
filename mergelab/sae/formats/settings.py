"""The settings in other programs' configuration files, each read as the type it has to have."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.checkpoints import TensorSource, is_float, read_whole
from mergelab.checkpoints.json_data import read_json_object
from mergelab.errors import CheckpointError, NonFiniteError

__all__ = ["FormatSettings", "check_tensors", "number_in"]

_LARGEST = 2**31 - 1


@dataclass(frozen=True)
class FormatSettings:
    """A mapping of a configuration file, and where it stands.

    Every method takes what a key says, or `default` where the key is missing or says null; without a default
    it has to be there. They raise CheckpointError, which names the file and the key.
    """

    path: Path
    values: Mapping[str, Any]
    within: str = ""

    @classmethod
    def read(cls, path: Path) -> FormatSettings:
        """The object of a JSON file; errors are those of `read_json_object`."""
        return cls(path, read_json_object(path))

    def _refuse(self, key: str, expected: str) -> CheckpointError:
        found = repr(self.values[key])[:100] if key in self.values else "missing"
        return CheckpointError(
            f"{self.path}: {self.within}{key} is {found}, but {expected} was expected; correct it or get the "
            "file again"
        )

    def whole(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number of at least `least`."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, float) and math.isfinite(value) and value == int(value):
            value = int(value)
        if type(value) is not int or not least <= value <= _LARGEST:
            raise self._refuse(key, f"a whole number of at least {least}")
        return value

    def positive(self, key: str) -> float:
        """A finite number above 0."""
        value = self.values.get(key)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            raise self._refuse(key, "a number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.values.get(key)
        if value is None:
            return default
        if type(value) is not bool:
            raise self._refuse(key, "true or false")
        return value

    def word(self, key: str, choices: Collection[str], default: str | None = None) -> str:
        """One of some words."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str) or value not in choices:
            raise self._refuse(key, f"one of {', '.join(choices)}")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        """A mapping, by default an empty one."""
        value = self.values.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self._refuse(key, "an object {...}")
        return dict(value)

    def inner(self, key: str) -> FormatSettings:
        """The settings in a mapping; it has to be there."""
        if not isinstance(self.values.get(key), dict):
            raise self._refuse(key, "an object {...}")
        return FormatSettings(self.path, self.mapping(key), f"{self.within}{key}.")


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
