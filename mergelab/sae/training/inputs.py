"""What a training reads, so that one that is resumed is known to be the same work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

from mergelab.activations import ActivationFiles, ActivationSource, find_activation_files
from mergelab.checkpoints.folder import bounded_digest
from mergelab.checkpoints.locations import local_path
from mergelab.checkpoints.manifest import Entry
from mergelab.checkpoints.remote import cache_folder
from mergelab.errors import CheckpointError, SAEError
from mergelab.sae.training.config import DataSection
from mergelab.sae.training.warm_start import dictionary_folder
from mergelab.text.corpus_files import CorpusFile, corpus_files

__all__ = ["changed_input", "check_same", "fingerprint", "input_paths", "read_once"]

_READ_BYTES = 1 << 30
"""Bytes of activations that are read before a run is begun; of more, blocks spread over the files are."""

_ROWS = 65_536


def input_paths(data: DataSection, start_from: str | None = None) -> list[Path]:
    """The files and folders a training reads, as its configuration names them; globs are resolved."""
    paths = []
    for pattern in (data.path, data.target_path):
        if data.kind == "files" and pattern is not None:
            paths += find_activation_files(pattern)
    if data.kind == "model":
        if data.model is not None:
            paths.append(local_path(data.model))
        paths += [file.path for file in _texts(data) if file.path is not None]
    if start_from is not None:
        paths.append(dictionary_folder(start_from))
    return paths


def _texts(data: DataSection) -> list[CorpusFile]:
    return corpus_files(data.texts) if data.kind == "model" and data.texts else []


def fingerprint(data: DataSection, start_from: str | None = None) -> dict[str, Any]:
    """Size and digest of every file that decides a training, by path: plain JSON data.

    Weights of a model and large activations are known by their size and by blocks spread over them; the
    digest of all of a model's weights is in the SAE's metadata (`mergelab.sae.training.data`).

    Raises:
        CheckpointError: a file cannot be read.
    """
    files = []
    for path in input_paths(data, start_from):
        files += sorted(_model_files(path)) if path.is_dir() else [path]
    share = _READ_BYTES // max(len(files), 1)
    # A file of a data set on the hub is named with its commit, which is a digest of all of it.
    found = {file.name: asdict(Entry(0, "")) for file in _texts(data) if file.path is None}
    for path in files:
        try:
            found[_named(path)] = asdict(Entry(path.stat().st_size, bounded_digest(path, share)))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    return found


def _named(path: Path) -> str:
    """A file's path, or what stands for one of a URL on every machine: its place in the cache of copies."""
    cache = cache_folder()
    return f"cache:{path.relative_to(cache).as_posix()}" if cache in path.parents else str(path)


def _model_files(folder: Path) -> list[Path]:
    """Weights, configuration and tokenizer of a model."""
    kinds = (".safetensors", ".bin", ".json", ".txt", ".model", ".jinja", ".pt", ".npz")
    return [path for path in folder.iterdir() if path.suffix in kinds and path.is_file()]


def changed_input(before: Any, now: Mapping[str, Any]) -> str | None:
    """The first input that is not what it was when a run began, and how; None if all are.

    Args:
        before: fingerprint of then.
        now: fingerprint of now.
    """
    if not isinstance(before, dict):
        return "the list of its inputs is damaged"
    for path in sorted({*before, *now}):
        if path not in now:
            return f"{path} is missing"
        if path not in before:
            return f"{path} was not there"
        if before[path] != now[path]:
            return f"{path} has other content"
    return None


def read_once(*sources: ActivationSource | None) -> None:
    """Reads all rows of activation files, if they are not too many, so that bad ones are known at once.

    Each of several processes reads an equal share.

    Raises:
        NonFiniteError: a row holds NaN or infinity.
        CheckpointError: a file cannot be read.
    """
    files = [source for source in sources if isinstance(source, ActivationFiles)]
    if sum(source.rows * source.d_in * 4 for source in files) > _READ_BYTES:
        return
    process, processes = jax.process_index(), jax.process_count()
    for source in files:
        first, end = (source.rows * one // processes for one in (process, process + 1))
        for start in range(first, end, _ROWS):
            source.read(start, min(start + _ROWS, end))


def check_same(folder: Path, before: Any, now: Mapping[str, Any]) -> None:
    """Refuses to go on with a run whose inputs have changed.

    Raises:
        SAEError: one has; it is named.
    """
    changed = changed_input(before, now)
    if changed is not None:
        raise SAEError(
            f"{folder}: {changed} since the run began, so what is resumed would be another training; put the "
            "data back, or begin another run."
        )
