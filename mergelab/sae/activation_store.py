"""Writes activations to files that a training reads, with the tokens they belong to."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mergelab.checkpoints.folder import weights_sha256
from mergelab.checkpoints.json_data import parse_json_object, read_json
from mergelab.checkpoints.manifest import Entry, file_fault, write_whole
from mergelab.checkpoints.new_files import check_new_folder, write_tensors
from mergelab.checkpoints.output_target import disk_errors
from mergelab.checkpoints.publish import WorkFolder, sync_path
from mergelab.errors import CheckpointError, OutputError
from mergelab.sae.model_source import ModelActivations

__all__ = ["quantized", "write_store"]

_SHARD_ROWS = 65_536


def write_store(
    source: ModelActivations,
    out: Path | WorkFolder,
    *,
    model: Path,
    rows: int | None = None,
    dtype: str = "float32",
    progress: Callable[[int, int], None] = lambda done, total: None,
    notice: Callable[[str], None] | None = None,
) -> int:
    """Writes `SITE-NNNNN.safetensors` for each site, `tokens.safetensors` and `store.json`.

    The folder appears under its name when it is complete. A writing that was stopped goes on with the shards
    that are as they were written.

    Args:
        source: the activations.
        out: a new folder; or the work folder of one, which the caller has entered and leaves.
        model: the model's folder, whose weights' digest is kept: features belong to one model.
        rows: at most so many, in whole contexts.
        dtype: `float32`, `bfloat16`, or `int8` with a float32 scale per row.
        progress: called with rows done and rows in all.
        notice: is told what the user should know, such as a damaged shard that is written again; a Python
            warning if None.

    Returns:
        How many rows were written.

    Raises:
        OutputError: the folder is taken, holds the begun work of another call, is being written by another
            run, or cannot be written.
    """
    length = source.tokens.shape[1]
    total = source.rows if rows is None else max(min(rows, source.rows) // length, 1) * length
    given = isinstance(out, WorkFolder)
    with contextlib.nullcontext(out) if given else WorkFolder(out, inputs=[model]) as work:
        tokens = source.tokens.reshape(-1)[:total].astype(np.int32)
        facts: dict[str, Any] = {
            "format": "mergelab-activations-1",
            "model": str(model),
            "model_sha256": weights_sha256(model),
            "tokens_sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
            "sites": {site: width for site, width in zip(source.sites, source.widths, strict=True)},
            "rows": total,
            "context": length,
            "dtype": dtype,
        }
        identity = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        if not work.finished(identity):
            check_new_folder(work.out)
            work.prepare(_bytes(facts))
            _fill(work, source, facts, tokens, progress, notice or _warn)
            work.publish(identity)
    return total


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def _bytes(facts: Mapping[str, Any]) -> int:
    """What the rows take on the disk."""
    size = {"float32": 4, "bfloat16": 2, "int8": 1}[facts["dtype"]]
    scales = 4 * len(facts["sites"]) if facts["dtype"] == "int8" else 0
    return facts["rows"] * (sum(facts["sites"].values()) * size + scales + 4)


def _fill(
    work: WorkFolder,
    source: ModelActivations,
    facts: Mapping[str, Any],
    tokens: np.ndarray,
    progress: Callable[[int, int], None],
    notice: Callable[[str], None],
) -> None:
    """Makes all files in the work folder, but for those of a begun one that are whole."""
    total, dtype = len(tokens), facts["dtype"]
    with disk_errors(work.out):
        _claim(work, facts, notice)
        known = _receipts(work.journal)
        names = ["store.json", "tokens.safetensors"]
        for number, start in enumerate(range(0, total, _SHARD_ROWS)):
            stop = min(start + _SHARD_ROWS, total)
            files = [f"{site}-{number:05d}.safetensors" for site in source.sites]
            names += files
            wanted = {name: known.get(name) for name in files}
            fault = file_fault(work.path, wanted) if all(wanted.values()) else "is new"
            if fault is not None:
                if fault != "is new":
                    notice(f"the begun {work.out.name} {fault}; it is written again")
                for name, values in zip(files, source.read_sites(start, stop), strict=True):
                    _write(_stored(values, dtype), work.path / name)
                    _note(work.journal, name, asdict(Entry.of(work.path / name)))
            progress(stop, total)
        _write({"tokens": tokens}, work.path / "tokens.safetensors")
        work.keep_only(names)


def _claim(work: WorkFolder, facts: Mapping[str, Any], notice: Callable[[str], None]) -> None:
    """Says in the work folder what is being made there; only the same work goes on."""
    path = work.path / "store.json"
    if work.path.is_dir() and any(work.path.iterdir()):
        try:
            said = read_json(path)
        except CheckpointError:
            said = None
            notice(f"the begun {work.out.name} does not say what it is of, so it is begun anew")
        if said == facts:
            return
        if said is not None:
            raise OutputError(
                f"{work.path}: the begun work of another call for {work.out.name} (other model, text or "
                "settings); delete it first"
            )
    work.journal.unlink(missing_ok=True)
    work.clear()
    write_whole(path, json.dumps(facts, indent=2) + "\n")


def _receipts(path: Path) -> dict[str, Any]:
    """Size and digest of the shards written so far; a line that a kill has torn counts for nothing."""
    found: dict[str, Any] = {}
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            said = parse_json_object(line, "the line")
            found[said["file"]] = said["entry"]
        except (CheckpointError, KeyError, TypeError):
            continue
    return found


def _note(path: Path, name: str, entry: Mapping[str, Any]) -> None:
    """Appends a receipt on a line of its own, even after a torn one."""
    with path.open("ab") as file:
        file.write(b"\n" + json.dumps({"file": name, "entry": dict(entry)}).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _write(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    partial = path.with_name(f".{path.name}")
    try:
        write_tensors(partial, arrays)
        sync_path(partial)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _stored(rows: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    if dtype == "int8":
        values, scales = quantized(rows)
        return {"activations": values, "scales": scales}
    return {"activations": rows.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)}


def quantized(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows in eight bits: int8 `[rows, d]` and float32 scales `[rows]`; off by at most half a scale."""
    scales = np.abs(rows).max(axis=1) / 127
    scales = np.where(scales > 0, scales, 1).astype(np.float32)
    return np.rint(rows / scales[:, None]).astype(np.int8), scales
