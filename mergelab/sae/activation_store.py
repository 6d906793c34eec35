"""Writes activations to files that a training reads, with the tokens they belong to."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from mergelab.checkpoints.digest import weights_sha256
from mergelab.errors import OutputError
from mergelab.sae.model_source import ModelActivations

__all__ = ["quantized", "write_store"]

_SHARD_ROWS = 65_536


def write_store(
    source: ModelActivations,
    out: Path,
    *,
    model: Path,
    rows: int | None = None,
    dtype: str = "float32",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Writes `SITE-NNNNN.safetensors` for each site, `tokens.safetensors` and `store.json`.

    The folder appears under its name when it is complete. A writing that was stopped goes on with the shards
    it has.

    Args:
        source: the activations.
        out: a new folder.
        model: the model's folder, whose weights' digest is kept: features belong to one model.
        rows: at most so many, in whole contexts.
        dtype: `float32`, `bfloat16`, or `int8` with a float32 scale per row.
        progress: called with rows done and rows in all.

    Returns:
        How many rows were written.

    Raises:
        OutputError: the folder is taken, holds the begun work of another call, or cannot be written.
    """
    length = source.tokens.shape[1]
    total = source.rows if rows is None else max(min(rows, source.rows) // length, 1) * length
    out = Path(os.path.abspath(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} is not empty; choose another folder")
    facts: dict[str, Any] = {
        "format": "mergelab-activations-1",
        "model": str(model),
        "model_sha256": weights_sha256(model),
        "sites": {site: width for site, width in zip(source.sites, source.widths, strict=True)},
        "rows": total,
        "context": length,
        "dtype": dtype,
    }
    work = out.with_name(f".{out.name}.partial")
    try:
        work.mkdir(parents=True, exist_ok=True)
        _claim(work / "store.json", facts, out)
        for number, start in enumerate(range(0, total, _SHARD_ROWS)):
            stop = min(start + _SHARD_ROWS, total)
            files = [work / f"{site}-{number:05d}.safetensors" for site in source.sites]
            if not all(file.is_file() for file in files):
                for file, values in zip(files, source.read_sites(start, stop), strict=True):
                    _write(_stored(values, dtype), file)
            progress(stop, total)
        _write({"tokens": source.tokens.reshape(-1)[:total].astype(np.int32)}, work / "tokens.safetensors")
        if out.exists():
            out.rmdir()
        work.rename(out)
    except OSError as error:
        raise OutputError(
            f"{out}: cannot be written ({error.strerror}); check the disk, then run again"
        ) from error
    return total


def _claim(path: Path, facts: dict[str, Any], out: Path) -> None:
    if path.is_file() and json.loads(path.read_text()) != facts:
        raise OutputError(f"{path.parent}: the begun work of another call for {out.name}; delete it first")
    path.write_text(json.dumps(facts, indent=2) + "\n")


def _write(arrays: dict[str, np.ndarray], path: Path) -> None:
    partial = path.with_name(f".{path.name}")
    save_file(arrays, partial)
    partial.rename(path)


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
