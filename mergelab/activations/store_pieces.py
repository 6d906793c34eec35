"""The rows of a shard, computed in pieces that are kept now and then, so that a kill loses little."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic

import numpy as np

from mergelab.activations.model_activations import ModelActivations
from mergelab.checkpoints import open_safetensors
from mergelab.checkpoints.manifest import digest_file
from mergelab.checkpoints.new_files import write_tensors
from mergelab.checkpoints.publish import sync_path
from mergelab.errors import CheckpointError

__all__ = ["read_in_pieces"]

_KEEP_EVERY = 20.0
"""Seconds of work that a kill may undo, and the piece that is under way."""


def read_in_pieces(
    source: ModelActivations,
    start: int,
    stop: int,
    folder: Path,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[np.ndarray, ...]:
    """Rows `start` to `stop` of every site, `[stop - start, d]`, float32.

    Args:
        source: the activations.
        start: first row.
        stop: row after the last.
        folder: folder for intermediate results of this very source, which need not exist.
        progress: function that is called with the rows done, before the last piece.

    Raises:
        NonFiniteError: an activation is NaN or infinite.
        OSError: the folder cannot be written.
    """
    rows = tuple(np.empty((stop - start, width), np.float32) for width in source.widths)
    step = source.batch * source.tokens.shape[1]  # a piece is a pass, and passes are those of the whole shard
    done = start
    for end, values in _kept(source, start, stop, folder):
        for site, piece in zip(rows, values, strict=True):
            site[done - start : end - start] = piece
        done = end
    held, since = done, monotonic()
    while done < stop:
        if done > start:
            progress(done)
        end = min(done + step, stop)
        for site, piece in zip(rows, source.read_sites(done, end), strict=True):
            site[done - start : end - start] = piece
        done = end
        if done < stop and monotonic() - since >= _KEEP_EVERY:
            part = {
                name: site[held - start : done - start] for name, site in zip(source.sites, rows, strict=True)
            }
            _keep(folder, held, done, part)
            held, since = done, monotonic()
    return rows


def _keep(folder: Path, first: int, end: int, rows: dict[str, np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / ".rows"
    write_tensors(partial, rows)
    sync_path(partial)
    os.replace(partial, folder / f"{first}-{end}-{digest_file(partial)}.safetensors")


def _kept(
    source: ModelActivations, start: int, stop: int, folder: Path
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """The pieces of a shard that an earlier call kept, from its first row on, as far as they are whole."""
    found = {}
    for path in folder.glob("*-*-*.safetensors") if folder.is_dir() else ():
        first, end, digest = path.stem.split("-")
        if first.isdigit() and end.isdigit():
            found[int(first)] = int(end), digest, path
    while start in found:
        end, digest, path = found[start]
        if end > stop or digest_file(path) != digest:
            return
        try:
            tensors = open_safetensors(path).tensors
            values = [np.empty((end - start, width), np.float32) for width in source.widths]
            for name, array in zip(source.sites, values, strict=True):
                tensors[name].read_into(0, array.reshape(-1))
        except (CheckpointError, KeyError):
            return
        yield end, values
        start = end
