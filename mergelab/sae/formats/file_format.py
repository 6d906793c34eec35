"""What a file format of SAEs declares: how its files are recognized, read and written."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mergelab.checkpoints import TensorSource, open_pickled, open_safetensors
from mergelab.checkpoints.file_tensor import WeightFile
from mergelab.checkpoints.json_data import read_json
from mergelab.checkpoints.npy_files import open_npz
from mergelab.checkpoints.stored_zip import list_zip
from mergelab.errors import CheckpointError
from mergelab.sae.formats.settings import FormatSettings
from mergelab.sae.sae import SAE

__all__ = ["FileFormat", "Files", "Found", "Signature", "WeightsFile", "open_weights"]

SETTINGS = ("cfg.json", "config.json", "hyperparams.json")
"""Names of the files in which libraries keep settings, in the order in which they are looked at."""

_ENDS = (".safetensors", ".pt", ".pth", ".bin", ".npz", ".ckpt")
_MOST_FILES = 64
"""Weights files of a folder that are looked into; a folder of an SAE has one or two."""


@dataclass(frozen=True)
class WeightsFile:
    """Tensors of a weights file, and what else stands beside them.

    Attributes:
        tensors: tensors by name.
        values: numbers, words and mappings of them that a torch file keeps beside its tensors.
    """

    tensors: Mapping[str, TensorSource]
    values: Mapping[str, Any] = field(default_factory=dict)


def open_weights(path: Path) -> WeightsFile:
    """The tensors of a safetensors, torch or numpy file, whatever it is called; nothing in it is run.

    Raises:
        CheckpointError: it is none of them, or damaged.
    """
    head = WeightFile.open(path)
    begin = head.read(0, min(head.size, 9), "its beginning")
    if begin[8:9] == b"{":
        return WeightsFile(open_safetensors(path).tensors)
    if begin.startswith(b"PK"):
        names = [entry.filename for entry in list_zip(head, "zip")]
        if path.suffix == ".npz" or all(name.endswith(".npy") for name in names):
            return WeightsFile(open_npz(path, [name.removesuffix(".npy") for name in names]))
    elif path.suffix == ".safetensors" and begin[:1] != b"\x80":
        return WeightsFile(open_safetensors(path).tensors)  # which says what is wrong with it
    elif path.suffix == ".npz":
        return WeightsFile(open_npz(path, ()))
    opened = open_pickled(path, values=True)
    return WeightsFile(opened.tensors, opened.values)


@dataclass(frozen=True)
class Signature:
    """What tells that files are of a format: names of tensors, and keys of settings.

    Attributes:
        tensors: names of tensors that the weights file has, all of them.
        settings: keys that one of the files of settings has, all of them; `trainer.dict_class` is a key of a
            mapping. Empty where the format has no settings.
        says: values of keys, where a key alone does not tell.
        without: names of tensors that the weights file does not have.
    """

    tensors: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    says: Mapping[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Files:
    """What is at a place, a folder or a file: names of tensors and settings, without a weight being read."""

    path: Path

    @cached_property
    def folder(self) -> Path:
        """The folder in which settings stand."""
        return self.path if self.path.is_dir() else self.path.parent

    @cached_property
    def settings(self) -> Mapping[Path, Mapping[str, Any]]:
        """Settings by file.

        Raises:
            CheckpointError: one of them is not JSON.
        """
        folder = self.folder.absolute()
        # dictionary_learning and OpenMOSS keep the settings of a folder `checkpoints` beside it.
        places = [folder, folder.parent] if folder.name == "checkpoints" else [folder]
        found = ([place / name for name in SETTINGS if (place / name).is_file()] for place in places)
        there = next(filter(None, found), [])
        read = {file: read_json(file) for file in there}
        return {file: found for file, found in read.items() if isinstance(found, dict)}

    @cached_property
    def weights(self) -> Mapping[Path, frozenset[str]]:
        """Names of the tensors of each weights file; none of a file that cannot be read."""
        return {file: _names(file) for file in self._candidates}

    @cached_property
    def _candidates(self) -> tuple[Path, ...]:
        if not self.path.is_dir():
            return (self.path,)
        with os.scandir(self.path) as entries:
            names = sorted(entry.name for entry in entries if entry.name.endswith(_ENDS) and entry.is_file())
        return tuple(self.path / name for name in names[:_MOST_FILES])

    def matching(self, signature: Signature) -> tuple[list[Path], Path] | None:
        """The weights files and the file of settings that have a signature, if there are any."""
        chosen = [
            file
            for file, said in self.settings.items()
            if all(_at(said, key) is not None for key in signature.settings)
            and all(_at(said, key) == value for key, value in signature.says.items())
        ]
        if (signature.settings or signature.says) and not chosen:
            return None
        names, held = set(signature.tensors), self.weights.items()
        files = [file for file, there in held if names <= there and there.isdisjoint(signature.without)]
        return (files, chosen[0] if chosen else self.folder / SETTINGS[0]) if files else None


def _names(file: Path) -> frozenset[str]:
    try:
        return frozenset(open_weights(file).tensors)
    except CheckpointError:
        return frozenset()


def _at(settings: Mapping[str, Any], key: str) -> Any:
    """What stands under `a.b`; None where nothing does."""
    found: Any = settings
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


@dataclass(frozen=True)
class Found:
    """The files of one SAE.

    Attributes:
        weights: file of the tensors.
        settings: file of the settings, which need not exist where a format has none.
        overrides: settings that win over those of the file, from the table of releases.
    """

    weights: Path
    settings: Path
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The folder of the weights, by whose name some libraries say what the SAE is of."""
        return self.weights.parent

    @property
    def told(self) -> FormatSettings:
        """The settings.

        Raises:
            CheckpointError: there are none, or they are not a JSON object.
        """
        told = FormatSettings.read(self.settings)
        return FormatSettings(told.path, {**told.values, **self.overrides})


@dataclass(frozen=True)
class FileFormat:
    """One library's files.

    Attributes:
        name: what `mergelab sae export --format` calls it.
        read: makes an SAE of its files.
        signatures: what its files have in common; one of them is enough.
        weights: name of its weights file.
        settings: name of its file of settings; None if it has none.
        looks_for: what the files are, in words.
        write: writes an SAE to a new folder or file, or to the locked place of one (`reserve`); None if it
            cannot be written.
        one_file: whether it is a file, not a folder.
    """

    name: str
    read: Callable[[Found], SAE]
    signatures: tuple[Signature, ...]
    weights: str
    settings: str | None
    looks_for: str
    write: Callable[[SAE, Any], None] | None = None
    one_file: bool = False

    def find(self, files: Files, reserved: Collection[str] = ()) -> Found | None:
        """The files of an SAE of this format at a place, recognized by their content.

        Args:
            files: what is at the place.
            reserved: names of other formats' weights files, which settings must say are of this one.

        Raises:
            CheckpointError: there are several.
        """
        for signature in self.signatures:
            matching = files.matching(signature)
            if matching is None:
                continue
            weights, settings = matching
            if not signature.settings and not signature.says:
                weights = [file for file in weights if file.name not in reserved or file.name == self.weights]
            named = [file for file in weights if file.name == self.weights]
            if len(named or weights) > 1:
                names = ", ".join(file.name for file in weights[:8])
                raise CheckpointError(
                    f"{files.path}: holds {len(weights)} SAEs of the format {self.name!r} ({names}); name "
                    "one of the files"
                )
            if weights:
                return Found((named or weights)[0], settings)
        return None

    def expected(self, files: Files) -> Found:
        """The files that this format has at a place, whether they are there or not."""
        weights = files.path if files.path.is_file() else files.folder / self.weights
        settings = next(iter(files.settings), None)
        if self.settings is not None and (settings is None or (files.folder / self.settings).is_file()):
            settings = files.folder / self.settings
        return Found(weights, settings or files.folder / SETTINGS[0])
